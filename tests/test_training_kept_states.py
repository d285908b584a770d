"""A frozen model's states, read from a file, are what the model computes, and go when training ends."""

from types import SimpleNamespace

import pytest
import torch

from offramp.core.exits import Exits
from offramp.training.data import Windows, batch, steps_per_epoch
from offramp.training.kept_states import KeptStates
from offramp.training.passes import states_of
from offramp.training.trainer import train
from training_runs import config, data, model, windows

ALONE = SimpleNamespace(num_processes=1)


def ragged(count=10):
    """Windows of several lengths whose first tokens are not to be predicted."""
    generator = torch.Generator().manual_seed(3)
    found = windows(count, prompts=4)
    lengths = torch.randint(7, 13, (count, 1), generator=generator)
    return Windows(found.ids, found.counted & (torch.arange(12) < lengths))


@pytest.mark.parametrize("positions", [None, 2])
@pytest.mark.parametrize("blocks", [0, 2])
def test_states_are_those_of_the_models_own_pass(tmp_path, blocks, positions):
    lm, whole, calls = model(), ragged(), []
    lm.split.exits = Exits.fresh(lm.split, (1, 3), blocks=blocks)
    with torch.no_grad():
        for parameter in lm.split.exits.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for part in (lm.model, lm.split.exits):
        part.double()  # states reach 40, so that float32 rounds by as much as some elements are worth
    kept = KeptStates.of(lm.split, whole, (1, 3, 4), config(blocks=blocks, batch_size=4), tmp_path, ALONE)
    hook = lm.split.decoder.register_forward_hook(lambda *_: calls.append(1))
    for step in range(3 * steps_per_epoch(whole, 4)):
        part = batch(whole, step, 4, 0, positions)
        with torch.no_grad():
            got, labels = kept.read(part)
            count = len(calls)
            want, theirs = states_of(lm.split, part, (1, 3, 4))
        del calls[count:]
        assert torch.equal(labels, theirs)
        for state, other in zip(got, want, strict=True):
            torch.testing.assert_close(state, other, atol=1e-12, rtol=1e-12)
    hook.remove()
    assert len(calls) == steps_per_epoch(whole, 4)  # one pass for each batch of the first epoch
    again = KeptStates.of(lm.split, whole, (1, 3, 4), config(blocks=blocks, batch_size=4), tmp_path, ALONE)
    assert bool(again.done.all())
    assert torch.equal(again.values, kept.values)


def test_a_run_passes_its_data_through_the_model_once(tmp_path, monkeypatch):
    lm, seen = model(), []
    compute = KeptStates._compute
    monkeypatch.setattr(KeptStates, "_compute", lambda self, rows: (seen.extend(rows.tolist()), compute(self, rows)))
    train(lm, data(), config(steps=20), tmp_path / "run")
    assert sorted(seen) == list(range(len(data().train)))
    assert not list((tmp_path / "run").glob("states*"))


@pytest.mark.parametrize("trainable", ["exits", "drafter"])
def test_a_run_that_is_refused_leaves_nothing_in_the_others_folder(tmp_path, trainable):
    options = {"trainable": trainable, "layers": (1, 3) if trainable == "exits" else None}
    train(model(), data(), config(steps=20, **options), tmp_path)
    there = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="steps was 20 and is now 30"):
        train(model(), data(), config(steps=30, **options), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == there


def test_where_nothing_is_kept(tmp_path):
    lm = model()

    def kept(workers=ALONE, **options):
        return KeptStates.of(lm.split, data().train, (1, 4), config(**options), tmp_path, workers)

    assert kept() is not None
    assert kept(steps=None, tokens=10**6) is not None
    for options in ({"trainable": "all"}, {"steps": 6}, {"prompt_layer": 2}, {"steps": None, "tokens": 100}):
        assert kept(**options) is None, options
    assert kept(SimpleNamespace(num_processes=2)) is None
