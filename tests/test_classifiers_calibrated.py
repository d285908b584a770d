"""From a trained classifier to answers: passes that are kept, posteriors that belong to it, exits really taken."""

import gzip
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from classifier_data import save_bert, write_idx, write_texts
from offramp.classifiers import cached_outputs as passes_module
from offramp.classifiers.architectures import build
from offramp.classifiers.cached_outputs import CachedOutputs
from offramp.classifiers.calibrate import CalibrationConfig, calibrate, exit_table
from offramp.classifiers.calibrated import Calibrated, load_calibrated
from offramp.classifiers.certify import RowPromise
from offramp.classifiers.classify import answers
from offramp.classifiers.evaluate import Settings, charged
from offramp.classifiers.evaluate_classifier import ComparisonConfig, compare
from offramp.classifiers.evaluate_classifier import fitted as fit_method
from offramp.classifiers.loading import load
from offramp.classifiers.result import ClassifierEvaluation
from offramp.classifiers.splits import IMAGES, TEXTS, DataConfig, divide, record
from offramp.metrics.calibration import grade
from offramp.risk import budgets
from offramp.risk.losses import performance_gap
from offramp.runs import artefact
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.uncertainty import nested_conformal
from offramp.uncertainty.outputs import ExitOutputs
from offramp.uncertainty.posterior import PosteriorConfig

pytestmark = pytest.mark.filterwarnings("ignore:.* are longer than 9 tokens and lose the rest:UserWarning")
QUICK = PosteriorConfig("mie+laplace", n_mc=8, grid="meronen")


def saved(architecture, config, data, folder, seed=0):
    """A classifier in a folder with the record of its data; its heads are drawn wide, so that it is sure at times."""
    splits = divide(config, data)
    model = build(architecture, splits["train"], seed=seed).eval()
    for place, head in enumerate(model.heads):
        torch.nn.init.normal_(
            head.linear.weight, std=1.5 * (place + 1), generator=torch.Generator().manual_seed(seed + place)
        )
    model.trained_on = record(config, splits)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    data = write_idx(place / "idx", train=180, test=40)
    return saved("msdnet-small", DataConfig(IMAGES), data, place / "run" / "model"), data


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    bert, data = save_bert(place / "bert"), write_texts(place / "rows.tsv", 400)
    return saved(str(bert), DataConfig(TEXTS, layout="sst2", longest=9), data, place / "run" / "model"), data


@pytest.fixture(scope="module")
def fitted(images, tmp_path_factory):
    """Everything calibrated for the images."""
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    config = CalibrationConfig(QUICK, promise=RowPromise("gap", 0.3, 0.2), alpha=0.2)
    return passes, folder, calibrate(passes.outputs, config, folder, network=passes.network)


# ---------------------------------------------------------------- passes


def counted(monkeypatch):
    """Which passes are made."""
    made, collect = [], passes_module.collect

    def counting(*arguments, path, **options):
        made.append(path.name)
        return collect(*arguments, path=path, **options)

    monkeypatch.setattr(passes_module, "collect", counting)
    return made


