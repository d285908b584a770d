"""Instance weights against scalar re-implementations, and the readout that must not touch the student."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from classifier_runs import rows
from offramp.classifiers.batches import TextRows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.convolutional import SmallCNN, SmallCNNConfig
from offramp.classifiers.exits import gap as margin
from offramp.distillation import networks
from offramp.distillation.instance_weights import (
    GATES,
    MAPS,
    SIGNALS,
    Evidence,
    InstanceWeights,
    finished,
    look_at,
    new_weights,
    share_of_rank,
    signal,
    weights_of,
)
from offramp.distillation.methods import METHODS, method
from offramp.distillation.networks import CHUNK, Network, build
from offramp.distillation.readout import ReadoutConfig, ReadoutOutputs, states_at, teach
from offramp.metrics.group_effects import ReadoutDiagnostics, readout_diagnostics
from offramp.tasks.labelled import Labelled


def reading_of(logits, labels, epoch=0, width=5, seed=0, prefix="r"):
    features = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed))
    return ReadoutOutputs(
        epoch, features, logits, torch.as_tensor(labels), tuple(f"{prefix}{i}" for i in range(len(labels)))
    )


def evidence_of(count=40, classes=3, seed=0, scale=2.0, **options):
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=random)
    labels = torch.randint(classes, (count,), generator=random)
    tune = reading_of(
        scale * torch.randn(count, classes, generator=random), torch.randint(classes, (count,), generator=random),
        prefix="t",
    )  # fmt: skip
    return Evidence(reading_of(logits, labels), tune, **options)


# ---------------------------------------------------------------- the margin and the published weights


@given(st.integers(2, 3).flatmap(lambda c: st.lists(st.floats(0, 1), min_size=c, max_size=c)))
def test_margin_by_enumeration(values):
    p = torch.tensor(values, dtype=torch.float64)
    pairs = [abs(a - b) for a, b in itertools.combinations(values, 2) if max(values) in (a, b)]
    assert float(margin(p[None])) == pytest.approx(min(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.05, 4, (24, 35, 48, 55)), (0.1, 3.5, (9, 16, 26, 33)), (0.2, 3, (3.3, 6.6, 14, 20)),
        (0.05, 3, (11, 15, 18, 20)),
    ],
)  # fmt: skip
def test_the_weights_of_the_papers_constants(alpha, beta, expected):
    """The table of the specification, to two digits: margins of .01, .1, .5 and 1 for a row that is wrong."""
    margins = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    logits = torch.stack([(1 + margins) / 2, (1 - margins) / 2], 1).log().clamp(min=-800)
    evidence = Evidence(reading_of(logits, [1, 1, 1, 1]))
    found = weights_of(evidence, InstanceWeights(alpha=alpha, beta=beta))
    for value, want in zip(found.tolist(), expected, strict=True):
        assert value == pytest.approx(want, abs=0.06 if want < 9 else 0.51)  # as far as it was printed
    right = Evidence(reading_of(logits, [0, 0, 0, 0]))
    assert weights_of(right, InstanceWeights(alpha=alpha, beta=beta)).tolist() == [1.0] * 4


# ---------------------------------------------------------------- signals


def scalar_signal(name, evidence, row):
    """One row's signal, worked out alone."""
    p, classes = evidence.reading.logits[row].double().softmax(-1).tolist(), evidence.reading.logits.shape[1]
    if name.startswith("laplace"):
        mean, entropy, variance = (part[row] for part in evidence.moments)
        p = mean.tolist()
        total = -sum(v * math.log(v) for v in p if v)
        own = {
            "laplace_entropy": total / math.log(classes), "laplace_mi": (total - float(entropy)) / math.log(classes),
            "laplace_variance": float(variance) / (1 - 1 / classes), "laplace_margin": None,
        }[name]  # fmt: skip
    else:
        own = {"entropy": -sum(v * math.log(v) for v in p if v) / math.log(classes)}.get(name)
    answer = max(range(classes), key=lambda c: p[c])
    if name in ("margin", "laplace_margin"):
        first, second = sorted(p, reverse=True)[:2]
        own = first - second
    if name in ("loss", "distance"):
        logits, labels = evidence.reading.logits.double(), evidence.reading.labels
        values = evidence.spread if name == "distance" else [
            -float(logits[i].log_softmax(-1)[labels[i]]) for i in range(len(labels))
        ]  # fmt: skip
        below = sum(float(v) < float(values[row]) for v in values)
        ties = sum(float(v) == float(values[row]) for v in values) - 1
        own = (below + ties / 2) / (len(values) - 1)
    if name.startswith("set"):
        inside = evidence.members[row].tolist()
        size = sum(inside)
        u = (size - 1) / (classes - 1)
        own = {"set_size": u, "set_sharpness": 1 - u}.get(name, float(not inside[evidence.reading.labels[row]]))
        own = 1.0 if size == 0 and name != "set_miss" else own
    return own, answer


