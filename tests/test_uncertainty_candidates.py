"""The posterior over candidate rows of a head: against dense matrices, the trained head, and the design's own check."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.uncertainty import candidates as tl
from offramp.uncertainty.candidates import LaplaceConfig, Shortlist, log_likelihood, rows_of, shortlist, standard_draws
from offramp.uncertainty.laplace import Factors, damping
from offramp.uncertainty.predictive import Noisy
from offramp.uncertainty.tuning import temperature_alone, tune_tokens

SETTINGS = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def data(rows=40, width=4, vocabulary=6, seed=0, scale=1.5):
    """Readout inputs, a head, and the logits, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    w = scale * torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    return x, w, x @ w.T


def fitted(x, z, omega=2.0, draws=None, whole=False, bias=False, **options):
    config = LaplaceConfig(evidence=1.0, **options)
    factors = Factors.empty(x.shape[1], z.shape[1], bias=bias, diagonal=not whole)
    for part, logits in zip(x.split(7), z.split(7), strict=True):
        factors = factors.update(part, logits)
    draws = standard_draws(config, z.shape[1]) if draws is None else draws
    return tl.fit(factors, omega, draws, config), factors


def dense(x, z, omega, query):
    """s(φ)·Ũ⁻¹ from Hessians of single tokens by autograd, without any formula for them, [k, k]."""
    n = len(x)
    a = sum(torch.outer(f, f) for f in x) / n

    def loss(logits):
        return torch.logsumexp(logits, 0)  # its Hessian is that of the cross-entropy

    g = sum(torch.autograd.functional.hessian(loss, row) for row in z) / n
    v = math.sqrt(n) * a + torch.eye(len(a), dtype=torch.float64) * omega**-0.5
    u = math.sqrt(n) * g + torch.eye(len(g), dtype=torch.float64) * omega**-0.5
    return query @ torch.linalg.inv(v) @ query * torch.linalg.inv(u)