def test_a_pass_is_made_once_and_says_what_the_exits_say(texts, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    heard = []
    passes = CachedOutputs.of(
        texts[0], texts[1], task=TEXTS, folder=tmp_path, batch_size=16, progress=lambda *a: heard.append(a)
    )
    found = passes.outputs("tune")
    again = CachedOutputs.of(texts[0], texts[1], task=TEXTS, folder=tmp_path).outputs("tune")
    assert made == ["tune.safetensors"]
    count = len(passes.splits["tune"])
    assert heard[0] == (0, count, "tune")
    assert heard[-1] == (count, count, "tune")
    assert torch.equal(found.logits, again.logits)
    assert set(found.ids) == set(passes.splits["tune"].ids)
    # row by row, without padding, against the classifier itself
    model, by_id = load(texts[0]), dict(zip(found.ids, range(found.rows), strict=True))
    rows = passes.splits["tune"]
    for place in range(0, count, 7):
        inputs = model.tokenizer(rows.inputs[place], return_tensors="pt", truncation=True, max_length=9)
        with torch.no_grad():
            logits = torch.stack([one.logits[0] for one in model(dict(inputs))])
        at = by_id[rows.ids[place]]
        torch.testing.assert_close(found.logits[:, at], logits, atol=1e-5, rtol=1e-4)
        assert found.labels[at] == rows.labels[place]


def test_a_pass_of_other_weights_or_rows_is_made_anew(texts, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    passes = CachedOutputs.of(texts[0], texts[1], task=TEXTS, folder=tmp_path)
    passes.outputs("tune")
    passes.on("tune", passes.splits["test"])
    other = replace(passes, classifier=load(texts[0]))
    torch.nn.init.normal_(other.classifier.heads[0].linear.weight)
    other.on("tune", passes.splits["test"])
    other.on("tune", passes.splits["test"])
    assert made == ["tune.safetensors"] * 3


def test_outputs_that_an_earlier_version_kept_get_the_costs_they_lack(texts, tmp_path, monkeypatch):
    made = counted(monkeypatch)
    passes = CachedOutputs.of(texts[0], texts[1], task=TEXTS, folder=tmp_path)
    new = passes.outputs("tune")
    header, tensors = read_tensors(tmp_path / "tune.safetensors", "")
    write_tensors(tmp_path / "tune.safetensors", {n: t for n, t in tensors.items() if n != "cut"}, header)
    found = passes.outputs("tune")
    assert made == ["tune.safetensors"]
    assert found.cut.tolist() == pytest.approx(new.cut.tolist())
    assert found.full_cost < float(found.costs[-1])


def test_a_run_of_another_task_or_data_has_no_passes(texts, images):
    with pytest.raises(ValueError, match="not for image-classification"):
        CachedOutputs.of(texts[0], texts[1], task=IMAGES)
    with pytest.raises(FileNotFoundError):
        CachedOutputs.of(images[0], texts[1], task=IMAGES)
    with pytest.raises(ValueError, match="batch_size is 0"):
        CachedOutputs.of(images[0], images[1], task=IMAGES, batch_size=0)


# ---------------------------------------------------------------- calibration


def test_each_step_reads_its_own_split(images, tmp_path):
    """Outputs of the splits that a step must not see are made unreadable."""
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)
    reads = []

    def outputs(name):
        reads.append(name)
        return passes.outputs(name)

    def run(**options):
        reads.clear()
        calibrate(outputs, CalibrationConfig(**options), tmp_path / "out", network="n")
        return set(reads)

    assert run(posterior=PosteriorConfig("temperature")) == {"tune", "threshold"}
    assert run(posterior=QUICK) == {"train", "tune", "threshold"}
    assert run(posterior=QUICK, fit_on="tune") == {"tune", "threshold"}
    promise = RowPromise("consistency", 0.4, bound="binomial")
    assert run(posterior=PosteriorConfig("vanilla"), promise=promise) == {"tune", "threshold", "calibrate", "test"}


def test_metrics_before_and_after_are_those_of_the_threshold_split(fitted):
    passes, _, result = fitted
    rows = passes.outputs("threshold")
    p = result.calibrated.posterior.probabilities(rows)
    for e in range(4):
        soft = rows.logits[e].double().softmax(-1)
        assert result.before[e]["top1"] == pytest.approx(float((soft.argmax(-1) == rows.labels).double().mean()))
        nlpd = -p[e][torch.arange(rows.rows), rows.labels].clamp(min=1e-12).log().mean()
        assert result.after[e]["nlpd"] == pytest.approx(float(nlpd))
        assert result.after[e]["ece"] == pytest.approx(float(_ece(p[e], rows.labels)))
    table = result.table()
    assert table.count("published formula") == 4
    assert all(message in table for message in result.calibrated.posterior.messages)


def test_costs_in_the_table_are_over_those_of_the_same_rows(images, tmp_path):
    """Texts of two splits are not equally long: a posterior's costs are those of the tune split."""
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)

    def outputs(name):
        rows = passes.outputs(name)
        factor = 2 if name == "tune" else 1
        return replace(rows, costs=rows.costs * factor, cut=rows.cut * factor)

    config = CalibrationConfig(PosteriorConfig("temperature"))
    result = calibrate(outputs, config, tmp_path / "out", network=passes.network)
    plain = float(passes.classifier.costs(cut=True)[-1])  # the network without the heads of earlier exits
    assert plain < 0.8 * float(passes.classifier.costs()[-1])
    assert result.calibrated.full_cost == pytest.approx(plain)
    shares = [float(row[1]) for row in exit_table(result.to_dict()).rows]
    assert shares == pytest.approx((result.calibrated.costs / plain).tolist(), abs=6e-4)
    assert shares[-1] >= 1