@pytest.mark.parametrize("sets", ["nested", "avcs"])
@pytest.mark.parametrize("name", SIGNALS)
def test_weights_against_a_scalar_re_implementation(name, sets):
    for classes, seed in ((2, 0), (4, 1)):
        evidence = evidence_of(30, classes, seed, sets=sets, miss=0.3)
        u, answers = signal(name, evidence)
        order = sorted(u.tolist())
        for gate, map_, alpha in itertools.product(GATES, MAPS, (0.05, 1.0)):
            config = InstanceWeights(name, gate, map_, alpha, 2.0)
            found = weights_of(evidence, config)
            for row in range(30):
                own, answer = scalar_signal(name, evidence, row)
                assert (float(u[row]), int(answers[row])) == (pytest.approx(own, abs=1e-9), answer)
                label = int(evidence.reading.labels[row])
                first, second, *_ = sorted(evidence.map[row].tolist(), reverse=True)
                inside = {
                    "wrong": answer != label, "all": True, "correct": answer == label,
                    "excluded": not bool(evidence.members[row, label]), "uncertain": first - second < 0.5,
                }[gate]  # fmt: skip
                place = (order.index(float(u[row])) + (order.count(float(u[row])) - 1) / 2) / 29
                weight = {
                    "power": math.exp(2 * own**alpha), "linear": 1 + 2 * own, "rank": math.exp(2 * place)
                }[map_]  # fmt: skip
                assert float(found[row]) == pytest.approx(weight if inside else 1.0, rel=1e-7)


@pytest.mark.parametrize("sets", ["nested", "avcs"])
def test_signals_of_rows_that_are_as_sure_as_can_be(sets):
    for scale in (1e-6, 300.0, 1e5):
        evidence = evidence_of(30, 3, scale=scale, sets=sets)
        for name in SIGNALS:
            u, _ = signal(name, evidence)
            assert bool(u.isfinite().all() & (u >= 0).all() & (u <= 1).all()), (name, scale)


