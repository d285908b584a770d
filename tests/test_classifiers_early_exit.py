"""Rows that really leave early, against choosing afterwards from all exits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.exits import CONFIDENCES
from offramp.families.backbone import Activations, Backbone
from offramp.families.finite import NotFiniteError
from tiny_encoders import CLASSES, EVERYTHING, build, inputs_for, tiny

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def simulated(probabilities, thresholds, confidence="max"):
    """The first exit of each row whose confidence is above its threshold, one row after another."""
    exits = []
    for row in range(probabilities.shape[1]):
        for exit_, threshold in enumerate(thresholds[: len(probabilities) - 1]):
            p = probabilities[exit_, row].double()
            largest, second = p.sort(descending=True).values[:2].tolist()
            entropy = -sum(q * math.log(q) for q in p.tolist())
            sure = {"max": largest, "gap": largest - second, "entropy": 1 - entropy / math.log(CLASSES)}[confidence]
            if sure > threshold:
                exits.append(exit_)
                break
        else:
            exits.append(len(probabilities) - 1)
    return torch.tensor(exits)


@pytest.mark.parametrize("name", EVERYTHING)
@given(seed=st.integers(0, 10), batch=st.integers(1, 7), levels=st.lists(st.floats(0, 1), min_size=2, max_size=2))
@settings(max_examples=10)
def test_the_exits_are_those_chosen_afterwards(name, seed, batch, levels):
    classifier, inputs = tiny(name), inputs_for(name, batch, seed=seed)
    with torch.no_grad():
        logits = torch.stack([z for _, z in classifier(inputs)])
    p = logits.softmax(-1)
    # At the given quantiles of the confidences, a little above a value, so that rounding decides nothing.
    thresholds = [
        float(p[e].amax(-1).quantile(level, interpolation="lower")) + 1e-3 * (2 * (seed % 2) - 1)
        for e, level in enumerate(levels)
    ]
    wanted = simulated(p, thresholds)
    got = classifier.classify(inputs, thresholds=thresholds)
    assert got.exits.tolist() == wanted.tolist()
    chosen = p[wanted, torch.arange(batch)]
    torch.testing.assert_close(got.probabilities, chosen, **CLOSE)
    torch.testing.assert_close(got.confidence, chosen.amax(-1), **CLOSE)
    assert got.classes.tolist() == chosen.argmax(-1).tolist()


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_every_confidence_is_what_it_says(confidence):
    classifier, inputs = tiny("bert"), inputs_for("bert", 40)
    with torch.no_grad():
        p = torch.stack([z for _, z in classifier(inputs)]).softmax(-1)
    for threshold in (0.2, 0.5, 0.8):
        got = classifier.classify(inputs, thresholds=threshold, confidence=confidence)
        assert got.exits.tolist() == simulated(p, [threshold] * 2, confidence).tolist()
    # one of the thresholds at least is one that rows are divided by
    assert len(set(classifier.classify(inputs, thresholds=0.5, confidence=confidence).exits.tolist())) > 1


class Recorder(Backbone):
    """Blocks that add one to a number per row, and say for which rows they ran."""

    main_input = "x"
    num_layers = 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = []

    def start(self, inputs):
        return Activations((inputs["x"],))

    def run(self, state, lo, hi):
        self.calls.append((lo, hi, state.hidden[:, 0].tolist()))
        return Activations((state.hidden,), hi)

    def body(self, layer, pooling):
        class Body(torch.nn.Module):
            def forward(self, state):
                return state.hidden[:, [layer]]  # the row's logit at this exit

        return Body(), 1


def scripted(rows):
    """Rows of (id, logit at exit 1, 2, 3): class 1 has this logit, class 0 its negative."""
    classifier = EarlyExitClassifier(Recorder(), (1, 2), 2)
    for head in classifier.heads:
        torch.nn.init.zeros_(head.linear.bias)
        head.linear.weight.data = torch.tensor([[-1.0], [1.0]])
    return classifier, torch.tensor(rows)


def test_blocks_run_for_the_rows_still_in_and_not_at_all_for_none():
    classifier, x = scripted([[0.0, 9, 0, 0], [1, 0, 9, 9], [2, 0, 0, -9], [3, -9, 0, 0], [4, 0, 9, 0]])
    got = classifier.classify(x, thresholds=0.9)
    assert classifier.backbone.calls == [(0, 1, [0, 1, 2, 3, 4]), (1, 2, [1, 2, 4]), (2, 3, [2])]
    assert got.exits.tolist() == [0, 1, 2, 0, 1]
    assert got.classes.tolist() == [1, 1, 0, 0, 1]
    classifier.backbone.calls.clear()
    classifier.classify(x[[0, 3]], thresholds=0.9)
    assert classifier.backbone.calls == [(0, 1, [0, 3])]
    classifier.backbone.calls.clear()
    assert classifier.classify(x).exits.tolist() == [2] * 5
    assert [call[:2] for call in classifier.backbone.calls] == [(0, 1), (1, 2), (2, 3)]


def test_the_test_is_strict_and_nan_stays():
    classifier, x = scripted([[0.0, 0, 0, 0], [1, 5, 9, 9]])

    def measure(p):  # NaN at the first exit of the second row
        return torch.where(p.amax(-1) == torch.tensor([-5.0, 5.0]).softmax(-1)[1], torch.nan, p.amax(-1))

    assert classifier.classify(x, thresholds=[0.5, 0.5], confidence=measure).exits.tolist() == [2, 1]
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    found = classifier.classify(x, thresholds=torch.stack([below, below, below]), confidence=measure)
    assert found.exits.tolist() == [0, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    classifier, x = scripted([[0.0, 0, 9, 9], [1, value, 9, 9]])
    with pytest.raises(NotFiniteError, match="computes NaN or infinity in the logits of an exit.* train it again"):
        classifier.classify(x, thresholds=0.9)
    classifier, x = scripted([[0.0, 9, 0, 0], [1, 9, 9, value]])
    assert classifier.classify(x, thresholds=0.9).exits.tolist() == [0, 0]  # no row comes to it


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows; give at least one"):
        tiny("bert").classify({k: v[:0] for k, v in inputs_for("bert").items()})


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_rows_answer_does_not_depend_on_the_others(name):
    classifier, inputs = tiny(name), inputs_for(name, 5)
    together = classifier.classify(inputs, thresholds=0.5)
    for row in range(5):
        alone = classifier.classify({k: v[row : row + 1] for k, v in inputs.items()}, thresholds=0.5)
        assert alone.exits.tolist() == together.exits[[row]].tolist()
        torch.testing.assert_close(alone.probabilities, together.probabilities[[row]], **CLOSE)


class Ensemble:
    """Means of the probabilities so far, with a count of exits in a second place and nothing in a third."""

    def at(self, exit_, features, logits, carried):
        p = logits.softmax(-1).double()
        assert len(features) == len(logits)
        assert logits.dtype == features.dtype == torch.float32
        total, count, _ = carried or (torch.zeros_like(p), torch.zeros(len(p)), None)
        total, count = total + p, count + 1
        assert count.tolist() == [exit_ + 1] * len(p)
        return total / count[:, None], (total, count, None)


def test_what_a_posterior_carries_stays_with_its_rows():
    classifier, inputs = tiny("vit"), inputs_for("vit", 30)
    with torch.no_grad():
        p = torch.stack([z for _, z in classifier(inputs)]).softmax(-1).double()
    means = p.cumsum(0) / torch.arange(1, 4)[:, None, None]
    threshold = float(means[:2].amax(-1).median()) + 1e-4
    wanted = simulated(means, [threshold] * 2)
    assert len(set(wanted.tolist())) == 3
    got = classifier.classify(inputs, Ensemble(), threshold)
    assert got.exits.tolist() == wanted.tolist()
    assert got.probabilities.dtype == torch.float64
    torch.testing.assert_close(got.probabilities, means[wanted, torch.arange(30)], **CLOSE)


def test_classifying_is_evaluating_and_training_goes_on_after_it():
    classifier, inputs = build("msdnet").train(), inputs_for("msdnet")
    classifier.heads[0].eval()
    state = {k: v.clone() for k, v in classifier.state_dict().items()}
    got = classifier.classify(inputs, thresholds=0.5)
    assert classifier.training
    assert not classifier.heads[0].training
    assert all(v.equal(state[k]) for k, v in classifier.state_dict().items())
    assert got.exits.equal(tiny("msdnet").classify(inputs, thresholds=0.5).exits)
    assert not got.probabilities.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5]}, "1 thresholds for 3 exits"),
        ({"thresholds": [0.5] * 4}, "4 thresholds for 3 exits"),
        ({"confidence": "sure"}, "choose one of max, gap, entropy"),
    ],
)
def test_impossible_questions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny("bert").classify(inputs_for("bert"), **options)