def test_verdicts_name_the_rows_they_are_about(fitted):
    text = fitted[2].table()
    said = text.index("On the rows of the tune split, on which both were tuned:")
    assert text.index("of the threshold split") < said < text.index("exit 1: Laplace ")
    assert "tune split" not in replace(fitted[2], calibrated=_without_laplace(fitted[2].calibrated)).table()


def _without_laplace(calibrated):
    exits = tuple(replace(exit_, comparison=None) for exit_ in calibrated.posterior.exits)
    return replace(calibrated, posterior=replace(calibrated.posterior, exits=exits))


def _ece(p, labels, bins=15):
    """As a loop over bins."""
    sure, right, total = p.amax(-1), (p.argmax(-1) == labels).double(), 0.0
    for b in range(bins):
        inside = (sure >= b / bins) & ((sure < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            total += inside.double().mean() * (right[inside].mean() - sure[inside].mean()).abs()
    return total


def test_the_certificate_is_about_the_calibrate_rows_and_checked_on_the_test_rows(fitted):
    passes, _, result = fitted
    threshold = result.calibrated.certified
    assert result.certificate.n == passes.outputs("calibrate").rows
    rows = passes.outputs("test")
    p = result.calibrated.posterior.probabilities(rows)
    exits = budgets.leave(p.amax(-1), torch.full((4,), threshold, dtype=torch.float64))
    right = rows.logits.argmax(-1)[-1] == rows.labels  # of the plain network's last exit, which nothing was fitted to
    mine = p.argmax(-1)[exits, torch.arange(rows.rows)] == rows.labels
    assert result.kept["loss"] == pytest.approx(float((right.double() - mine.double()).mean()))
    assert result.kept["loss"] == result.kept["losses"]["last-exit"]
    losses = performance_gap(p, rows.labels)[exits, torch.arange(rows.rows)]
    assert result.kept["losses"]["posterior"] == pytest.approx(float(losses.mean()))
    costs = charged(rows.costs, result.calibrated.posterior)
    assert result.kept["saving"] == pytest.approx(1 - float(costs[exits].mean()) / rows.full_cost)
    assert result.kept["saving_with_heads"] == pytest.approx(1 - float(costs[exits].mean() / costs[-1]))
    assert "against the network's own last exit, without the posterior" in result.certificate.words()
    text = result.table()
    assert f"{result.kept['losses']['posterior']:.4f} against the ensemble of all exits" in text
    assert "of the plain full network's FLOPs" in text or "more than the plain full network's FLOPs" in text


def test_a_promise_may_be_against_the_posterior(images, tmp_path):
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)
    promise = RowPromise("consistency", 0.6, 0.2, "binomial")
    found = {}
    for reference in ("last-exit", "posterior"):
        config = CalibrationConfig(PosteriorConfig("mie"), promise=promise, reference=reference)
        found[reference] = calibrate(passes.outputs, config, tmp_path / reference, network=passes.network)
    rows = passes.outputs("calibrate")
    p = found["posterior"].calibrated.posterior.probabilities(rows)
    never = float((p[-1].argmax(-1) != rows.logits[-1].argmax(-1)).double().mean())
    assert found["posterior"].certificate.tests[0]["loss"] == 0  # the ensemble against itself
    assert found["last-exit"].certificate.tests[0]["loss"] == never > 0  # and against what was deployed
    assert "against the ensemble of all exits that the posterior makes of the last" in found["posterior"].table()
    with pytest.raises(ValueError, match="reference is 'first-exit'; allowed are 'last-exit', 'posterior'"):
        CalibrationConfig(reference="first-exit")


def test_nothing_certified_says_so_of_the_ensemble_too(images, tmp_path):
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)
    config = CalibrationConfig(PosteriorConfig("mie"), promise=RowPromise("consistency", 0.01, 0.01, "binomial"))
    certificate = calibrate(passes.outputs, config, tmp_path / "out", network=passes.network).certificate
    assert not certificate.certified
    assert "That the rows never leave early is not certified either" in certificate.words()