def test_an_empty_set_is_as_conspicuous_as_it_gets():
    evidence = evidence_of(4, 3)
    evidence.__dict__["members"] = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert signal("set_size", evidence)[0].tolist() == [1.0, 0.0, 0.5, 1.0]
    assert signal("set_sharpness", evidence)[0].tolist() == [1.0, 1.0, 0.5, 0.0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_go_from_nothing_to_one(values):
    u = share_of_rank(torch.tensor(values))
    assert 0 <= float(u.min()) <= float(u.max()) <= 1
    for (a, u_a), (b, u_b) in itertools.combinations(zip(values, u.tolist(), strict=True), 2):
        assert (a < b) == (u_a < u_b)


def test_laplace_without_doubt_is_dedier():
    """Prior variance → 0 leaves the weights of the last layer where they are."""
    for seed in range(3):
        evidence = evidence_of(50, 3, seed, prior_variance=1e-14)
        plain = InstanceWeights(alpha=1.0, weight_on="both")
        noisy = InstanceWeights("laplace_margin", alpha=1.0, weight_on="both")
        torch.testing.assert_close(weights_of(evidence, noisy), weights_of(evidence, plain), rtol=1e-4, atol=1e-6)


def test_doubt_makes_margins_smaller():
    evidence = evidence_of(50, 3, prior_variance=100.0)
    assert signal("laplace_margin", evidence)[0].mean() < signal("margin", evidence)[0].mean() - 0.02


def test_sets_of_another_readout_are_refused():
    evidence = evidence_of()
    parts = [getattr(evidence.tune, name) for name in ("features", "logits", "labels", "ids")]
    old = Evidence(evidence.reading, ReadoutOutputs(7, *parts))
    with pytest.raises(ValueError, match="read after epoch 7, the training rows after epoch 0"):
        signal("set_size", old)
    with pytest.raises(ValueError, match="need rows outside training"):
        signal("set_size", Evidence(evidence.reading))
    with pytest.raises(ValueError, match="the signal is 'doubt'"):
        signal("doubt", evidence)


# ---------------------------------------------------------------- readouts and sets that say nothing


@pytest.mark.parametrize("signal_name", ["set_sharpness", "set_size", "margin"])
@pytest.mark.parametrize("gate", ["excluded", "all"])
def test_sets_that_are_all_empty_weight_nothing(signal_name, gate):
    """Not exp(beta) on every row, which is what an empty set weighs among others."""
    evidence, config = evidence_of(classes=3), InstanceWeights(signal=signal_name, gate=gate, beta=3.0)
    evidence.__dict__["members"] = torch.zeros(40, 3, dtype=torch.bool)
    found, seen = weights_of(evidence, config), look_at(evidence, config, 32)
    if config.by_sets:
        assert found.tolist() == [1.0] * 40
        assert seen.empty
        assert "sets empty" in seen.flags
    else:
        assert found.min() > 1
        assert seen.empty is None
    evidence.__dict__["members"][0, 0] = True  # one row has a set: the others are conspicuous again
    if config.by_sets and signal_name != "margin":
        assert weights_of(evidence, config)[1:].tolist() == pytest.approx([math.exp(3)] * 39)
        assert not look_at(evidence, config, 32).empty


def test_avcs_of_a_readout_that_knows_nothing_collapse_no_more():
    """All logits alike: no class has evidence above the threshold, so every set is empty."""
    labels = torch.arange(60) % 3
    evidence = Evidence(reading_of(torch.zeros(60, 3), labels), reading_of(torch.zeros(60, 3), labels, prefix="t"),
                        sets="avcs")  # fmt: skip
    assert evidence.all_empty
    config = METHODS["avcs"].weights
    assert weights_of(evidence, config).tolist() == [1.0] * 60
    seen = look_at(evidence, config, 32)
    assert (seen.accuracy, seen.chance, seen.gated) == pytest.approx((1 / 3, 1 / 3, 1.0))
    assert seen.flags == ("near chance", "nearly all gated", "sets empty")


def test_accuracy_chance_and_gate_by_hand():
    answers, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = readout_diagnostics(answers, labels, 64, answers != labels)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.chance == pytest.approx((3 * 2 + 2 * 2 + 1 * 2) / 36)
    assert found.gated == pytest.approx(2 / 6)
    assert readout_diagnostics(torch.zeros(6, dtype=torch.long), labels, 64, None).chance == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("accuracy", "chance", "batch", "near"),
    [
        (0.363, 1 / 3, 64, True),  # what three classes were at by SGD at a rate of AdamW
        (0.43, 1 / 3, 64, True), (0.48, 1 / 3, 64, False), (0.78, 1 / 3, 32, False), (0.946, 0.5, 64, False),
        (0.93, 0.85 * 0.88 + 0.15 * 0.12, 64, False),  # a readout that finds most of a rare class
        (0.85, 0.85, 64, True),  # a constant answer
    ],
)  # fmt: skip
def test_near_chance_by_scipys_interval(accuracy, chance, batch, near):
    found = ReadoutDiagnostics(accuracy, chance, batch, None)
    ends = stats.binomtest(round(accuracy * batch), batch).proportion_ci(method="wilson")
    assert found.near_chance == (ends.low <= chance) == near
    assert ("near chance" in found.flags) == near


