"""Which posterior is taken, on rows whose exits are made to be helped or harmed by each."""

import numpy as np
import pytest
import torch
from scipy import stats

from offramp.classifiers.calibrated import CANDIDATES, choose, effect, losses
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import PosteriorConfig

COSTS = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)


def rows(signal, *, scale=1.0, n=400, classes=3, seed=0, noise="own"):
    """Exits that know more or less, with logits a factor `scale` too large."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    draws = torch.randn(3, n, classes, generator=generator)
    draws = draws[:1].expand(3, -1, -1) if noise == "same" else draws
    known = torch.nn.functional.one_hot(labels, classes) * torch.tensor(signal)[:, None, None]
    # for unit noise around `signal` the log posterior is signal times the observation
    logits = (known + draws) * torch.tensor(signal)[:, None, None] * scale
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return ExitOutputs([torch.zeros(n, 1)] * 3, logits.float(), labels, COSTS, ids)


def test_honest_exits_of_very_different_strength_are_left_alone():
    """Such as those on SNLI, whose first exits are at chance: an ensemble averages them in and does harm."""
    choice = choose(PosteriorConfig("vanilla"), rows([0.05, 0.1, 3.0]))
    assert choice.method == "vanilla"
    assert choice.effects["mie+temperature"].hurts
    assert choice.effects["mie"].hurts
    assert not choice.effects["temperature"].helps
    assert "HURTS: against none it changes the NLPD of 400 rows by +" in choice.effects["mie"].words("mie")
    assert "it raises that of exit" in choice.effects["mie"].words("mie")
    assert choice.words().startswith("Posterior: vanilla, no candidate was shown to help")


def test_exits_that_are_too_sure_get_a_temperature():
    choice = choose(PosteriorConfig("vanilla"), rows([0.1, 0.3, 3.0], scale=4.0))
    assert choice.method == "temperature"
    assert choice.effects["temperature"].helps
    assert set(choice.nlpd) == set(CANDIDATES)


def test_exits_with_errors_of_their_own_get_the_ensemble():
    choice = choose(PosteriorConfig("vanilla"), rows([1.5, 1.5, 1.5], scale=3.0))
    assert choice.method == "mie+temperature"
    assert choice.nlpd["mie+temperature"] == min(choice.nlpd.values())


def test_rows_are_judged_by_posteriors_of_other_rows():
    """With a temperature per fold: a loop over folds by hand gives the same figures."""
    data = rows([1.0, 1.0, 1.0], scale=3.0, n=60)
    config = PosteriorConfig("vanilla", seed=3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    order = order[data.labels[order].argsort(stable=True)]
    found = []
    for fold in range(5):
        held_out = order[fold::5]
        rest = torch.tensor(sorted(set(range(60)) - set(held_out.tolist())))
        for e in range(3):
            temperatures = torch.logspace(-1, 2, 4000, dtype=torch.float64)
            scaled = data.logits[e][rest].double() / temperatures[:, None, None]
            nll = -scaled.log_softmax(-1)[:, torch.arange(len(rest)), data.labels[rest]].mean(-1)
            best = temperatures[nll.argmin()]
            p = (data.logits[e][held_out].double() / best).log_softmax(-1)
            found += (-p[torch.arange(len(held_out)), data.labels[held_out]]).tolist()
    assert choose(config, data).nlpd["temperature"] == pytest.approx(np.mean(found), abs=1e-4)


def test_an_effect_is_paired_and_has_the_interval_of_its_mean():
    generator = np.random.default_rng(0)
    before = generator.exponential(size=(2, 500))
    change = generator.normal([[0.02], [-0.1]], 0.3, size=(2, 500))
    found = effect(before, before + change)
    mean = change.mean(0)
    low, high = stats.t.interval(0.95, 499, mean.mean(), stats.sem(mean))
    assert found.nlpd.value == pytest.approx(mean.mean())
    assert (found.nlpd.low, found.nlpd.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))
    assert found.helps
    assert not found.hurts
    none = effect(before, before + generator.normal(0, 0.3, size=(2, 500)))
    assert "was not shown to help or to hurt" in none.words("temperature")


def test_laplace_cannot_be_chosen_from_one_split():
    with pytest.raises(ValueError, match="laplace cannot be chosen from the tune split alone; name it"):
        choose(PosteriorConfig("vanilla"), rows([1.0, 1.0, 1.0]), ("temperature", "laplace"))


def test_losses_are_negative_log_probabilities():
    data = rows([1.0, 1.0, 1.0], n=20)
    p = data.logits.double().softmax(-1)
    expected = torch.nn.functional.cross_entropy(
        data.logits.double().flatten(0, 1), data.labels.repeat(3), reduction="none"
    )
    np.testing.assert_allclose(losses(p, data.labels).ravel(), expected.numpy())