def test_mean_probabilities_equal_brute_force_over_the_dense_covariance():
    x, w, z = data(scale=0.5)
    g = torch.Generator().manual_seed(3)
    draws = torch.randn(100_000, 6, generator=g, dtype=torch.float64)
    state, _ = fitted(x, z, omega=20.0, draws=draws, whole=True)
    query = torch.tensor([[0.4, -1.0, 0.3, 2.0]], dtype=torch.float64)
    logits = query @ w.T
    short = shortlist(logits, 6)
    p, rest = tl.predictive(state, query, short)
    assert rest.tolist() == [0]
    covariance = dense(x, z, 20.0, query[0])
    noise = torch.randn(100_000, 6, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    expected = (logits + noise).softmax(-1).mean(0)[short.ids[0]]
    torch.testing.assert_close(p[0], expected, atol=4e-3, rtol=0)
    assert (logits.softmax(-1)[0, short.ids[0]] - expected).abs().max() > 0.03, "the noise should matter here"


def test_the_diagonal_is_that_of_the_hessian():
    x, _, z = data()
    state, _ = fitted(x, z)
    query = torch.randn(4, dtype=torch.float64)
    full = dense(x, z, 2.0, query)  # its inverse's diagonal holds Ũ's
    precision = torch.linalg.inv(full).diagonal() * tl.distance(state, query[None])
    torch.testing.assert_close(state.spread**-2, precision, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_that_are_all_candidates_are_rows_of_as_many_classes(whole):
    """Two ways to the same mean: draws of a few gathered tokens, and chunks of all classes."""
    x, w, z = data(vocabulary=12)
    state, factors = fitted(x, z, bias=True, whole=whole)
    query, logits = x[:5] + 0.3, (x[:5] + 0.3) @ w.T
    damped = damping(factors, "factored")(2.0)
    draws = standard_draws(LaplaceConfig(), 12).double()
    rows = Noisy(logits, damped.spread(query).sqrt(), damped.directions(draws), damped, 2**20)
    short = shortlist(logits, 12)
    p, rest = tl.predictive(state, query, short)
    torch.testing.assert_close(p, rows.probabilities(1.0).gather(1, short.ids))
    assert rest.tolist() == [0.0] * 5
    target = torch.arange(5)
    found = log_likelihood(rows_of(query, logits, short, target), [1.0, 1.7], state)
    torch.testing.assert_close(found[1], rows.log_probabilities(target, 1.7))


def test_a_diagonal_is_that_of_the_whole_factor():
    x, _, z = data()
    whole, diagonal = fitted(x, z, whole=True)[1], fitted(x, z)[1]
    torch.testing.assert_close(diagonal.classes, whole.classes.diagonal())
    torch.testing.assert_close(diagonal.features, whole.features)


@SETTINGS
@given(st.integers(0, 10_000))
def test_draws_belong_to_tokens_not_to_ranks(seed):
    x, w, z = data(vocabulary=12, seed=seed)
    state, _ = fitted(x, z)
    query = x[:3]
    short = shortlist(query @ w.T, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = Shortlist(short.ids[:, order], short.logits[:, order], short.rest)
    p, rest = tl.predictive(state, query, short)
    q, other = tl.predictive(state, query, moved)
    torch.testing.assert_close(p[:, order], q)
    torch.testing.assert_close(rest, other)
    torch.testing.assert_close(tl.gap(state, query, short), tl.gap(state, query, moved))
    torch.testing.assert_close(p.sum(-1) + rest, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("whole", [False, True])
def test_without_prior_variance_it_is_the_softmax_gap(whole):
    x, w, z = data(vocabulary=12)
    state, _ = fitted(x, z, omega=1e-24, whole=whole)
    query = torch.randn(9, 4, dtype=torch.float64)
    logits = query @ w.T
    top = logits.softmax(-1).topk(2).values
    for k in (2, 5, 12):
        torch.testing.assert_close(tl.gap(state, query, shortlist(logits, k)), top[:, 0] - top[:, 1], atol=1e-9, rtol=0)


def test_more_prior_variance_makes_it_less_sure():
    x, w, z = data(vocabulary=12)
    gaps = [tl.gap(fitted(x, z, omega=o, draws=None)[0], x, shortlist(z, 12)).mean() for o in (1e-6, 1.0, 1e4)]
    assert gaps[0] > gaps[1] > gaps[2]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_distances_are_exact_where_the_spectrum_allows_it(rank):
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(200, 5, dtype=torch.float64)
    x[:, 0] = 3 * torch.randn(200, generator=g)
    z = torch.randn(200, 6, generator=g, dtype=torch.float64)
    query = torch.randn(7, 5, generator=g, dtype=torch.float64)
    exact, low = fitted(x, z)[0], fitted(x, z, rank=rank)[0]
    torch.testing.assert_close(tl.distance(low, query), tl.distance(exact, query))
    assert tl.size(low) == 5 * rank


def test_a_bias_of_the_head_is_one_more_weight():
    x, _, z = data()
    state, _ = fitted(x, z, bias=True)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    v = math.sqrt(len(x)) * (ones.T @ ones / len(x)) + torch.eye(5, dtype=torch.float64) / math.sqrt(2.0)
    expected = (ones @ torch.linalg.inv(v) * ones).sum(-1)
    torch.testing.assert_close(tl.distance(state, x), expected)


def test_streamed_permuted_and_merged_sums_are_those_of_one_batch():
    x, _, z = data()
    empty = Factors.empty(4, 6, bias=False, diagonal=True)
    whole, order = empty.update(x, z), torch.randperm(len(x))
    left = empty.update(x[order[:11]], z[order[:11]]).merge(empty.update(x[order[11:]], z[order[11:]]))
    assert left.rows == whole.rows == 40
    torch.testing.assert_close(left.features, whole.features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(left.classes, whole.classes, atol=1e-12, rtol=1e-12)


def test_a_batch_is_its_rows_and_chunks_of_draws_change_nothing(monkeypatch):
    x, _, z = data(vocabulary=12)
    state, _ = fitted(x, z)
    short = shortlist(z, 5)
    whole = tl.gap(state, x, short)
    single = torch.cat([tl.gap(state, x[i : i + 1], short.select(slice(i, i + 1))) for i in range(len(x))])
    torch.testing.assert_close(whole, single)
    monkeypatch.setattr(tl, "_BUDGET", 300)
    torch.testing.assert_close(tl.gap(state, x, short), whole)


def test_the_rest_counts_in_the_normaliser_and_as_a_rival_if_wanted():
    x, w, z = data(vocabulary=12, scale=0.2)
    config = {"omega": 1e-24}
    plain, rival = fitted(x, z, **config)[0], fitted(x, z, rest_as_rival=True, **config)[0]
    p = z.softmax(-1).sort(descending=True).values
    rest = p[:, 3:].sum(-1)
    short = shortlist(z, 3)
    torch.testing.assert_close(tl.gap(plain, x, short), p[:, 0] - p[:, 1])
    expected = (p[:, 0] - torch.maximum(p[:, 1], rest)).clamp(min=0)
    torch.testing.assert_close(tl.gap(rival, x, short), expected)
    assert (expected < p[:, 0] - p[:, 1]).all()


def test_counted_flops_are_those_of_the_formula():
    x, _, z = data()
    state = fitted(x, z)[0]
    # s: a triangular solve (m squared) and a norm (2m); then a scale and a sum per candidate and draw
    assert tl.flops(state, 5) == 4 * 4 + 2 * 4 + 2 * 5 * 20


@pytest.mark.parametrize(
    ("change", "message"), [({"draws": 0}, "draws is 0"), ({"evidence": 0.0}, "evidence is 0"), ({"rank": 0}, "rank")]
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        LaplaceConfig(**change)


def test_bad_input_is_named():
    x, _, z = data()
    x[3, 1] = math.nan
    empty = Factors.empty(4, 6, diagonal=True)
    with pytest.raises(ValueError, match="row 3 of the features holds nan"):
        empty.update(x, z)
    with pytest.raises(ValueError, match="no tokens to fit"):
        tl.fit(empty, 1.0, torch.zeros(2, 6), LaplaceConfig())


# ------------------------------------------------------------ the check of the design, section 17.1, at V = 2000


def ranks(values):
    return values.argsort().argsort().double()


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def test_the_best_64_tokens_with_a_diagonal_rank_like_all_2000_with_a_whole_factor():
    g = torch.Generator().manual_seed(0)
    vocabulary, width, rows = 2000, 32, 2000
    w = torch.randn(vocabulary, width, generator=g) * 0.5
    x = torch.randn(rows, width, generator=g) * torch.linspace(0.3, 2, width)
    config = LaplaceConfig(draws=100, evidence=1.0)
    draws = standard_draws(config, vocabulary)
    whole, diagonal = (Factors.empty(width, vocabulary, bias=False, diagonal=kind) for kind in (False, True))
    for part in x.split(500):
        whole, diagonal = (factors.update(part, part @ w.T) for factors in (whole, diagonal))
    full = tl.fit(whole, 2.0, draws, config).single()
    simple = tl.fit(diagonal, 2.0, draws, config).single()
    query = torch.randn(120, width, generator=g) * torch.linspace(0.3, 2, width)
    z = query @ w.T
    reference = tl.gap(full, query, shortlist(z, vocabulary))
    short = tl.gap(simple, query, shortlist(z, 64))
    assert correlation(short, reference) > 0.985
    assert short.mean().item() == pytest.approx(reference.mean().item(), abs=0.02)
    softmax = tl.gap(tl.fit(diagonal, 1e-20, draws, config).single(), query, shortlist(z, 64))
    assert (softmax - reference).abs().mean() > 2 * (short - reference).abs().mean()


# ------------------------------------------------------------ tuning


def overconfident(seed=0, rows=600, factor=3.0):
    """Tokens drawn from a head, judged by logits that are `factor` times too large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=g)
    w = torch.randn(9, 4, generator=g)
    target = torch.multinomial((x @ w.T).softmax(-1), 1, generator=g)[:, 0]
    return x, factor * x @ w.T, target


def test_the_likelihood_of_tokens_inside_and_outside_the_candidates_is_that_of_the_softmax():
    x, z, target = overconfident()
    expected = z.log_softmax(-1).gather(1, target[:, None])[:, 0].clamp(min=math.log(1e-12))
    for k in (2, 5, 9):
        rows = rows_of(x, z, shortlist(z, k), target)
        torch.testing.assert_close(log_likelihood(rows, [1.0])[0], expected, atol=1e-5, rtol=1e-4)


def test_a_token_that_was_not_scored_has_the_smallest_likelihood():
    z = torch.tensor([[3.0, 2.0, -math.inf, 0.0]])
    rows = rows_of(torch.zeros(1, 2), z, shortlist(z, 2), torch.tensor([2]))
    assert log_likelihood(rows, [1.0, 2.0]).tolist() == [[math.log(1e-12)]] * 2 or torch.allclose(
        log_likelihood(rows, [1.0, 2.0]), torch.full((2, 1), math.log(1e-12))
    )


def test_a_temperature_alone_finds_the_factor():
    x, z, target = overconfident(rows=4000)
    rows = rows_of(x, z, shortlist(z, 9), target)
    best = temperature_alone(rows)
    assert best == pytest.approx(3.0, rel=0.1)
    around = [float(-log_likelihood(rows, [t]).mean()) for t in (0.97 * best, best, 1.03 * best)]
    assert around[1] <= min(around)


def test_tuning_takes_the_smallest_nlpd_of_its_surface_and_says_where_it_lies():
    x, z, target = overconfident()
    rows = rows_of(x, z, shortlist(z, 9), target)
    config = LaplaceConfig()
    factors = Factors.empty(4, 9, bias=False, diagonal=True).update(x, z)
    draws = standard_draws(config, 9)
    state, tuned = tune_tokens(factors, rows, draws, config, priors=(0.1, 1.0, 10.0))
    assert state.temperature == tuned.temperature
    assert len(tuned.surface) == 3
    assert tuned.nlpd <= min(min(row) for row in tuned.surface) + 1e-5
    again = -float(log_likelihood(rows, [tuned.temperature], state).double().mean())
    assert tuned.nlpd == pytest.approx(again, abs=1e-6)
    assert tuned.nlpd < -float(log_likelihood(rows, [1.0]).double().mean())
    assert ("prior" in tuned.edges) == (tuned.prior in (0.1, 10.0))
    assert tuned.omega * float(x.square().sum(-1).mean()) == pytest.approx(tuned.prior, rel=1e-4)
