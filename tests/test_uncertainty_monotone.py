"""Conditionally monotone predictors: what they promise, and how violations of it are counted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.uncertainty.monotone import DELTAS, ProductConfig, caching_anytime, product_anytime, violations


def logits_of(seed, exits=4, rows=12, classes=5, strength=2.0):
    random = torch.Generator().manual_seed(seed)
    return strength * torch.randn(exits, rows, classes, generator=random)


seeds = st.integers(0, 100_000)
configs = st.sampled_from([
    ProductConfig(),
    ProductConfig(weights=(0.25, 0.5, 0.75, 1.0)),
    ProductConfig(threshold=0.5, centre=False),
    ProductConfig(softplus=True),
    ProductConfig(most=1.0, fall_back=False),
])  # fmt: skip


@pytest.mark.parametrize("config", [ProductConfig(), ProductConfig(weights=(0.5, 1.0, 2.0), most=2.5)])
def test_products_against_a_loop(config):
    logits = logits_of(0, exits=3).double()
    got = product_anytime(logits, config)
    for n in range(12):
        products = [1.0] * 5
        for e in range(3):
            centred = logits[e, n] - logits[e, n].mean()
            power = 1.0 if config.weights is None else config.weights[e]
            most = math.inf if config.most is None else config.most
            products = [p * min(max(float(z), 0.0), most) ** power for p, z in zip(products, centred, strict=True)]
            fallen = sum(products) == 0
            assert bool(got.fallen_back[e, n]) == fallen
            expected = centred.softmax(0) if fallen else torch.tensor(products).double() / sum(products)
            torch.testing.assert_close(got.probabilities[e, n], expected)


@given(seeds, configs)
@settings(max_examples=40, deadline=None)
def test_products_are_probabilities_and_a_winner_throughout_never_falls(seed, config):
    logits = logits_of(seed)
    logits[:, :6, 2] = logits[:, :6].amax(dim=-1) + 0.1  # at every exit class 2 is ahead
    got = product_anytime(logits, config)
    torch.testing.assert_close(got.probabilities.sum(-1), torch.ones(4, 12).double())
    two = got.probabilities[:, :6, 2]
    keep = ~got.fallen_back[:, :6].any(dim=0)
    assert bool((two.diff(dim=0) >= -1e-12)[:, keep].all())


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_what_has_no_evidence_once_never_comes_back(seed):
    got = product_anytime(logits_of(seed))
    gone = got.probabilities == 0
    ours = ~got.fallen_back[1:]
    assert bool((gone[1:] >= gone[:-1])[ours].all())
    assert bool((got.fallen_back[1:] >= got.fallen_back[:-1]).all())


@given(seeds, st.floats(-50, 50), configs.filter(lambda config: config.centre))
@settings(max_examples=25, deadline=None)
def test_the_offset_of_logits_does_not_matter(seed, offset, config):
    logits = logits_of(seed).double()
    torch.testing.assert_close(
        product_anytime(logits + offset, config).probabilities, product_anytime(logits, config).probabilities,
        rtol=1e-6, atol=1e-8,
    )  # fmt: skip


def test_softplus_never_falls_back():
    assert not bool(product_anytime(logits_of(3, exits=12), ProductConfig(softplus=True)).fallen_back.any())
    assert bool(product_anytime(logits_of(3, exits=12)).fallen_back.any())


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_caching_keeps_the_most_confident_so_far(seed):
    probabilities = logits_of(seed).softmax(-1)
    probabilities[2, :4] = probabilities[1, :4].flip(-1)  # as confident in another class
    got = caching_anytime(probabilities)
    for n in range(12):
        best = 0
        for e in range(4):
            if probabilities[e, n].max() >= probabilities[best, n].max():
                best = e
            assert torch.equal(got[e, n], probabilities[best, n])
    assert bool((got.amax(-1).diff(dim=0) >= 0).all())


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_violations_against_all_pairs(seed):
    probabilities = logits_of(seed).softmax(-1)
    labels = torch.arange(12) % 5
    got = violations(probabilities, labels)
    true = [[float(probabilities[e, n, labels[n]]) for e in range(4)] for n in range(12)]
    for delta in DELTAS:
        falls = [any(p[i] - p[j] > delta for i in range(4) for j in range(i, 4)) for p in true]
        assert got[delta] == pytest.approx(sum(falls) / 12)


def test_both_violate_less_than_plain_exits():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(8, (2000,), generator=random)
    strength = torch.linspace(1, 3, 6)[:, None, None]
    logits = torch.randn(6, 2000, 8, generator=random) + strength * torch.nn.functional.one_hot(labels, 8)
    plain = violations(logits.softmax(-1), labels)
    product = violations(product_anytime(logits).probabilities, labels)
    caching = violations(caching_anytime(logits.softmax(-1)), labels)
    assert product[0.2] < plain[0.2] / 2
    assert caching[0.2] < plain[0.2]


def test_one_exit_and_no_rows():
    logits = logits_of(1, exits=1)
    centred = (logits - logits.mean(-1, keepdim=True)).double().clamp(min=0)
    torch.testing.assert_close(product_anytime(logits).probabilities, centred / centred.sum(-1, keepdim=True))
    assert torch.equal(caching_anytime(logits), logits)
    assert math.isnan(violations(torch.ones(2, 0, 3), torch.zeros(0, dtype=torch.int64))[0.1])


def test_wrong_input():
    with pytest.raises(ValueError, match="2 weights are given for 4 exits"):
        product_anytime(logits_of(0), ProductConfig(weights=(1.0, 1.0)))
    with pytest.raises(ValueError, match="threshold is -1"):
        ProductConfig(threshold=-1.0)
    with pytest.raises(ValueError, match="must be positive"):
        ProductConfig(weights=(1.0, 0.0))
