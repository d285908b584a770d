"""Methods compared over budgets, against loops over rows, other implementations of the metrics, and cases by hand."""

import json
import math
from dataclasses import dataclass, replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import stats

from offramp.classifiers.evaluate import Fitted, Method, Point, Settings, area, charged, curve, evaluate, interpolate
from offramp.classifiers.result import ClassifierEvaluation
from offramp.metrics import calibration
from offramp.metrics.calibration import grade, scores
from offramp.metrics.intervals import Interval
from offramp.report.classifiers import save_classifiers
from offramp.report.drawing import percent
from offramp.risk import budgets
from offramp.uncertainty.outputs import ExitOutputs

COSTS = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)


@dataclass(frozen=True)
class Flops:
    counted: float


@dataclass(frozen=True)
class Tempered:
    """Softmax at one temperature; each exit costs more than the one before."""

    temperature: float = 1.0
    flops: float = 0.0

    def probabilities(self, outputs):
        return (outputs.logits.double() / self.temperature).softmax(-1)

    def overhead(self, exit):
        return Flops(self.flops * (exit + 1))


def rows(n, seed, classes=7, name=None):
    """Later exits know more; all are too sure."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    logits = 2 * (signal + torch.randn(3, n, classes, generator=generator))
    ids = tuple(f"{name or seed}-{i}" for i in range(n))
    return ExitOutputs([torch.zeros(n, 1)] * 3, logits, labels, COSTS, ids)


METHODS = {"vanilla": Tempered(), "temperature": Tempered(2.0, 1.0)}
THRESHOLD, TEST = rows(150, 0), rows(120, 1)


@pytest.fixture(scope="module")
def found():
    return evaluate(METHODS, THRESHOLD, {"clean": TEST, "again": TEST}, Settings(resamples=60))


def of(found, name, test="clean"):
    return next(method for method in found if (method.test, method.name) == (test, name))


# ---------------------------------------------------------------- against loops


@pytest.mark.parametrize("name", ["vanilla", "temperature"])
def test_budgets_are_those_of_a_loop_over_rows(found, name):
    posterior, method = METHODS[name], of(found, name)
    costs = [float(c) + posterior.flops * (e + 1) * (e + 2) / 2 for e, c in enumerate(COSTS)]
    p = posterior.probabilities(TEST)
    assert len(method.points) == 39
    for q, point in list(zip(budgets.QS, method.points, strict=True))[::6]:
        fitted = budgets.fit(posterior.probabilities(THRESHOLD).amax(-1), torch.tensor(costs), q)
        exits = []
        for row in range(TEST.rows):
            exits.append(next(e for e in range(3) if float(p[e, row].max()) > float(fitted.thresholds[e])))
        taken = torch.stack([p[e, row] for row, e in enumerate(exits)])
        assert point.q == q
        assert point.shares == tuple(exits.count(e) / TEST.rows for e in range(3))
        assert point.cost == pytest.approx(sum(costs[e] for e in exits) / TEST.rows)
        assert point.target == pytest.approx(budgets.target_cost(q, torch.tensor(costs)), rel=1e-6)
        assert point.threshold_cost == pytest.approx(fitted.realised)
        expected = scores(grade(taken, TEST.labels))
        for metric, value in point.metrics.items():
            assert value == pytest.approx(expected[metric], abs=1e-9), metric
    for metric in method.metrics:
        assert method.mean[metric].value == pytest.approx(np.mean([point.metrics[metric] for point in method.points]))
    assert method.mean["cost"].value == pytest.approx(np.mean([point.cost for point in method.points]) / 40)


def test_each_exit_alone(found):
    method = of(found, "temperature")
    p = METHODS["temperature"].probabilities(TEST)
    for e, point in enumerate(method.alone):
        expected = scores(grade(p[e], TEST.labels))
        assert point.shares[e] == 1
        assert {m: v for m, v in expected.items() if m in point.metrics} == pytest.approx(point.metrics, abs=1e-9)
    assert [point.cost for point in method.alone] == [11, 23, 46]
    bins = method.reliability[0]
    assert sum(b[2] for b in bins) == TEST.rows


def test_costs_are_charged_at_all_exits_so_far():
    assert charged(COSTS, Tempered(flops=3)).tolist() == [13, 29, 58]


def test_the_static_exit_is_the_best_that_the_budget_affords(found):
    static, accuracy = of(found, "static exit, vanilla"), []
    for e in range(3):
        accuracy.append(float((THRESHOLD.logits[e].argmax(-1) == THRESHOLD.labels).double().mean()))
    for point in static.points:
        affordable = [e for e in range(3) if float(COSTS[e]) <= point.target]
        best = max(affordable, key=lambda e: accuracy[e])
        assert point.shares[best] == 1
        assert point.cost == float(COSTS[best]) <= point.target
        assert point.metrics == static.alone[best].metrics
    full = of(found, "full model, temperature")
    assert full.mean["cost"].value == pytest.approx(43 / 40)  # with the overhead of its own exit alone
    assert full.points[0].shares == (0, 0, 1)
    assert full.at == full.area == {}


CUT = torch.tensor([10.0, 16.0, 32.0], dtype=torch.float64)


def test_costs_are_relative_to_the_plain_full_network():
    """What nobody would run, all heads on the way to the last exit, is no denominator."""
    found = evaluate(METHODS, replace(THRESHOLD, cut=CUT), {"clean": TEST}, Settings(resamples=0))
    before = evaluate(METHODS, THRESHOLD, {"clean": TEST}, Settings(resamples=0))
    assert of(found, "full model, vanilla").points[0].cost == 32
    assert of(found, "full model, vanilla").mean["cost"].value == 1
    assert of(found, "full model, temperature").points[0].cost == 35  # and one overhead, that of its own exit
    assert of(found, "static exit, vanilla").alone[1].cost == 16
    rule = of(found, "vanilla")
    assert rule.alone[-1].cost == 40  # a rule that tests pays for all heads
    assert (rule.full_cost, rule.heads_cost) == (32, 40)
    assert rule.mean["cost"].value == pytest.approx(of(before, "vanilla").mean["cost"].value * 40 / 32)
    assert rule.curve("top1")[0][-1] == 40 / 32
    assert rule.at["50%"]["top1"] == pytest.approx(interpolate(of(before, "vanilla").curve("top1"), 0.5 * 32 / 40))
    text = ClassifierEvaluation({}, (tuple(found),)).table()
    assert "over those of the plain full network, the backbone and its last exit's head (32 FLOPs per row)" in text
    assert "With the heads of all exits that network costs 1.250 of it." in text


def test_results_of_an_earlier_version_say_what_their_costs_are_over(found):
    values = json.loads(json.dumps(ClassifierEvaluation({}, (tuple(found),)).to_dict()))
    values["schema"] = "offramp/classifier-evaluation/1"
    for method in values["seeds"][0]:
        del method["heads_cost"]
    earlier = ClassifierEvaluation.from_dict(values)
    assert earlier.unit == "full network with the heads of all exits"
    assert "Evaluate again for shares of the plain full network" in earlier.table()
    assert earlier.mean("clean", "vanilla", "cost").mean == of(found, "vanilla").mean["cost"].value


def test_differences_are_paired(found):
    vanilla, base = of(found, "vanilla"), of(found, "temperature")
    assert base.difference == {}
    for metric, interval in vanilla.difference.items():
        assert interval.value == pytest.approx(vanilla.mean[metric].value - base.mean[metric].value)
    # The same rows are drawn for both, so their difference is known better than either.
    width, alone = (i.high - i.low for i in (vanilla.difference["top1"], vanilla.mean["top1"]))
    assert width < 0.8 * alone


def test_a_corrupted_copy_of_a_test_set_keeps_thresholds_and_draws(found):
    for name in ("vanilla", "temperature"):
        assert replace(of(found, name, "again"), test="clean") == of(found, name)


def test_few_classes_have_no_top_5():
    found = evaluate({"vanilla": Tempered()}, rows(60, 0, 3), {"clean": rows(50, 1, 3)}, Settings(resamples=0))
    assert "top5" not in found[0].mean
    assert found[0].difference == {}
    assert found[0].mean["top1"] == Interval(found[0].mean["top1"].value)
    assert "Top-5" not in ClassifierEvaluation({}, (tuple(found),)).table()


def test_one_exit():
    def single(outputs):
        return ExitOutputs(outputs.features[:1], outputs.logits[:1], outputs.labels, COSTS[:1], outputs.ids)

    found = evaluate({"vanilla": Tempered()}, single(THRESHOLD), {"clean": single(TEST)}, Settings(resamples=0))
    assert {point.shares for point in found[0].points} == {(1.0,)}
    assert found[0].area["top1"] is None
    assert "–" in ClassifierEvaluation({}, (tuple(found),)).table()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 methods and 1 test sets"):
        evaluate({}, THRESHOLD, {"clean": TEST})
    with pytest.raises(ValueError, match="threshold and clean share 120 rows"):
        evaluate(METHODS, rows(150, 0, name="1"), {"clean": TEST})
    with pytest.raises(ValueError, match="3 exits and 5 classes"):
        evaluate(METHODS, THRESHOLD, {"clean": rows(20, 1, 5)})


# ---------------------------------------------------------------- resamples


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_resamples_are_those_of_repeated_rows(ties):
    p = THRESHOLD.logits[0].double().softmax(-1)
    p = (p * 5).round().clamp(min=0.5) if ties else p
    p = p / p.sum(-1, keepdim=True)
    weights = calibration.resample(150, 4, seed=2)
    assert weights.sum(axis=1).tolist() == [150] * 5
    found = calibration.resampled_scores(grade(p, THRESHOLD.labels), weights, 10)
    for column, weight in enumerate(weights):
        chosen = torch.as_tensor(weight).long()
        repeated = scores(grade(p.repeat_interleave(chosen, 0), THRESHOLD.labels.repeat_interleave(chosen)), bins=10)
        for metric, values in found.items():
            assert values[column] == pytest.approx(repeated[metric], abs=1e-12 if not column else 2e-6), metric
    with pytest.raises(ValueError, match="there are 0 rows"):
        calibration.resample(0, 1)


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    # Rows right with probability 0.8: 100 intervals at 95 % miss it more than 13 times with probability below 0.001.
    missed = 0
    for seed in range(100):
        right = torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.8
        p = torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(200, 2)
        values = calibration.resampled_scores(grade(p, (~right).long()), calibration.resample(200, 300, seed))["top1"]
        interval = Interval.of(values)
        missed += not interval.low <= 0.8 <= interval.high
    assert missed <= 13


# ---------------------------------------------------------------- curves over cost


def test_curves_by_hand():
    points = curve([0.5, 0.25, 1.0, 0.25], [3.0, 1.0, 4.0, 2.0])
    assert [column.tolist() for column in points] == [[0.25, 0.5, 1.0], [1.5, 3.0, 4.0]]
    assert interpolate(points, 0.75) == 3.5
    assert interpolate(points, 0.25) == 1.5
    assert interpolate(points, 0.2) is None
    assert area(points, 0.25, 1.0) == pytest.approx((0.25 * 2.25 + 0.5 * 3.5) / 0.75)
    assert area(points, 0.375, 0.75) == pytest.approx((0.125 * 2.625 + 0.25 * 3.25) / 0.375)
    assert area(points, 0.2, 1.0) is None
    assert area(points, 0.5, 0.5) is None


def test_curves_reach_from_the_first_exit_to_the_last(found):
    method = of(found, "vanilla")
    costs, values = method.curve("top1")
    assert (costs[0], costs[-1]) == (0.25, 1.0)
    assert values[-1] == method.alone[-1].metrics["top1"]
    assert method.at["25%"]["top1"] == method.alone[0].metrics["top1"]
    assert of(found, "temperature").at["25%"]["top1"] is None  # its first exit costs 11 of 40
    # All methods over the same costs: from 11 of 40 on.
    assert method.area["nlpd"] == pytest.approx(area(method.curve("nlpd"), 11 / 40, 1))


# ---------------------------------------------------------------- seeds


@pytest.fixture(scope="module")
def evaluation(found):
    others = [
        evaluate(
            METHODS,
            rows(150, 10 * s),
            {"clean": rows(90, 10 * s + 1), "again": rows(80, 10 * s + 2)},
            Settings(resamples=0),
        )  # fmt: skip  # noqa: E501
        for s in (1, 2)
    ]
    return ClassifierEvaluation({"model": "toy"}, tuple(tuple(methods) for methods in (found, *others)))


def test_seeds_are_summarised_by_student(evaluation):
    values = [method.mean["nlpd"].value for method in evaluation.of("clean", "temperature")]
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    summary = evaluation.mean("clean", "temperature", "nlpd")
    assert (summary.mean, summary.sd) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert (summary.low, summary.high) == (pytest.approx(low), pytest.approx(high))


def test_differences_over_seeds_are_paired(evaluation):
    pairs = [
        of(methods, "vanilla").mean["nlpd"].value - of(methods, "temperature").mean["nlpd"].value
        for methods in evaluation.seeds
    ]
    difference = evaluation.difference("clean", "vanilla", "nlpd")
    assert (difference.low, difference.high) == pytest.approx(
        stats.t.interval(0.95, 2, np.mean(pairs), stats.sem(pairs))
    )
    assert evaluation.difference("clean", "temperature", "nlpd") is None


def test_json_and_back(evaluation):
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert ClassifierEvaluation.from_dict(json.loads(text)) == evaluation
    with pytest.raises(ValueError, match="the schema is 'other'"):
        ClassifierEvaluation.from_dict({"schema": "other"})


def test_tables_say_what_was_found(evaluation, found):
    text = evaluation.table()
    top1 = evaluation.mean("clean", "vanilla", "top1")
    assert f"{100 * top1.mean:.2f} ± {100 * top1.sd:.2f}" in text
    assert "t intervals" in text
    assert text.count("Minus temperature") == 2
    single = ClassifierEvaluation({"model": "toy"}, (tuple(found),))
    interval = single.mean("clean", "vanilla", "nlpd")
    assert f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})" in single.table()
    assert "one training seed" in single.table()
    for row in single.cost_table("clean").rows:
        assert row[-1].endswith("%")
    with pytest.raises(ValueError, match="there is no 'laplace'"):
        single.of("clean", "laplace")


def test_clamped_rows_are_told():
    point = Point(1.0, 1.0, 1.0, 1.0, (1.0,), {"top1": 1.0, "nlpd": 0.0, "ece": 0.0})
    mean = {name: Interval(0.0) for name in ("top1", "nlpd", "ece", "cost")}
    method = Method(
        "vanilla", "clean", 1.0, (point,), (point,), mean, {}, {}, {}, (((0.9, 1.0, 1.0, 1.0, 1.0),),), (7,)
    )
    assert "NLPD, over all exits: vanilla 7." in ClassifierEvaluation({}, ((method,),)).table()
    assert point.overshoot == 0
    assert math.isclose(replace(point, cost=1.5).overshoot, 0.5)


def test_seeds_must_be_alike(evaluation, found):
    with pytest.raises(ValueError, match="each must have the same"):
        ClassifierEvaluation({}, (tuple(found), tuple(found[1:])))
    with pytest.raises(ValueError, match="each must have the same"):
        ClassifierEvaluation({}, ())
    with pytest.raises(ValueError, match="fits of 2 networks for 1 seeds"):
        ClassifierEvaluation({}, (tuple(found),), ({}, {}))


def test_warnings_are_told_once_with_whom_they_are_about(found):
    edge, jitter = "exit 1: its temperature, 5, is at an end", "exit 2: its class factor was singular"
    fits = (
        {"temperature": Fitted((1.5, 2, 5), None, (edge,)), "laplace": Fitted((1, 1, 1), (0.1, 1, 9), (edge, jitter))},
        {"temperature": Fitted((1, 2, 3), None, (edge,)), "laplace": Fitted((1, 1, 1), (2, 2, 2))},
    )
    both = ClassifierEvaluation({}, (tuple(found), tuple(found)), fits)
    assert both.warnings() == [
        f"temperature (network 1, 2), laplace (network 1): {edge}", f"laplace (network 1): {jitter}",
    ]  # fmt: skip
    assert both.notes()[-2:] == [f"* {warning}" for warning in both.warnings()]
    one = ClassifierEvaluation({}, (tuple(found),), fits[:1])
    assert one.warnings() == [f"temperature, laplace: {edge}", f"laplace: {jitter}"]
    assert one.fitted_table().rows == [
        ["temperature", "T", "1.5", "2", "5"], ["laplace", "T", "1", "1", "1"], ["laplace", "ω", "0.1", "1", "9"],
    ]  # fmt: skip
    assert one.notes()[:-2] == ClassifierEvaluation({}, (tuple(found),)).notes()


# ---------------------------------------------------------------- files


def test_pictures_and_files(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    clean = tuple(method for method in evaluation.seeds[0] if method.test == "clean")
    whole = ClassifierEvaluation({"model": "toy"}, (clean,))
    paths = [*whole.save(tmp_path), *save_classifiers(whole, tmp_path)]
    names = {path.name for path in paths}
    pictures = {f"classify-{what}-clean.{kind}" for what in ("reliability", "curves") for kind in ("svg", "png")}
    assert names == {"results.json", "table.md"} | pictures
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.parse(path)
            assert "<dc:date>" not in path.read_text()
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == "offramp/classifier-evaluation/2"


def test_pictures_show_the_figures(evaluation):
    plots = pytest.importorskip("offramp.report.classifiers")
    pytest.importorskip("matplotlib")
    figure = plots.curves_figure(evaluation, "clean")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == set(evaluation.methods("clean"))
    found = evaluation.of("clean", "vanilla")
    expected = [np.mean([method.points[i].cost / 40 for method in found]) for i in range(39)]
    np.testing.assert_allclose(lines["vanilla"].get_xdata(), expected)
    panels = plots.reliability_figure(evaluation, "clean").axes
    assert len(panels) == 2 * 3  # methods and exits
    dots = panels[0].collections[-1].get_offsets()
    np.testing.assert_allclose(dots, [(b[3], b[4]) for b in found[0].reliability[0]])


def test_ticks_of_a_short_axis_differ():
    pytest.importorskip("matplotlib")
    label = percent()
    assert [label(x, 0) for x in (0.875, 0.8775, 0.88, 0.88125)] == ["87.5%", "87.75%", "88%", "88.125%"]
    assert [label(x, 0) for x in (0, 0.1 + 0.2, 1, -1e-17)] == ["0%", "30%", "100%", "0%"]
