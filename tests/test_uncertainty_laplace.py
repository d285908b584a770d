"""Last-layer Laplace against dense matrices, loops, plain sampling of weights, and laplace-torch."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.uncertainty.laplace import Exact, Factored, Factors, damping
from offramp.uncertainty.predictive import Noisy, Plain, Shrunk, draws

DAMPINGS = ("factored", "exact")
D, C = 5, 4


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_factors(n=30, bias=True):
    return Factors.empty(D, C, bias=bias).update(random(n, D), 2 * random(n, C, seed=1))


def noisy(damped, features, logits, n=50, memory=2**28):
    return Noisy(logits, damped.spread(features).sqrt(), damped.directions(draws(n, C, 0)), damped, memory)


# ---------------------------------------------------------------- factors


def test_of_one_row_the_product_of_the_factors_is_the_dense_ggn():
    # J^T (diag p - p p^T) J by automatic differentiation over all weights and biases, [m C, m C].
    feature, weights = random(D), random(D + 1, C, seed=1)

    def logits(flat):
        return torch.cat([feature, feature.new_ones(1)]) @ flat.reshape(D + 1, C)

    z = logits(weights.flatten())
    jacobian = torch.autograd.functional.jacobian(logits, weights.flatten())
    hessian = torch.autograd.functional.hessian(lambda z: torch.logsumexp(z, 0), z)
    found = Factors.empty(D, C).update(feature[None], z[None])
    torch.testing.assert_close(torch.kron(found.features, found.classes), jacobian.T @ hessian @ jacobian)


def test_factors_against_a_loop_over_rows():
    features, logits = random(7, D), random(7, C, seed=1)
    a, g = torch.zeros(D + 1, D + 1).double(), torch.zeros(C, C).double()
    for f, z in zip(features, logits, strict=True):
        f, p = torch.cat([f, torch.ones(1)]), z.softmax(0)
        a += torch.outer(f, f)
        g += torch.diag(p) - torch.outer(p, p)
    found = Factors.empty(D, C).update(features, logits)
    torch.testing.assert_close(found.features, a, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.classes, g, rtol=1e-13, atol=1e-13)
    assert found.rows == 7
    assert found.classes.sum(0).abs().max() < 1e-14  # nothing is known of what all logits have in common


@given(st.permutations(range(12)), st.integers(0, 12))
def test_streamed_merged_and_permuted_factors_are_those_of_one_batch(order, cut):
    features, logits = random(12, D), 3 * random(12, C, seed=1)
    whole = Factors.empty(D, C).update(features, logits)
    first, second = (Factors.empty(D, C).update(features[p], logits[p]) for p in (order[:cut], order[cut:]))
    for found in (first.merge(second), first.update(features[order[cut:]], logits[order[cut:]])):
        assert found.rows == 12
        torch.testing.assert_close(found.features, whole.features, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.classes, whole.classes, rtol=1e-12, atol=1e-12)


def test_a_row_that_is_not_finite_is_named():
    features, logits = random(6, D), random(6, C)
    seen = Factors.empty(D, C).update(features, logits)
    features[2, 1] = math.nan
    with pytest.raises(ValueError, match="row 8 of the features holds nan"):
        seen.update(features, logits)
    logits[4, 0] = -math.inf
    with pytest.raises(ValueError, match="row 10 of the logits holds -inf"):
        seen.update(features[3:][[0] * 4 + [1, 2]], logits)


# ---------------------------------------------------------------- damping


def dense_covariance(factors, kind, omega, evidence=1.0):
    """Of all weights, [m C, m C], from the formulas."""
    n = factors.rows * evidence
    a, g = factors.features / factors.rows, factors.classes / factors.rows
    if kind == "exact":
        return torch.linalg.inv(n * torch.kron(a, g) + torch.eye(len(a) * len(g)).double() / omega)
    v = n**0.5 * a + torch.eye(len(a)).double() / omega**0.5
    u = n**0.5 * g + torch.eye(len(g)).double() / omega**0.5
    return torch.linalg.inv(torch.kron(v, u))


def logit_covariance(factors, kind, omega, features, evidence=1.0):
    """[B, C, C]."""
    weights = dense_covariance(factors, kind, omega, evidence)
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1) if factors.bias else features
    jacobians = [torch.kron(f[None], torch.eye(C)) for f in inputs]  # [C, m C]
    return torch.stack([jacobian @ weights @ jacobian.T for jacobian in jacobians])


@pytest.mark.parametrize("kind", DAMPINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("omega", [0.01, 1.0, 50.0])
def test_noise_has_the_covariance_of_the_dense_hessian(kind, bias, omega):
    factors, features = some_factors(bias=bias), random(3, D, seed=2)
    damped = damping(factors, kind, evidence=0.5)(omega)
    spread = damped.spread(features)
    # One unit draw per class: the noises are the columns of a root of the covariance.
    columns = damped.noise(spread.sqrt(), damped.directions(torch.eye(C).double()))  # [C, B, C]
    found = torch.einsum("lbi,lbj->bij", columns, columns)
    expected = logit_covariance(factors, kind, omega, features, evidence=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    centring = torch.eye(C).double() - 1 / C
    variances = (centring @ expected @ centring).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(spread @ damped.centred(), variances, rtol=1e-9, atol=1e-12)
    if kind == "factored":
        v = damped.feature_root @ damped.feature_root.T
        f = torch.cat([features, torch.ones(3, 1)], 1) if bias else features
        torch.testing.assert_close(spread[:, 0], torch.einsum("bi,ij,bj->b", f.double(), v.inverse(), f.double()))


def test_factors_and_functional_variance_are_those_of_laplace_torch():
    oracle = json.loads((Path(__file__).parent / "oracles" / "laplace_torch.json").read_text())
    features, logits, new, a, g, expected = (
        torch.tensor(oracle[name], dtype=torch.float64)
        for name in ("features", "logits", "new_features", "A", "G", "functional_variances")
    )
    weights = Factors.empty(features.shape[1], logits.shape[1], bias=False).update(features, logits)
    torch.testing.assert_close(weights.features / weights.rows, a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights.classes / weights.rows, g, rtol=1e-9, atol=1e-9)
    # It takes the bias as a block of its own: a head without features.
    biases = Factors.empty(0, logits.shape[1]).update(features[:, :0], logits)
    for omega, variance in zip(oracle["prior_variances"], expected, strict=True):
        found = 0
        for factors, inputs in ((weights, new), (biases, new[:, :0])):
            damped = damping(factors, "exact")(omega)
            v = damped.spread(inputs)
            found = found + torch.einsum("ic,bc,jc->bij", damped.class_basis, v, damped.class_basis)
        torch.testing.assert_close(found, variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", DAMPINGS)
def test_without_prior_variance_the_mean_is_the_softmax(kind):
    damped = damping(some_factors(), kind)(1e-14)
    features, logits = random(6, D, seed=3), 4 * random(6, C, seed=4)
    expected = Plain(logits).probabilities(1.5)
    torch.testing.assert_close(noisy(damped, features, logits).probabilities(1.5), expected, rtol=0, atol=1e-5)
    shrunk = Shrunk(logits, damped.spread(features) @ damped.centred())
    torch.testing.assert_close(shrunk.probabilities(1.5), expected, rtol=0, atol=1e-9)


def test_a_singular_factor_gets_a_jitter_that_is_told():
    # Fewer rows than features, and a prior variance so large that it does not hold up the rest.
    features = random(3, D)
    factors = Factors.empty(D, C).update(1e4 * features, random(3, C))
    damped = damping(factors, "factored", name="exit 2")(1e30)
    assert 0 < damped.jitters[0] <= 1e-4
    assert damped.spread(features).isfinite().all()


# ---------------------------------------------------------------- means over draws


@pytest.mark.parametrize("kind", DAMPINGS)
def test_mean_is_that_over_heads_sampled_from_the_dense_posterior(kind):
    factors, features, omega, temperature = some_factors(), random(2, D, seed=2), 2.0, 1.3
    head = random(D + 1, C, seed=5)
    inputs = torch.cat([features, torch.ones(2, 1)], 1)
    logits = inputs @ head
    number = 100_000
    root = torch.linalg.cholesky(dense_covariance(factors, kind, omega))
    heads = head.flatten() + random(number, len(root), seed=6) @ root.T
    sampled = torch.einsum("bm,nmc->nbc", inputs, heads.reshape(number, D + 1, C)).div(temperature).softmax(-1)
    damped = damping(factors, kind)(omega)
    found = noisy(damped, features, logits, n=number).probabilities(temperature)
    error = sampled.std(0) * math.sqrt(2 / number)
    assert ((found - sampled.mean(0)).abs() < 4 * error).all()
    assert ((found - logits.div(temperature).softmax(-1)).abs() > 10 * error).any()  # the noise matters here


@pytest.mark.parametrize("kind", DAMPINGS)
def test_chunks_batches_and_order_change_nothing(kind):
    damped = damping(some_factors(), kind)(2.0)
    features, logits = random(40, D, seed=3), 4 * random(40, C, seed=4)
    labels = logits.argmin(1)
    whole = noisy(damped, features, logits)
    expected, moments = whole.probabilities(1.2), whole.moments(1.2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for memory in (1, 500, 5000):
        small = noisy(damped, features, logits, memory=memory)
        torch.testing.assert_close(small.probabilities(1.2), expected, rtol=1e-12, atol=1e-15)
        for found, value in zip(small.moments(1.2), moments, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-13)
        rows = noisy(damped, features[order], logits[order], memory=memory).probabilities(1.2)
        torch.testing.assert_close(rows, expected[order], rtol=1e-12, atol=1e-15)
        own = small.log_probabilities(labels, 1.2)
        torch.testing.assert_close(own, expected.gather(1, labels[:, None]).squeeze(1).log(), rtol=1e-10, atol=1e-12)
    one = torch.cat([noisy(damped, features[i : i + 1], logits[i : i + 1]).probabilities(1.2) for i in range(40)])
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-15)


def test_work_stays_within_memory():
    damped = damping(some_factors(), "factored")(2.0)
    rows = noisy(damped, random(300, D), random(300, C), n=1000, memory=64 * 1024)
    sizes = [x.numel() * 8 for _, _, x in rows.samples(1.0)]
    assert max(sizes) <= 16 * 1024
    assert sum(sizes) == 1000 * 300 * C * 8


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("kind", DAMPINGS)
def test_no_answer_takes_more_than_memory(kind):
    memory = 64 * 1024  # all draws of one number per row would be 2.4 MB
    rows = noisy(damping(some_factors(), kind)(2.0), random(300, D), random(300, C), n=1000, memory=memory)
    labels = torch.zeros(300, dtype=torch.int64)
    for ask in (rows.probabilities, rows.moments, lambda t: rows.log_probabilities(labels, t)):
        with Largest() as largest:
            ask(1.3)
        assert 0 < largest.bytes <= memory


def test_moments_against_all_samples_at_once():
    damped = damping(some_factors(), "factored")(2.0)
    features, logits = random(6, D, seed=3), 2 * random(6, C, seed=4)
    rows = noisy(damped, features, logits)
    p = ((logits + damped.noise(rows.root, rows.directions)) / 1.2).softmax(-1)  # [n, B, C]
    mean, entropy, variance = rows.moments(1.2)
    torch.testing.assert_close(mean, p.mean(0))
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean(0))
    torch.testing.assert_close(variance, p.var(0, correction=0).sum(-1))


# ---------------------------------------------------------------- probit


@pytest.mark.parametrize("kind", DAMPINGS)
def test_probit_is_near_the_mean_over_draws(kind):
    # Where the noise that all logits share is large, the plain probit (variances not centred) is far off.
    classes = 20
    factors = Factors.empty(D, classes).update(random(200, D), 3 * random(200, classes, seed=1))
    damped = damping(factors, kind)(20.0)
    features, logits = 2 * random(100, D, seed=2), 3 * random(100, classes, seed=3)
    spread, directions = damped.spread(features), damped.directions(draws(5000, classes, 0))
    mean = Noisy(logits, spread.sqrt(), directions, damped, 2**28).probabilities(1.0).amax(1)
    shrunk = Shrunk(logits, spread @ damped.centred()).probabilities(1.0).amax(1)
    noise = damped.noise(spread.sqrt(), directions)
    plain = (logits / (1 + math.pi / 8 * noise.var(0)).sqrt()).softmax(1).amax(1)
    far, near = ((plain - mean).abs().mean(), (shrunk - mean).abs().mean())
    assert near < 0.03
    assert near < far
    assert (Plain(logits).probabilities(1.0).amax(1) - mean).abs().mean() > near


@given(st.floats(-1e4, 1e4), st.integers(0, 100), st.sampled_from(DAMPINGS))
def test_anchored_probit_keeps_the_argmax_and_ignores_offsets(offset, seed, kind):
    damped = damping(some_factors(), kind)(20.0)
    features, logits = 10 * random(8, D, seed=seed), 3 * random(8, C, seed=seed + 1)
    variance = damped.spread(features) @ damped.centred()
    found = Shrunk(logits + offset, variance).probabilities(0.7)
    assert (found.argmax(1) == logits.argmax(1)).all()
    torch.testing.assert_close(found, Shrunk(logits, variance).probabilities(0.7), rtol=1e-6, atol=1e-8)


def test_kinds_of_damping_have_their_types():
    assert isinstance(damping(some_factors(), "factored")(1.0), Factored)
    assert isinstance(damping(some_factors(), "exact")(1.0), Exact)