def assert_nearly_equal(got, wanted):
    """JSON values alike but for the last digits of numbers, which on some processors follow where tensors lie."""
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        for one, other in zip(got, wanted, strict=True):
            assert_nearly_equal(one, other)
    else:
        assert got == (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted)


def test_what_was_calibrated_comes_back_from_its_folder(fitted, images):
    passes, folder, result = fitted
    got = load_calibrated(folder, passes.network)
    rows = passes.outputs("test")
    want = result.calibrated.posterior.probabilities(rows)
    torch.testing.assert_close(got.posterior.probabilities(rows), want, rtol=1e-12, atol=1e-15)
    assert torch.equal(got.confidences, result.calibrated.confidences)
    assert torch.equal(got.costs, result.calibrated.costs)
    assert got.certified == result.calibrated.certified
    members = nested_conformal.apply_classes(got.sets, got.posterior.probabilities(rows)).members
    expected = nested_conformal.apply_classes(result.calibrated.sets, got.posterior.probabilities(rows)).members
    assert torch.equal(members, expected)
    written = json.loads((folder / "result.json").read_text())
    assert written["certificate"]["words"] == result.certificate.words()
    assert len(written["exits"]) == 4
    with pytest.raises(ValueError, match="was fitted on another network"):
        load_calibrated(folder, "0" * 64)
    with pytest.raises(ValueError, match="holds no posterior of a classifier"):
        load_calibrated(images[0], passes.network)


def test_thresholds_of_another_posterior_are_refused_and_old_sets_go(fitted, tmp_path):
    passes, _, _ = fitted
    both = (tmp_path / "one", tmp_path / "two")
    for folder, method in zip(both, ("temperature", "mie"), strict=True):
        alpha = 0.2 if method == "mie" else None
        config = CalibrationConfig(PosteriorConfig(method), alpha=alpha)
        calibrate(passes.outputs, config, folder, network=passes.network)
    assert (both[1] / "sets").is_dir()
    calibrate(passes.outputs, CalibrationConfig(PosteriorConfig("mie")), both[1], network=passes.network)
    assert load_calibrated(both[1], passes.network).sets is None
    (both[0] / "thresholds").rename(both[0] / "aside")
    (both[1] / "thresholds").rename(both[0] / "thresholds")
    with pytest.raises(ValueError, match="thresholds in .* are of another posterior"):
        load_calibrated(both[0], passes.network)


def test_sets_of_another_posterior_are_refused_and_go_when_there_are_none(fitted, tmp_path):
    passes, folder, result = fitted
    shutil.copytree(folder, tmp_path / "own")
    outputs = passes.outputs
    other = CalibrationConfig(PosteriorConfig("temperature"), alpha=0.2)
    calibrate(outputs, other, tmp_path / "other", network=passes.network)
    shutil.rmtree(tmp_path / "own" / "sets")
    shutil.copytree(tmp_path / "other" / "sets", tmp_path / "own" / "sets")
    with pytest.raises(ValueError, match="sets in .* are of another posterior; calibrate again"):
        load_calibrated(tmp_path / "own", passes.network)
    replace(result.calibrated, sets=None).save(tmp_path / "own")  # nor may they stay behind
    assert load_calibrated(tmp_path / "own", passes.network).sets is None
    artefact.save(result.calibrated.sets, tmp_path / "own" / "sets")  # as they were once saved, without a posterior
    with pytest.raises(ValueError, match="cannot be read .*; calibrate again"):
        load_calibrated(tmp_path / "own", passes.network)