def test_gates_that_take_nearly_all_rows():
    assert ReadoutDiagnostics(0.9, 0.5, 64, 0.996).flags == ("nearly all gated",)
    assert ReadoutDiagnostics(0.9, 0.5, 64, 0.99).flags == ()
    assert ReadoutDiagnostics(0.9, 0.5, 64, None).flags == ()  # on purpose


# ---------------------------------------------------------------- control and normalisation


def test_controls_keep_what_they_should():
    w = torch.tensor([1.0, 5.0, 1.0, 9.0], dtype=torch.float64)
    permuted = finished(w, InstanceWeights(control="permuted"), seed=3)
    assert sorted(permuted.tolist()) == sorted(w.tolist())
    assert finished(torch.arange(50.0), InstanceWeights(control="permuted"), 3).tolist() != list(range(50))
    assert finished(w, InstanceWeights(control="mean-matched"), 0).tolist() == [4.0] * 4
    matched = finished(w, InstanceWeights(control="gate-matched"), 0)
    assert matched.tolist() == [float(w[w > 1].mean()) if each > 1 else 1.0 for each in w.tolist()]
    assert matched.mean() == w.mean()
    assert finished(torch.ones(4), InstanceWeights(control="gate-matched"), 0).tolist() == [1.0] * 4
    oracle = finished(w, InstanceWeights(control="oracle", beta=2.0), 0, torch.tensor([True, False, False, False]))
    assert oracle.tolist() == pytest.approx([math.exp(2), 1, 1, 1])
    with pytest.raises(ValueError, match="those of training rows are unknown"):
        finished(w, InstanceWeights(control="oracle"), 0)
    assert float(finished(w, InstanceWeights(normalise="mean"), 0).mean()) == pytest.approx(1)
    assert finished(w, InstanceWeights(normalise="clip", largest=4.0), 0).tolist() == [1, 4, 1, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"signal": "doubt"}, "signal of the weights is 'doubt'; allowed are 'margin'"),
        ({"alpha": -1.0}, "neither may be negative"),
        ({"normalise": "clip"}, "clip needs one from 1 on"),
        ({"every": 0}, "count from 1, 0 and 1"),
        ({"prior_variance": 0.0}, "must be above 0"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        InstanceWeights(**options)


def test_when_there_is_a_new_readout():
    config = InstanceWeights(every=2, warmup=1)
    assert [epoch for epoch in range(8) if config.due(epoch, 8)] == [1, 3, 5]  # not after the last epoch
    assert [epoch for epoch in range(3) if InstanceWeights().due(epoch, 3)] == [0, 1]


def test_presets_are_what_the_papers_say():
    dedier, code = METHODS["dedier"], METHODS["dedier_code"]
    assert (dedier.temperature, dedier.fraction) == (3.0, 1.0)
    assert (dedier.weights.signal, dedier.weights.gate, dedier.weights.weight_on) == ("margin", "wrong", "kd")
    assert code.weights.weight_on == "both"
    assert METHODS["laplace"].weights == InstanceWeights("laplace_margin", weight_on="both")
    changed = method("laplace+alpha=1+fraction=0.5", {"weights": {"beta": 3.5, "readout": {"depth": 2}}})
    assert (changed.weights.alpha, changed.weights.beta, changed.fraction) == (1, 3.5, 0.5)
    assert changed.weights.readout.depth == 2
    wrong = {
        "dedeir": "there is no method 'dedeir'", "kd+alpha=1": "has no weights", "dedier+colour=1": "has no 'colour'",
        "dedier+alpha=x": "alpha is 'x'; a float",
    }  # fmt: skip
    for text, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            method(text)


# ---------------------------------------------------------------- the readout leaves the student alone


@pytest.fixture
def student():
    torch.manual_seed(0)
    return EarlyExitClassifier(SmallCNN(SmallCNNConfig(4, image_size=8, in_channels=1)), [1, 2], 3)


READOUT = ReadoutConfig(optimiser="adamw", learning_rate=1e-2)


def test_a_readout_changes_nothing_of_the_student(student):
    train = rows(60, augment=False)
    optimiser = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    images = train.inputs(torch.arange(60))

    def step():
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(student(images)[-1].logits, train.data.labels).backward()
        optimiser.step()

    step()
    student.train()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    momenta = [state["momentum_buffer"].clone() for state in optimiser.state.values()]
    drawn = torch.random.get_rng_state()
    found, seen = new_weights(student, train, InstanceWeights(readout=READOUT), epoch=0, seed=0)
    assert seen.gated == pytest.approx(1 - seen.accuracy)
    assert seen.batch == 64
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())  # batch norms too
    assert all(p.requires_grad for p in student.parameters())
    assert all(part.training for part in student.modules())
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(momenta, optimiser.state.values(), strict=True))
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert found.shape == (60,)
    assert bool((found > 1).any() & (found == 1).any())
    step()
    first = "backbone.blocks.0.0.weight"
    assert not torch.equal(before[first], student.state_dict()[first])  # early layers still learn


