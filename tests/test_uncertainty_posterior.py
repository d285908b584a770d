"""Fitted posteriors: real early exit equals one pass, costs are counted, files are whole, bad input is told."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exit_rows import make_rows
from offramp.uncertainty import predictive
from offramp.uncertainty.one_exit import METHODS
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import PosteriorConfig, load_posterior

FIT, TUNE, TEST = make_rows(150), make_rows(120, first=1000), make_rows(40, first=2000)
CASES = [
    *[{"method": m, "n_mc": 12} for m in METHODS],
    {"method": "mie+laplace", "n_mc": 12, "grid": "meronen"},
    {"method": "mie+laplace", "predictive": "probit"},
    {"method": "laplace", "predictive": "probit", "damping": "exact"},
    {"method": "mie+laplace", "n_mc": 12, "damping": "exact", "grid": "meronen"},
    {"method": "laplace", "n_mc": 12, "bias": False, "evidence": 0.3},
]


def fit(fit=FIT, tune=TUNE, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PosteriorConfig(**settings).fit(fit, tune)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case.values())))
def posterior(request):
    return fit(**request.param)


# ---------------------------------------------------------------- all methods


def test_leaving_exit_by_exit_gives_what_one_pass_gives(posterior):
    whole = posterior.probabilities(TEST)
    assert whole.shape == TEST.logits.shape
    torch.testing.assert_close(whole.sum(-1), torch.ones(TEST.logits.shape[:2]).double())
    left, carried = torch.arange(TEST.rows), None
    for e in range(TEST.exits):
        p, carried = posterior.at(e, TEST.features[e][left], TEST.logits[e][left], carried)
        torch.testing.assert_close(p, whole[e, left], rtol=1e-12, atol=1e-14)
        stay = torch.rand(len(left), generator=torch.Generator().manual_seed(e)) < 0.6
        left = left[stay]
        carried = None if carried is None else carried[stay]
    empty, _ = posterior.at(0, TEST.features[0][:0], TEST.logits[0][:0])
    assert empty.shape == (0, TEST.classes)


def test_memory_and_order_of_rows_change_nothing(posterior):
    whole = posterior.probabilities(TEST)
    small = replace(posterior, config=replace(posterior.config, memory=2000))
    torch.testing.assert_close(small.probabilities(TEST), whole, rtol=1e-12, atol=1e-14)
    order = torch.randperm(TEST.rows, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior.probabilities(TEST.take(order)), whole[:, order], rtol=1e-12, atol=1e-14)


def test_the_nlpd_it_reports_is_that_of_its_probabilities(posterior):
    p = posterior.probabilities(TUNE).gather(-1, TUNE.labels.expand(TUNE.exits, -1)[..., None])
    for exit, value in zip(posterior.exits, -p.log().mean((1, 2)), strict=True):
        assert exit.tuned.nlpd == pytest.approx(float(value), abs=1e-10)
        assert exit.tuned.nlpd == min(loss for _, _, loss in exit.tuned.surface)


def test_save_and_load(posterior, tmp_path):
    posterior.save(tmp_path / "state")
    loaded = load_posterior(tmp_path / "state", {"tune": TUNE.fingerprint})
    torch.testing.assert_close(loaded.probabilities(TEST), posterior.probabilities(TEST), rtol=1e-12, atol=1e-15)
    assert loaded.fingerprint == posterior.fingerprint
    assert loaded.table() == posterior.table()
    assert [loaded.overhead(e) for e in range(3)] == [posterior.overhead(e) for e in range(3)]
    if posterior.config.is_laplace:
        assert loaded.exits[1].laplace.factors.rows == FIT.rows
        assert torch.equal(loaded.exits[1].laplace.factors.classes, posterior.exits[1].laplace.factors.classes)
        assert loaded.exits[1].comparison == posterior.exits[1].comparison
    posterior.save(tmp_path / "state")  # it is replaced


class Elsewhere:
    """A tensor on another device: nothing can be worked out with it before it has come to the CPU."""

    def __init__(self, tensor, device):
        self.cpu, self.shape, self.device = lambda: tensor, tensor.shape, torch.device(device)

    def __len__(self):
        return self.shape[0]


def test_rows_may_be_on_another_device(posterior):
    here = TEST.features[0], TEST.logits[0]
    for device in ("cpu", "meta"):
        there = [Elsewhere(tensor, device) for tensor in here]
        p = posterior.at(0, *there)[0]
        assert p.device.type == device
        if device == "cpu":
            assert torch.equal(p, posterior.at(0, *here)[0])


# ---------------------------------------------------------------- cost, counted


class Number:
    """A float that counts what is done with it; comparisons are free."""

    done = 0

    def __init__(self, value):
        self.value = float(value)

    def _binary(self, other, result):
        Number.done += 1
        return Number(result(self.value, other.value))

    def __add__(self, other):
        return self._binary(other, lambda a, b: a + b)

    def __sub__(self, other):
        return self._binary(other, lambda a, b: a - b)

    def __mul__(self, other):
        return self._binary(other, lambda a, b: a * b)

    def __truediv__(self, other):
        return self._binary(other, lambda a, b: a / b)

    def apply(self, function):
        Number.done += 1
        return Number(function(self.value))


def numbers(tensor):
    return [numbers(t) for t in tensor] if tensor.ndim else Number(tensor)


def total(values):
    result, *rest = values
    for value in rest:
        result = result + value
    return result


def product(matrix, vector):
    return [total([m * v for m, v in zip(row, vector, strict=True)]) for row in matrix]


def softmax(x):
    largest = max(x, key=lambda v: v.value)
    powers = [(v - largest).apply(math.exp) for v in x]
    norm = total(powers)
    return [v / norm for v in powers]


def plain_alone(fitted, config, z):
    t = Number(fitted.temperature)
    return softmax([v / t for v in z] if "temperature" in config.method else z)


def laplace_alone(fitted, config, features, z):
    """One row at one exit, in scalars; what does not depend on the row is made before counting."""
    damped, basis, t = fitted.laplace.damped, fitted.laplace.basis, fitted.temperature
    f = [Number(v) for v in features] + ([Number(1)] if config.bias else [])
    if config.damping == "factored":
        root, solved = numbers(damped.feature_root), []
        start = Number.done
        for i, row in enumerate(root):
            left = f[i]
            for j in range(i):
                left = left - row[j] * solved[j]
            solved.append(left / row[i])
        spread = [total([v * v for v in solved])]
    else:
        turn, variance = numbers(damped.feature_basis.T), numbers(damped.variance.T)
        start = Number.done
        spread = product(variance, [v * v for v in product(turn, f)])
    done = Number.done - start
    if config.predictive == "probit":
        scaled = numbers((math.pi / 8 / t**2 * basis).T)
        one, temperature = Number(1), Number(t)
        start = Number.done
        widths = [(v + one).apply(math.sqrt) for v in product(scaled, spread)]
        largest = max(z, key=lambda v: v.value)
        result = softmax([(v - largest) / w / temperature for v, w in zip(z, widths, strict=True)])
        return result, done + Number.done - start
    directions, temperature, count = numbers(basis / t), Number(t), Number(len(basis))
    turn = None if config.damping == "factored" else numbers(damped.class_basis)
    start = Number.done
    roots = [v.apply(math.sqrt) for v in spread]
    means = [v / temperature for v in z]
    samples = []
    for g in directions:
        noise = [r * v for r, v in zip(roots * (len(g) if turn is None else 1), g, strict=True)]
        noise = noise if turn is None else product(turn, noise)
        samples.append(softmax([m + v for m, v in zip(means, noise, strict=True)]))
    result = [total(column) / count for column in zip(*samples, strict=True)]
    return result, done + Number.done - start


def test_counted_operations_and_probabilities_are_those_of_scalars(posterior):
    config, row = posterior.config, 7
    weights, carried, p = [Number(c / posterior.costs[-1]) for c in posterior.costs], None, None
    sums = [Number(c) for c in torch.cumsum(posterior.costs / posterior.costs[-1], 0)]
    whole = posterior.probabilities(TEST)
    for e, fitted in enumerate(posterior.exits):
        z = numbers(TEST.logits[e, row].double())
        if config.is_laplace:
            p, done = laplace_alone(fitted, config, TEST.features[e][row].double(), z)
        else:
            start = Number.done
            p = plain_alone(fitted, config, z)
            done = Number.done - start
        if config.is_ensemble:
            start = Number.done
            weighted = [v * weights[e] for v in p]
            carried = weighted if carried is None else [c + v for c, v in zip(carried, weighted, strict=True)]
            p = [v / sums[e] for v in carried]
            done += Number.done - start
        found = torch.tensor([v.value for v in p], dtype=torch.float64)
        torch.testing.assert_close(found, whole[e, row], rtol=1e-9, atol=1e-12)
        assert posterior.overhead(e).counted == done
        sampled = config.is_laplace and config.predictive == "mc"
        assert posterior.overhead(e).formula == (predictive.published_flops(8, 5, config.n_mc) if sampled else 0)


@pytest.mark.parametrize(("p", "c", "n"), [(1, 2, 1), (4, 3, 7), (8, 5, 50)])
def test_published_formula_is_a_quadratic_form_and_a_scale_and_sum_per_draw(p, c, n):
    m = p + 1
    matrix, f, z = numbers(torch.ones(m, m)), numbers(torch.ones(m)), numbers(torch.ones(c))
    start = Number.done
    spread = total([a * b for a, b in zip(product(matrix, f), f, strict=True)])
    for _ in range(n):
        for value in z:
            value + spread * value
    assert predictive.published_flops(p, c, n) == Number.done - start
    assert predictive.published_flops(128, 100, 50) == 43_410


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("method", ["temperature", "laplace"])
def test_ensembles_of_one_exit_or_of_equal_exits_are_that_exit(method):
    one = [
        replace(rows, features=rows.features[:1], logits=rows.logits[:1], costs=rows.costs[:1]) for rows in (FIT, TUNE)
    ]
    same = [
        replace(rows, features=[rows.features[0]] * 3, logits=rows.logits[:1].expand(3, -1, -1)) for rows in (FIT, TUNE)
    ]
    alone = fit(*one, method=method, n_mc=10, grid="meronen")
    expected = alone.probabilities(one[1])
    torch.testing.assert_close(
        fit(*one, method=f"mie+{method}", n_mc=10, grid="meronen").probabilities(one[1]), expected
    )
    # Equal exits: whatever weights, once all exits have the settings of the first.
    equal = fit(*same, method=f"mie+{method}", n_mc=10, grid="meronen")
    equal = replace(equal, exits=alone.exits * 3)
    torch.testing.assert_close(equal.probabilities(same[1]), expected.expand(3, -1, -1))


def test_laplace_beats_temperature_where_features_tell_the_noise_and_says_so():
    # Labels are noise on far features and certain on near ones, logits do not know: only s(x) tells them apart.
    random = torch.Generator().manual_seed(0)

    def rows(n, first):
        far = torch.arange(n) % 2 == 0
        labels = torch.randint(2, (n,), generator=random)
        sign = torch.where(far, torch.randint(2, (n,), generator=random), labels) * 2.0 - 1
        features = torch.stack([sign, torch.where(far, 20.0, 0.0) * torch.randn(n, generator=random).sign()], 1)
        logits = torch.stack([-2 * sign, 2 * sign], 1)[None]
        return ExitOutputs([features], logits, labels, torch.ones(1).double(), tuple(f"{first + i}" for i in range(n)))

    posterior = fit(rows(100, 0).take(torch.arange(1, 100, 2)), rows(400, 500), method="laplace", n_mc=50)
    comparison = posterior.exits[0].comparison
    assert comparison.better
    assert comparison.gain > 0.02
    assert "Laplace is better than temperature" in posterior.table()
    assert posterior.exits[0].tuned.nlpd == pytest.approx(comparison.temperature - comparison.gain)


def test_draws_follow_the_seed():
    first, second, other = (fit(method="laplace", n_mc=5, seed=s, grid="meronen") for s in (0, 0, 1))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.probabilities(TEST), second.probabilities(TEST))
    assert not torch.equal(first.draws, other.draws)
    state = torch.get_rng_state()
    fit(method="laplace", n_mc=5, grid="meronen")
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- files


def test_a_state_of_other_rows_or_another_network_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PosteriorConfig("laplace", grid="meronen", n_mc=2).fit(FIT, TUNE, network="a" * 64).save(tmp_path)
    known = {"network": "a" * 64, "fit": FIT.fingerprint, "tune": TUNE.fingerprint}
    load_posterior(tmp_path, known)
    for name in known:
        with pytest.raises(ValueError, match=f"fitted on another {name}: .* fit it again"):
            load_posterior(tmp_path, known | {name: "b" * 64})
    changed = TUNE.logits.clone()
    changed[0, 0, 0] += 1e-3
    assert replace(TUNE, logits=changed).fingerprint != TUNE.fingerprint


def test_files_that_were_changed_are_refused(tmp_path):
    fit(method="temperature").save(tmp_path / "one")
    other = fit(method="laplace", n_mc=2, grid="meronen")
    other.save(tmp_path / "two")
    with pytest.raises(ValueError, match="holds no fitted state"):
        load_posterior(tmp_path)
    file = tmp_path / "one" / "state.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"schema": "offramp/other/1"}))
    with pytest.raises(ValueError, match="has the schema 'offramp/other/1'"):
        load_posterior(tmp_path / "one")
    values["exits"][0]["temperature"] = 2.0
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not what was saved"):
        load_posterior(tmp_path / "one")
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_posterior(tmp_path / "one")
    (tmp_path / "one" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than a fitted state"):
        other.save(tmp_path / "one")
    (tmp_path / "two" / "state.safetensors").write_bytes((tmp_path / "two" / "state.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        load_posterior(tmp_path / "two")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dropout"}, "method is 'dropout'; allowed are 'vanilla'"),
        ({"damping": "none"}, "allowed are 'factored', 'exact'"),
        ({"predictive": "mean"}, "allowed are 'mc', 'probit'"),
        ({"grid": "fine"}, "allowed are None, 'meronen'"),
        ({"n_mc": 0}, "must be at least 1"),
        ({"evidence": 0.0}, r"must be in \(0, 1\]"),
        ({"memory": 0}, "a number of bytes"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PosteriorConfig(**settings)


def test_splits_must_not_share_rows_unless_told():
    config = PosteriorConfig("temperature")
    with pytest.raises(ValueError, match="say shared=True"):
        config.fit(FIT, FIT)
    with pytest.raises(ValueError, match="splits fit and tune share 10 rows"):
        config.fit(FIT, FIT.take(torch.arange(10)))
    config.fit(FIT, FIT, shared=True)


def test_rows_that_cannot_be_fitted():
    config = PosteriorConfig("laplace")
    with pytest.raises(ValueError, match="the tune split has no rows"):
        config.fit(FIT, TUNE.take(torch.arange(0)))
    with pytest.raises(ValueError, match="all 150 rows of the fit split have the class 3"):
        config.fit(replace(FIT, labels=torch.full((150,), 3)), TUNE)
    features = [f.clone() for f in FIT.features]
    features[1][17, 3] = math.nan
    with pytest.raises(ValueError, match="row 17 of the features of exit 2 in the fit split holds nan"):
        config.fit(replace(FIT, features=features), TUNE)
    logits = TUNE.logits.clone()
    logits[2, 5, 0] = math.inf
    with pytest.raises(ValueError, match="row 5 of the logits of exit 3 in the tune split holds inf"):
        config.fit(FIT, replace(TUNE, logits=logits))
    with pytest.raises(ValueError, match="not of the same network"):
        config.fit(make_rows(50, width=7), TUNE)
    with pytest.raises(ValueError, match="fit into memory, 1000 bytes"):
        PosteriorConfig("laplace", memory=1000).fit(FIT, TUNE)


def test_missing_classes_and_edges_are_warned_of_and_kept():
    some = FIT.take((FIT.labels != 2).nonzero().flatten())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = PosteriorConfig("laplace", n_mc=5).fit(some, TUNE)
    assert posterior.messages[0] == "1 of 5 classes have no row in the fit split: 2"
    assert tuple(str(w.message) for w in caught) == posterior.messages
    sharp = replace(TUNE, logits=1000 * TUNE.logits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = PosteriorConfig("temperature").fit(FIT, sharp)
    assert str(caught[0].message) == "exit 1: its temperature, 20, is at an end of what was looked at"
    assert "| 1* " in posterior.table()
    assert posterior.messages[0] in posterior.table()


def test_rows_of_another_network_are_refused():
    posterior = fit(method="mie")
    with pytest.raises(ValueError, match="fitted with 3 and 5"):
        posterior.probabilities(make_rows(10, classes=4))
    with pytest.raises(ValueError, match=r"there are exits 0\.\.2"):
        posterior.at(3, TEST.features[0], TEST.logits[0])
    with pytest.raises(ValueError, match="takes rows x 8 and rows x 5"):
        posterior.at(0, TEST.features[0][:, :4], TEST.logits[0])
    with pytest.raises(ValueError, match="is nothing; it takes what exit 0 returned"):
        posterior.at(1, TEST.features[1], TEST.logits[1])
    with pytest.raises(ValueError, match="it takes nothing"):
        posterior.at(0, TEST.features[0], TEST.logits[0], torch.zeros(40, 5))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_thousand_classes_within_two_gigabytes(tmp_path):
    script = """
import sys, warnings
import torch
from exit_rows import make_rows
from offramp.uncertainty.posterior import PosteriorConfig, load_posterior
torch.set_num_threads(1)
warnings.simplefilter("ignore")
size = dict(exits=1, classes=1000, width=2048, sharp=1.0)
posterior = PosteriorConfig(grid="meronen", n_mc=20).fit(make_rows(3000, **size), make_rows(30, first=5000, **size))
p = posterior.probabilities(make_rows(500, first=9000, **size))
assert abs(float(p.sum()) - 500) < 1e-6
posterior.save(sys.argv[1])
load_posterior(sys.argv[1])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)  # not getrusage, which counts what the parent had too
"""
    folders = [str(p) for p in sys.path if p]
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{script}", str(tmp_path / "state")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 2e9