def test_a_folder_with_something_else_is_left_alone(fitted, images):
    passes, _, _ = fitted
    with pytest.raises(FileExistsError, match="something else"):
        calibrate(passes.outputs, CalibrationConfig(), images[0], network=passes.network)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("asked", [0.3, 0.55, 0.9])
def test_a_budget_is_met_on_the_threshold_rows(fitted, asked):
    calibrated = fitted[2].calibrated
    budget = calibrated.budget(asked)
    full = float(fitted[0].classifier.costs(cut=True)[-1])  # half of it is half of what runs without early exits
    assert budget.target == pytest.approx(asked * full)
    exits = budgets.leave(calibrated.confidences, budget.thresholds)
    assert budget.realised == pytest.approx(float(calibrated.costs[exits].mean()))
    assert abs(budget.realised - budget.target) < 0.1 * full  # of 18 rows
    same = calibrated.budget(asked * full)  # in FLOPs
    assert torch.equal(same.thresholds, budget.thresholds)


def test_thresholds_of_an_earlier_version_know_no_shares(fitted, tmp_path):
    calibrated = fitted[2].calibrated
    replace(calibrated, full_cost=None).save(tmp_path)  # as it was written then
    earlier = load_calibrated(tmp_path, fitted[0].network)
    with pytest.raises(ValueError, match="give FLOPs per row, or calibrate again"):
        earlier.budget(0.5)
    flops = 0.5 * float(calibrated.full_cost)
    assert torch.equal(earlier.budget(flops).thresholds, calibrated.budget(0.5).thresholds)


@pytest.mark.parametrize("asked", [0.01, -1.0, 3.0, float("nan"), 1e15])
def test_a_budget_out_of_reach_says_what_can_be_had(fitted, asked):
    calibrated = fitted[2].calibrated
    with pytest.raises(ValueError, match=r"allowed are \d+ FLOPs per row .* to \d+"):
        calibrated.budget(asked)


def test_answers_are_those_of_all_exits_chosen_afterwards(texts, tmp_path):
    passes = CachedOutputs.of(texts[0], texts[1], task=TEXTS, folder=tmp_path)
    config = CalibrationConfig(replace(QUICK, n_mc=5), alpha=0.3)
    calibrate(passes.outputs, config, tmp_path / "out", network=passes.network)
    calibrated = load_calibrated(tmp_path / "out", passes.network)
    thresholds = calibrated.budget(0.6).thresholds
    rows = passes.splits["test"]
    outputs = passes.outputs("test")
    p = calibrated.posterior.probabilities(outputs)
    exits = budgets.leave(p.amax(-1), thresholds)
    members = nested_conformal.apply_classes(calibrated.sets, p).members
    assert len(set(exits.tolist())) > 1
    found = answers(passes.classifier, rows.inputs, calibrated=calibrated, thresholds=thresholds, batch_size=7)
    by_id = dict(zip(rows.ids, found, strict=True))
    added = [calibrated.posterior.overhead(e).counted for e in range(3)]
    for at, name in enumerate(outputs.ids):
        got, e = by_id[name], int(exits[at])
        assert got.exit == e + 1
        assert got.layer == passes.classifier.layers[e]
        assert got.probability == pytest.approx(float(p[e, at].max()), abs=1e-4)
        assert got.label == rows.classes[int(p[e, at].argmax())]
        assert set(got.set) == {rows.classes[c] for c in members[e, at].nonzero()[:, 0].tolist()}
        ratio = (got.flops - sum(added[: e + 1])) / (got.flops / got.share)
        assert ratio == pytest.approx((e + 1) / 3, abs=0.02)  # three like blocks