def test_every_row_gets_a_new_weight(student):
    """A row that turned right is back at 1, whatever it weighed."""
    train = rows(60, augment=False)
    config = InstanceWeights(readout=READOUT)
    weights = [new_weights(student, train, config, epoch=epoch, seed=0)[0] for epoch in range(4)]
    states = states_at(student, train, 1)
    for epoch, found in enumerate(weights):
        readout = teach(states, train.data.labels, 3, READOUT, epoch)
        right = readout(states.kept)[1].argmax(1) == train.data.labels
        assert torch.equal(found == 1, right)
    turned = (weights[0] > 1) & (weights[-1] == 1)
    assert bool(turned.any())
    again, _ = new_weights(student, train, config, epoch=2, seed=0)
    assert torch.equal(again, weights[2])


def test_the_readout_learns_what_is_there(student):
    train = rows(90, augment=False)
    states = states_at(student, train, 2)
    assert states.shape == states.kept.shape == (90, 8, 2, 2)
    readout = teach(states, train.data.labels, 3, ReadoutConfig(epochs=40, optimiser="adamw", learning_rate=1e-2), 0)
    assert (readout(states.kept)[1].argmax(1) == train.data.labels).double().mean() > 0.8


@pytest.mark.parametrize("name", ["images", "texts"])
def test_states_that_do_not_fit_in_memory_are_made_batch_by_batch(student, monkeypatch, name):
    """The weights are those of kept states, and no more rows than a batch are ever looked at."""
    train = rows(300, augment=False)
    if name == "texts":
        texts = tuple(" ".join(["a dog runs never"] * (1 + n % 5)) for n in range(300))
        data = Labelled(tuple(map(str, range(300))), texts, torch.arange(300) % 3 % 2, ("x", "y"))
        student = build(Network("text:2x32"), data, 0)
        train = TextRows(data, student.tokenizer)
    seen, plain = [], type(train).inputs
    monkeypatch.setattr(type(train), "inputs", lambda self, places, *r: seen.append(len(places)) or plain(self, places))
    config = InstanceWeights("laplace_entropy", "all", alpha=1.0, readout=replace(READOUT, epochs=2))
    kept, _ = new_weights(student, train, config, epoch=1, seed=3)
    assert sum(seen) == 300
    seen.clear()
    monkeypatch.setattr(networks, "MEMORY", 0)
    assert states_at(student, train, 1).kept is None
    made, _ = new_weights(student, train, config, epoch=1, seed=3)
    assert max(seen) <= CHUNK
    assert sum(seen) > 3 * 300
    assert float(kept.std()) > 0.01
    torch.testing.assert_close(made, kept, rtol=1e-4, atol=1e-4)


def test_a_readout_must_be_early(student):
    with pytest.raises(ValueError, match="reads after block 3 of 3; that is not early"):
        new_weights(student, rows(9), InstanceWeights(readout=ReadoutConfig(depth=3)), epoch=0, seed=0)
    with pytest.raises(ValueError, match="depth is 0"):
        ReadoutConfig(depth=0)
