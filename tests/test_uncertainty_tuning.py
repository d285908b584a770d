"""Temperature, ensemble and grids against derivatives, loops and enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exit_rows import make_rows
from offramp.uncertainty import predictive, tuning
from offramp.uncertainty.predictive import Plain

# ---------------------------------------------------------------- temperature


def nlpd(rows, exit=0):
    plain = Plain(rows.logits[exit])
    return lambda t: -float(plain.log_probabilities(rows.labels, t).mean())


@pytest.mark.parametrize("sharp", [0.5, 3.0, 10.0])
def test_the_best_temperature_has_no_derivative(sharp):
    rows = make_rows(sharp=sharp)
    found = tuning.search_temperature(nlpd(rows))
    log_t = torch.tensor(math.log(found.temperature), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(rows.logits[0].double() / log_t.exp(), rows.labels)
    (slope,) = torch.autograd.grad(loss, log_t)
    assert abs(float(slope)) < 1e-5
    assert not found.at_edge
    assert found.loss == pytest.approx(loss.item(), abs=1e-12)
    # Logits that are s times as sharp want s times the temperature.
    twice = tuning.search_temperature(lambda t: nlpd(rows)(t / 2))
    assert twice.temperature == pytest.approx(2 * found.temperature, rel=1e-4)


def test_an_optimum_beyond_the_bounds_is_at_an_edge():
    rows = make_rows(sharp=100.0)
    found = tuning.search_temperature(nlpd(rows))
    assert found.temperature == pytest.approx(tuning.HIGHEST, rel=1e-3)
    assert found.at_edge
    assert tuning.search_temperature(nlpd(make_rows()), (1.0, 1.1)).at_edge


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=10, max_size=10))
def test_between_equals_the_smallest_change_wins(losses):
    table = dict(zip(tuning.MERONEN_TEMPERATURES, losses, strict=True))
    found = tuning.search_temperature(table.__getitem__, tuning.MERONEN_TEMPERATURES)
    best = [t for t in table if table[t] == min(losses)]
    assert found.temperature in best
    assert abs(math.log(found.temperature)) == min(abs(math.log(t)) for t in best)
    assert dict(found.tried) == table


def test_of_equal_settings_the_smallest_prior_variance_wins():
    flat = lambda omega: lambda t: torch.full((2,), -abs(math.log(t)))  # noqa: E731
    found = tuning.tune(flat, tuning.Space((0.5, 1.0, 2.0), (0.7, 1.3, 3.0)))
    assert (found.temperature, found.omega) == (1.0, 0.7)
    assert len(found.surface) == 9
    assert found.edges == ("its prior variance, 0.7, is at an end of what was looked at",)


def test_the_best_pair_is_that_of_the_whole_grid():
    random = torch.Generator().manual_seed(0)
    space = tuning.with_prior("meronen")
    table = {(o, t): torch.rand(4, generator=random) for o in space.omegas for t in space.temperatures}
    found = tuning.tune(lambda omega: lambda t: -table[omega, t], space)
    best = min(table, key=lambda pair: float(table[pair].mean()))
    assert (found.omega, found.temperature) == best
    assert len(found.surface) == 100
    assert found.nlpd == pytest.approx(float(table[best].mean()))
    assert torch.equal(found.losses, table[best])


# ---------------------------------------------------------------- ensemble


def test_an_ensemble_is_the_weighted_mean_so_far():
    p = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    costs = torch.tensor([1.0, 2.0, 5.0, 8.0])
    carried = logs = None
    for e in range(4):
        found, carried = predictive.ensemble_join(p[e], carried, predictive.ensemble_weights(costs), e)
        expected = sum(float(costs[i]) * p[i] for i in range(e + 1)) / float(costs[: e + 1].sum())
        torch.testing.assert_close(found, expected)
        log, logs = predictive.ensemble_join_logarithms(p[e].log(), logs, predictive.ensemble_weights(costs), e)
        torch.testing.assert_close(log.exp(), expected)
    with pytest.raises(ValueError, match="must be positive"):
        predictive.ensemble_weights(torch.tensor([0.0, 1.0]))


def test_greedy_tuning_is_that_of_a_loop_over_the_grid():
    rows = make_rows(exits=3)
    space, weights = tuning.Space(tuning.MERONEN_TEMPERATURES), predictive.ensemble_weights(rows.costs)

    def predict(exit, omega):
        return lambda t: Plain(rows.logits[exit]).log_probabilities(rows.labels, t)

    found = tuning.tune_all(predict, 3, space, weights)
    frozen = []
    for e in range(3):

        def loss(t, e=e):
            ps = [(rows.logits[i].double() / s).softmax(-1) for i, s in enumerate([*frozen[:e], t])]
            mean = sum(w * p for w, p in zip(weights, ps, strict=False)) / weights[: e + 1].sum()
            return -float(mean[torch.arange(rows.rows), rows.labels].log().mean())

        frozen.append(min(tuning.MERONEN_TEMPERATURES, key=loss))
        assert found[e].temperature == frozen[e]
        assert found[e].nlpd == pytest.approx(loss(frozen[e]), abs=1e-12)
    alone = tuning.tune_all(predict, 3, space, None)
    assert [a.temperature for a in alone] != frozen  # the ensemble made a difference


# ---------------------------------------------------------------- is it worth it?


def test_comparison_is_paired():
    base = torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64)
    steady = tuning.compare(base + 2, base + 0.1 + torch.tensor([0.0, 0.01, 0.0, 0.01]).double(), base)
    assert steady.vanilla == pytest.approx(6.25)
    assert steady.gain == pytest.approx(0.105)
    assert steady.error == pytest.approx(0.01 / math.sqrt(12))  # variance 1/3 of .01^2, over 4
    assert steady.better
    assert "Laplace is better" in steady.words()
    noisy = tuning.compare(base, base + torch.tensor([1.0, -1.0, 1.0, -0.9]), base)
    assert not noisy.better
    assert "Laplace was not shown to be better or worse than temperature" in noisy.words()
    slight = tuning.Comparison(1.0, 1.0, gain=0.015, error=0.01)  # more than one standard error says nothing yet
    assert not slight.better
    assert "(-0.0046 to 0.0346)" in slight.words()
    assert "Laplace is worse" in tuning.Comparison(1.0, 1.0, gain=-0.03, error=0.01).words()
    assert not tuning.compare(base, base, base).better