def test_later_blocks_are_not_run(fitted, images, monkeypatch):
    passes, _, result = fitted
    files = _pictures(passes, 3, images[1].parent)
    deepest = []
    run = passes.classifier.backbone.run
    monkeypatch.setattr(passes.classifier.backbone, "run", lambda s, lo, hi: deepest.append(hi) or run(s, lo, hi))
    found = answers(passes.classifier, files, calibrated=result.calibrated, thresholds=-1.0)
    assert {a.exit for a in found} == {1}
    assert max(deepest[:1]) == 1  # the costs are counted after that, on shapes
    found = answers(passes.classifier, files, calibrated=result.calibrated)
    assert {a.exit for a in found} == {4}
    assert all(a.share > 1 for a in found)  # the full network and the posterior


def _pictures(passes, count, folder):
    image = pytest.importorskip("PIL.Image")
    rows, files = passes.splits["test"], []
    for place in range(count):
        files.append(str(folder / f"{place}.png"))
        image.fromarray(rows.inputs[place, ..., 0]).save(files[-1])
    return files


def test_an_image_is_classified_as_the_row_it_was(fitted, images):
    passes, _, result = fitted
    files = _pictures(passes, 4, images[1].parent)
    found = answers(passes.classifier, files, calibrated=result.calibrated)
    outputs = passes.outputs("test")
    p = result.calibrated.posterior.probabilities(outputs)[-1]
    for place, answer in enumerate(found):
        at = outputs.ids.index(passes.splits["test"].ids[place])
        assert list(answer.probabilities.values()) == pytest.approx(p[at].tolist(), abs=1e-4)
    with pytest.raises(FileNotFoundError, match="is missing; give an image"):
        answers(passes.classifier, ["none.png"])


def test_pairs_need_two_texts(tmp_path):
    bert = save_bert(tmp_path / "bert")
    lines = [f"a film\tgood plot {i}\t{i % 3}" for i in range(120)]
    (tmp_path / "pairs.tsv").write_text("one\ttwo\tlabel\n" + "\n".join(lines) + "\n")
    config = DataConfig(TEXTS, text="one", pair="two")
    model = load(saved(str(bert), config, tmp_path / "pairs.tsv", tmp_path / "model"))
    (answer,) = answers(model, ["a film\tgood plot"])
    inputs = model.tokenizer("a film", "good plot", return_tensors="pt")
    with torch.no_grad():
        expected = model(dict(inputs))[-1].logits.softmax(-1)[0]
    assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    for wrong in ("a film", "a film\t"):
        with pytest.raises(ValueError, match="is no pair of texts; put a tab"):
            answers(model, [wrong])
    with pytest.raises(ValueError, match="nothing to classify"):
        answers(model, [])


# ---------------------------------------------------------------- comparing


