"""Exits placed by measurement: the search against all subsets and a walk token by token, lenses against lstsq."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.core.costs import exit_flops
from offramp.families import SplitModel
from offramp.runs.codec import decode, encode
from offramp.training import placement
from offramp.training.placement import Placement, best_exits, chosen_before, gains_of, lens_weights, place
from tiny import LAYERS, tiny
from training_runs import windows


def walked(agrees, gains, price, chosen):
    """What exits save, one token after the other."""
    total = 0.0
    for token in agrees.tolist():
        for at in chosen:
            total -= price
            if token[at]:
                total += float(gains[at])
                break
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4), st.floats(0, 6), st.floats(0.05, 0.9))
def test_the_search_is_as_good_as_all_subsets(seed, count, most, price, rate):
    generator = torch.Generator().manual_seed(seed)
    agrees = torch.rand(25, count, generator=generator) < rate
    gains = (torch.rand(count, generator=generator, dtype=torch.float64) * 9).sort(descending=True).values
    subsets = [s for size in range(most + 1) for s in itertools.combinations(range(count), size)]
    best = max(walked(agrees, gains, price, subset) for subset in subsets)
    chosen, total = best_exits(agrees, gains, price, most)
    assert len(chosen) <= most
    assert chosen == sorted(set(chosen))
    assert total == pytest.approx(best, abs=1e-9)
    assert walked(agrees, gains, price, chosen) == pytest.approx(best, abs=1e-9)


def test_a_search_over_many_layers_ends():
    """Agreement that rises with depth, and four exits of 40: 102,090 subsets."""
    generator = torch.Generator().manual_seed(0)
    settles = torch.randint(5, 60, (300, 1), generator=generator)
    agrees = (torch.arange(40) >= settles) ^ (torch.rand(300, 40, generator=generator) < 0.03)
    chosen, total = best_exits(agrees, torch.arange(40.0, 0, -1, dtype=torch.float64), 3.0, 4)
    assert total == pytest.approx(walked(agrees, torch.arange(40.0, 0, -1), 3.0, chosen))


def test_gains_are_those_of_the_ledger():
    """Leaving after l by the one test there, against the full model."""
    shape = SplitModel(tiny("llama")).shape
    full = exit_flops(shape, LAYERS, None)
    for layer, gain in enumerate(gains_of(shape).tolist(), 1):
        assert full - exit_flops(shape, layer, layer) == gain - shape.readout_flops()


def test_what_is_placed_and_what_is_said():
    shape = SplitModel(tiny("llama")).shape
    agrees = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    found = place(shape, agrees, lens_weights(shape.width, 2), 2, kept=5)
    assert found.agreement == (0.0, 0.5, 0.75)
    assert found.layers[-1] <= 3
    assert found.alone[0] < 0 < found.alone[1] <= found.saving
    assert [line.split("|")[1].strip() for line in found.table().split("\n") if "exit |" in line] == [
        *map(str, found.layers)
    ]
    assert decode(Placement, encode(found)) == found
    record = {"about": {"placement": encode(found)}}
    assert chosen_before(record, 2, 5) == found
    assert chosen_before(record, 3, 5) is chosen_before({}, 2, 5) is chosen_before(None, 2, 5) is None
    with pytest.raises(ValueError, match=r"no exit pays: even one after layer \d, which agrees .* at 0 of 4 positions"):
        place(shape, torch.zeros_like(agrees), 0, 2)
    with pytest.raises(ValueError, match=r"4 exits are to be placed; a model of 4 layers can have 1..3"):
        place(shape, agrees, 0, 4)


def test_lenses_in_closed_form_are_least_squares(monkeypatch):
    monkeypatch.setattr(placement, "RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, size, generator=generator, dtype=torch.float64) for size in (6, 6))
    one = torch.cat([x, x.new_ones(50, 1)], 1)
    weight, bias = placement.solved(one.T @ torch.cat([one, y], 1))
    expected = torch.linalg.lstsq(one, y).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_agreement_is_that_of_lenses_fitted_on_other_windows(monkeypatch, name):
    """Through lenses that do nothing it is that of the model's own readouts."""
    split, part = SplitModel(tiny(name)), windows(6, sources=name == "t5", prompts=4)
    monkeypatch.setattr(placement, "solved", lambda sums: (torch.zeros(32, 32), torch.zeros(32)))
    found = placement.agreement(split, part, seed=0)
    measured = part[torch.randperm(6, generator=torch.Generator().manual_seed(0))[1::2]]
    assert found.shape == (measured.positions, LAYERS - 1)
    with torch.no_grad():
        memory = None if name == "llama" else split.encode(measured.sources, measured.present)
        states = split.states(measured.ids[:, :-1], range(1, LAYERS + 1), memory=memory, memory_mask=measured.present)
        tokens = [split.readout(h)[measured.counted[:, 1:]].argmax(-1) for h in states]
    assert torch.equal(found, torch.stack([t == tokens[-1] for t in tokens[:-1]], 1))
    monkeypatch.undo()
    fitted = placement.agreement(split, part, seed=0)
    assert float(fitted.float().mean()) != float(found.float().mean())
    with pytest.raises(ValueError, match="there is one; give more"):
        placement.agreement(split, part[:1], seed=0)