def test_two_seeds_compared_from_files_to_files(images, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.report.drawing.available", lambda: False)  # they take long
    model, data = images
    other = saved("msdnet-small", DataConfig(IMAGES, seed=1), data, tmp_path / "other" / "model", seed=1)
    methods = ("vanilla", "temperature", "mie", "laplace")
    config = ComparisonConfig(methods, QUICK, corruptions=("noise",), limit=24, settings=Settings(resamples=20))

    def run():
        networks = [CachedOutputs.of(path, data, task=IMAGES) for path in (model, other)]
        return compare(networks, config, tmp_path / "out", conditions={"model": "tiny"}), networks

    found, networks = run()
    assert found.tests == ("clean", "noise 3")
    assert len(found.seeds) == 2
    summary = found.mean("clean", "temperature", "nlpd")
    each = [m.mean["nlpd"].value for m in found.of("clean", "temperature")]
    assert (summary.mean, summary.sd) == (pytest.approx(np.mean(each)), pytest.approx(np.std(each, ddof=1)))
    # records agree with the posterior and the outputs they were made of
    rows = [json.loads(line) for line in gzip.open(tmp_path / "out" / "records-1-noise-3.jsonl.gz", "rt")]
    assert len(rows) == 24
    outputs = networks[1].outputs("threshold")
    assert isinstance(outputs, ExitOutputs)
    alone = found.of("noise 3", "vanilla")[1].alone
    for exit_ in range(4):
        right = np.mean([row["methods"]["vanilla"]["class"][exit_] == row["label"] for row in rows])
        assert alone[exit_].metrics["top1"] == pytest.approx(right)
    # how they were fitted is kept and told, with what there was to warn of
    for network, fits in zip(networks, found.fitted, strict=True):
        for method in methods:
            posterior = fit_method(network, replace(QUICK, method=method), "train")
            assert fits[method].temperatures == tuple(exit_.temperature for exit_ in posterior.exits)
            assert fits[method].messages == posterior.messages
        assert fits["laplace"].priors == tuple(exit_.omega for exit_ in posterior.exits)
        assert fits["temperature"].priors is None
    messages = [message for fits in found.fitted for message in fits["laplace"].messages]
    assert messages  # of a tiny network some setting is at an edge
    assert all(any(message in note for note in found.notes()) for message in messages)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert ClassifierEvaluation.from_dict(kept) == found
    del kept["fitted"]  # as it once was
    assert ClassifierEvaluation.from_dict(kept).fitted == ()
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"* {warning}" in table for warning in found.warnings())
    assert re.search(rf"laplace, network 2 +\| +ω \| +{found.fitted[1]['laplace'].priors[0]:.3g} ", table)
    # a static exit is charged a network cut there
    static = found.of("clean", "static exit, vanilla")[0]
    heads = static.alone[3].cost
    assert heads < found.of("clean", "vanilla")[0].alone[3].cost
    assert heads == pytest.approx(float(networks[0].classifier.costs(cut=True)[-1]), rel=1e-6)
    assert found.of("clean", "full model, vanilla")[0].mean["cost"].value == pytest.approx(1, rel=1e-5)
    # again: no pass and no fit
    made = counted(monkeypatch)
    monkeypatch.setattr("offramp.classifiers.evaluate_classifier.fit_posterior", None)
    again, _ = run()
    assert made == []
    assert_nearly_equal(again.to_dict(), found.to_dict())


def test_networks_that_cannot_be_averaged_are_refused(images, texts, tmp_path):
    passes = CachedOutputs.of(images[0], images[1], task=IMAGES)
    with pytest.raises(ValueError, match="are the same"):
        compare([passes, passes], ComparisonConfig(), tmp_path, conditions={})
    with pytest.raises(ValueError, match="layers of one network"):
        compare([passes, CachedOutputs.of(texts[0], texts[1], task=TEXTS)], ComparisonConfig(), tmp_path, conditions={})
    config = ComparisonConfig(("vanilla",), corruptions=("blur",))
    with pytest.raises(ValueError, match="corruptions are for images"):
        compare([CachedOutputs.of(texts[0], texts[1], task=TEXTS)], config, tmp_path, conditions={})
    for options, words in (
        ({"methods": ("lapalce",)}, "method is 'lapalce'.* mean 'laplace'"), ({"methods": ()}, "no method is named"),
        ({"corruptions": ("fog",)}, "corruption is 'fog'"), ({"severity": 6}, "severity is 6"),
        ({"limit": 1}, "limit is 1"), ({"fit_on": "test"}, "fit_on is 'test'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ComparisonConfig(**options)
    (tmp_path / "results.json").write_text('{"schema": "offramp/evaluate/1"}')
    with pytest.raises(ValueError, match="results of another kind"):
        compare([passes], ComparisonConfig(), tmp_path, conditions={})


def test_calibrated_of_a_split_charges_the_posterior(fitted):
    passes, _, result = fitted
    found = Calibrated.of(result.calibrated.posterior, passes.outputs("threshold"))
    outputs = passes.outputs("threshold")
    for e in range(4):
        added = sum(result.calibrated.posterior.overhead(at).counted for at in range(e + 1))
        assert float(found.costs[e]) == float(outputs.costs[e]) + added
    graded = grade(result.calibrated.posterior.probabilities(outputs)[2], outputs.labels)
    assert np.array_equal(found.confidences[2].numpy(), graded.confidence)
