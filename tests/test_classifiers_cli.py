"""Classifiers from the command line: train, calibrate, evaluate, classify, report, on data of a few rows."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from classifier_data import save_bert, save_resnet, write_idx, write_texts
from offramp import cli
from offramp.classifiers.loading import load
from offramp.classifiers.splits import TASKS
from offramp.report.html import pages_of

IMAGES, TEXTS = "image-classification", "text-classification"


def offramp(*arguments, text=None, status=0):
    run = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=text)
    assert run.exit_code == status, run.output
    return run


def fails(*arguments, words, text=None):
    """The command stops with these words."""
    run = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=text)
    assert run.exit_code != 0
    said = run.output if run.exit_code == 2 else str(run.exception)
    assert re.search(words, " ".join(said.replace("│", " ").split())), said
    assert "\n" not in str(run.exception)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images, and two runs of other seeds on it."""
    place = tmp_path_factory.mktemp("images")
    data, resnet = write_idx(place / "bars"), save_resnet(place / "resnet")
    runs = []
    for seed in (0, 1):
        runs.append(place / f"train-bars-{seed}")
        run = offramp(
            "train", resnet, "--task", IMAGES, "--data", data, "--classes", "lying,standing,spot", "--epochs", 3,
            "--batch-size", 24, "--learning-rate", 0.01, "--augment", "none", "--seed", seed, "--out", runs[-1],
            "--json", place / f"train-{seed}.json",
        )  # fmt: skip
    return place, data, runs, run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    data = write_texts(place / "train.tsv", 360)
    dev = write_texts(place / "dev.tsv", 60, seed=1, apart=data)
    arguments = ("--task", TEXTS, "--data", data, "--test-data", dev)
    run = offramp(
        "train", save_bert(place / "bert"), *arguments, "--layout", "sst2", "--epochs", 2, "--learning-rate", 0.01,
        "--layers", "1,2", "--out", place / "run",
    )  # fmt: skip
    return place, arguments, place / "run" / "model", run


@pytest.fixture(scope="module")
def calibrated(images):
    """A calibration with everything."""
    place, data, runs, _ = images
    out = place / "calibrated"
    run = offramp(
        "calibrate", runs[0] / "model", "--task", IMAGES, "--data", data, "--posterior", "mie+laplace", "--draws", 10,
        "--grid", "meronen", "--tolerance", 0.4, "--loss", "gap", "--alpha", 0.2, "--out", out, "--json",
        place / "calibrated.json",
    )  # fmt: skip
    return out, run


# ---------------------------------------------------------------- the way a user goes


def test_training_says_what_is_next_and_that_command_exists(images):
    place, data, runs, run = images
    result = json.loads((place / "train-1.json").read_text())
    assert result["schema"] == "offramp/train-classifier/1"
    assert min(result["accuracy"]) > 0.5  # of three classes
    assert re.search(r"rows: train 1[56]\d, tune 2\d, threshold 2\d, calibrate 2\d, test 60", run.stderr)
    following = re.search(r"next: offramp (.*)", run.stderr)[1].split()
    assert following == ["evaluate", str(runs[1] / "model"), "--task", IMAGES, "--data", str(data)]
    model = load(runs[1] / "model")
    assert model.labels == ("lying", "standing", "spot")
    assert model.trained_on["seed"] == 1
    assert {name: split["rows"] for name, split in model.trained_on["splits"].items()}["test"] == 60


def test_the_same_training_again_is_done_and_another_is_refused(images):
    place, data, runs, _ = images
    before = (runs[0] / "model" / "model.safetensors").read_bytes()
    same = (
        "train", place / "resnet", "--task", IMAGES, "--data", data, "--classes", "lying,standing,spot", "--epochs", 3,
        "--batch-size", 24, "--learning-rate", 0.01, "--augment", "none", "--out", runs[0],
    )  # fmt: skip
    offramp(*same)
    assert (runs[0] / "model" / "model.safetensors").read_bytes() == before
    fails(*same, "--weight-decay", 0.5, words="holds another run: config.weight_decay was 0.01 and is now 0.5")
    fails(*same, "--limit", 100, words="holds another run: .*count was None and is now 100")


def test_calibrate_prints_each_exit_and_what_is_promised(calibrated, images):
    out, run = calibrated
    table = [line for line in run.stdout.splitlines() if line.startswith("| ")]
    assert sum("published formula" in line for line in table) == 3
    assert "mean gap loss of at most 0.4" in run.stdout
    assert "asked to hold the right class at all exits with probability 0.8" in run.stdout
    assert "offramp classify" in run.stderr
    assert {path.name for path in out.iterdir()} == {"posterior", "thresholds", "sets", "result.json", "table.md"}
    values = json.loads((images[0] / "calibrated.json").read_text())
    assert values == json.loads((out / "result.json").read_text())
    assert values["config"]["promise"] == {
        "loss": "gap", "tolerance": 0.4, "failure": 0.05, "bound": "wsr", "reference": None,
    }  # fmt: skip
    assert values["config"]["reference"] == "last-exit"
    assert values["certificate"]["promise"]["reference"] == "the network's own last exit, without the posterior"
    assert "command" in values["conditions"]


def test_evaluate_compares_all_methods_over_seeds(images, monkeypatch):
    monkeypatch.setattr("offramp.report.drawing.available", lambda: False)  # they take long
    place, data, runs, _ = images
    out = place / "evaluated"
    models = [run / "model" for run in runs]
    run = offramp(
        "evaluate", *models, "--task", IMAGES, "--data", data, "--corruption", "contrast", "--draws", 5, "--grid",
        "meronen", "--resamples", 5, "--out", out,
    )  # fmt: skip
    assert "## contrast 3, mean over the budgets" in run.stdout
    for method in ("vanilla", "mie+temperature", "mie+laplace", "full model, vanilla", "static exit, temperature"):
        assert f"| {method} " in run.stdout
    assert "standard deviation over 2 training seeds" in run.stdout
    assert re.search(r"\| temperature, network 2 +\| T \|", run.stdout)
    values = json.loads((out / "results.json").read_text())
    messages = {m for fits in values["fitted"] for fit in fits.values() for m in fit["messages"]}
    assert messages
    assert all(message in run.stdout for message in messages)
    assert values["schema"] == "offramp/classifier-evaluation/2"
    assert len(values["seeds"]) == 2
    assert "test 60" in values["conditions"]["rows"]
    names = {path.name for path in out.iterdir()}
    records = {f"records-{seed}-{test}.jsonl.gz" for seed in (0, 1) for test in ("clean", "contrast-3")}
    assert names == {"results.json", "table.md", *records}


def test_a_report_needs_nothing_beside_it(images, calibrated):
    pytest.importorskip("matplotlib")
    place, data, runs, _ = images
    out = place / "reported"
    offramp(
        "evaluate", runs[0] / "model", "--task", IMAGES, "--data", data, "--methods", "vanilla,temperature",
        "--resamples", 5, "--out", out,
    )  # fmt: skip
    assert {"classify-curves-clean.svg", "classify-reliability-clean.png"} <= {path.name for path in out.iterdir()}
    folders = (out, calibrated[0], runs[0])
    offramp("report", *folders, "--out", place / "report.html")
    text = (place / "report.html").read_text()
    assert text.count("<svg") == 2
    for said in (
        "On clean: mean over the budgets",
        "The certificate",
        "Nested sets, on the test rows",
        "What each exit",
    ):
        assert said in text
    assert len(re.findall(r"<pre>offramp.*?</pre>", text)) == 3  # how to repeat each
    titles = [page.title for run in folders for page in pages_of(run, examples=0, seed=0)]
    assert titles == [
        "Classifier: bars-0", "Calibration of a classifier: bars-0, mie+laplace",
        f"Training of a classifier: {place / 'resnet'}",
    ]  # fmt: skip


def test_pages_of_earlier_results_say_what_they_are_over(images, calibrated):
    place, out = images[0], images[0] / "earlier"
    out.mkdir()
    values = json.loads((calibrated[0] / "result.json").read_text())
    for name in ("choice", "effect", "full_cost"):
        del values[name]
    values["schema"] = "offramp/classifier-calibration/1"
    values["kept"] = {name: values["kept"][name] for name in ("rows", "loss", "saving")}
    (out / "result.json").write_text(json.dumps(values))
    offramp("report", out, "--out", place / "earlier.html")
    assert "an earlier version wrote this. Calibrate again." in (place / "earlier.html").read_text()


def test_the_posterior_is_chosen_unless_it_is_named(images):
    place, data, runs, _ = images
    out = place / "chosen"
    run = offramp("calibrate", runs[0] / "model", "--task", IMAGES, "--data", data, "--out", out)
    values = json.loads((out / "result.json").read_text())
    method = values["choice"]["method"]
    assert method == values["config"]["posterior"]["method"]
    assert f"Posterior: {method}, " in run.stdout
    assert set(values["choice"]["nlpd"]) == {"vanilla", "temperature", "mie", "mie+temperature"}
    assert (values["effect"] is None) == (method == "vanilla")
    run = offramp(
        "calibrate", runs[0] / "model", "--task", IMAGES, "--data", data, "--posterior", "mie", "--out", place / "mie"
    )
    assert re.search(
        r"mie (helps|HURTS|was not shown to help or to hurt): against none it changes the NLPD", run.stdout
    )


def test_classify_by_budget_threshold_and_certificate(images, calibrated):
    image = pytest.importorskip("PIL.Image")
    place, data, runs, _ = images
    from offramp.tasks.images import read_idx

    rows, files = read_idx(data, ("lying", "standing", "spot"))["test"], []
    for row in range(12):
        files.append(place / f"{row}.png")
        image.fromarray(rows.inputs[row, ..., 0]).save(files[-1])
    model, out = runs[0] / "model", calibrated[0]

    def answers(*arguments, text=None):
        return json.loads(offramp("classify", model, *arguments, "--json", "-", text=text).stdout)

    shares = []
    for budget in (0.7, 0.95):
        found = answers(*files, "--posterior", out, "--budget", budget)
        assert found["rule"]["budget"] == budget
        assert found["mean_share"] == pytest.approx(sum(a["share"] for a in found["answers"]) / 12)
        assert [a["given"] for a in found["answers"]] == list(map(str, files))
        for answer in found["answers"]:
            assert answer["label"] in ("lying", "standing", "spot")
            assert answer["probability"] == max(answer["probabilities"].values())
            assert set(answer["set"]) <= {"lying", "standing", "spot"}
        shares.append(found["mean_share"])
    assert shares[0] < shares[1]
    right = [a["label"] == rows.classes[int(label)] for a, label in zip(found["answers"], rows.labels, strict=False)]
    assert sum(right) > 6
    # one per line of standard input; without a posterior
    plain = answers("--threshold", "2", text="\n".join(map(str, files)) + "\n")
    assert {a["exit"] for a in plain["answers"]} == {3}
    classifier = load(model)
    of_plain = float(classifier.costs(_pixels())[-1] / classifier.costs(_pixels(), cut=True)[-1])
    assert of_plain > 1  # tested at each exit, all heads are computed
    assert [a["share"] for a in plain["answers"]] == pytest.approx([of_plain] * 12)
    assert {a["set"] for a in plain["answers"]} == {None}
    assert {a["exit"] for a in answers(*files, "--threshold", "2,-1")["answers"]} == {2}
    # with a certificate that is the rule
    certified = json.loads((out / "result.json").read_text())["certificate"]["threshold"]
    rule = answers(*files, "--posterior", out)["rule"]
    assert rule["thresholds"] == [certified]
    assert rule["words"].endswith("(its promise is against the network's own last exit, without the posterior)")
    for other in ("entropy", "gap"):  # not what was certified
        fails("classify", model, files[0], "--posterior", out, "--confidence", other,
              words=f"is certified for --confidence max, not for {other}")  # fmt: skip
    own = answers(*files, "--posterior", out, "--confidence", "gap", "--threshold", 0.5)
    assert own["rule"]["thresholds"] == [0.5]
    run = offramp("classify", model, files[0], "--posterior", out, "--budget", 0.7)
    assert re.fullmatch(
        r"(lying|standing|spot) +0\.\d{3}  exit [123]/3  [01]\.\d{3} of the full network's FLOPs  \{.*\}  .*\n",
        run.stdout,
    )
    assert "a budget of 0.700 of the plain full network's FLOPs (on the threshold split 0." in run.stderr
    fails("classify", model, files[0], "--posterior", out, "--budget", 0.01, words=r"allowed are \d+ FLOPs per row")


def _pixels():
    return torch.zeros(1, 1, 8, 8)


def test_texts_from_training_to_answers(texts):
    place, arguments, model, run = texts
    assert f"--test-data {place / 'dev.tsv'}" in run.stderr
    out = place / "calibrated"
    offramp("calibrate", model, *arguments, "--posterior", "mie+temperature", "--out", out)
    lines = "good great film\nbad dull the poor plot\n\n"
    found = json.loads(
        offramp("classify", model, "--posterior", out, "--budget", 0.7, "--json", "-", text=lines).stdout
    )
    assert [(a["given"], a["label"]) for a in found["answers"]] == [
        ("good great film", "positive"), ("bad dull the poor plot", "negative"),
    ]  # fmt: skip
    shown = offramp("classify", model, "good\tgreat film\nbad", "x" * 61).stdout
    assert "  good\tgreat film\\nbad\n" in shown  # tabs stay, a line end is no line end
    assert f"  {'x' * 59}…\n" in shown
    long = " ".join(["good"] * 40)  # the tokenizer takes 32 tokens, two of them special
    run = offramp("classify", model, "--posterior", out, "--json", place / "cut.json", text=f"bad film\n{long}\n")
    assert "1 of 2 texts were too long and were classified without their end: input 2" in run.stderr
    found = json.loads((place / "cut.json").read_text())
    assert [a["tokens_cut"] for a in found["answers"]] == [0, 10]
    assert found["texts_cut"] == 1
    run = offramp(
        "evaluate", model, *arguments, "--methods", "vanilla,temperature", "--resamples", 0, "--limit", 40, "--out",
        place / "evaluated",
    )  # fmt: skip
    assert "| mie" not in run.stdout
    fails(
        "evaluate", model, *arguments, "--corruption", "blur", words="--corruption: only of images, and these are texts"
    )


# ---------------------------------------------------------------- two forms of a command


def test_usage_lines_show_the_command_that_was_typed(images):
    for command in cli.OF_CLASSIFIERS:
        run = offramp(command, "--task", IMAGES, "--nonsense", status=2)
        assert f"Usage: offramp {command} --task {IMAGES} [OPTIONS]" in " ".join(run.output.split())
        assert f"{command}-classifier" not in run.output
    run = offramp("distill", "--task", "language-modelling", "--nonsense", status=2)
    assert "distill --task language-modelling [OPTIONS]" in " ".join(run.output.split())
    assert "Usage: offramp evaluate-classifier" in offramp("evaluate-classifier", "--help").output


def test_the_task_chooses_the_options():
    assert all("classif" in task for task in TASKS)
    for command in cli.OF_CLASSIFIERS:
        plain = offramp(command, "--help").stdout
        for form in ((command, "--task", TEXTS), (command, f"--task={IMAGES}"), (f"{command}-classifier",)):
            help_ = offramp(*form, "--help").stdout
            assert "--test-data" in help_
            assert help_ != plain
        assert "--test-data" not in plain
        assert offramp(command, "--task", "translation", "--help").stdout == plain


def test_bad_input_is_one_line(images, texts, calibrated, tmp_path):
    place, data, runs, _ = images
    model = runs[0] / "model"
    task = ("--task", IMAGES, "--data")
    words = ("--task", TEXTS, "--data")
    train = ("train", place / "resnet", *task)
    fails(*train, tmp_path, words="holds no image as CLASS/NAME.png")
    fails(*train, tmp_path, "--layout", "idx", words="train-images-idx3-ubyte is missing")
    fails(*train, data, "--classes", "a,b", words=r"label 2; allowed are 0\.\.1")
    fails(*train, data, "--layout", "sst2", words="layout for image-classification is 'sst2'; allowed are None, 'idx'")
    fails("train", "msdnet-small", "--task", "images-classification", "--data", data, words="task is 'images-classif")
    fails(*train, data, "--augment", "mirror", words="--augment mirror: choose one of crop-flip")
    fails(*train, data, "--layers", "9", words="9")
    fails(*train, data, "--epochs", "0", words="epochs is 0")
    fails("train", "msdnet-small", *words, texts[0] / "dev.tsv", "--layout", "sst2", words="is a network for images")
    one = tmp_path / "one.tsv"
    one.write_text("".join(f"a good film {i}\t1\n" for i in range(50)))
    fails("train", texts[0] / "bert", *words, one, "--layout", "sst2", words="rows of one class only")
    same = ("--test-data", texts[0] / "dev.tsv", "--layout", "sst2")
    fails(
        "train",
        texts[0] / "bert",
        *words,
        texts[0] / "dev.tsv",
        *same,
        words=r"60 rows of .*dev\.tsv are in .* too",
    )
    other = write_idx(tmp_path / "other", train=230)
    for command in ("calibrate", "evaluate"):
        fails(command, model, *task, other, words="is not what the model was trained and divided with")
        fails(command, model, *words, one, words="was trained for image-classification, not for text")
        fails(command, runs[0], *task, data, words="no classifier, or one of another version")
        fails(command, tmp_path / "none", *task, data, words="holds no classifier")
    fails("calibrate", model, *task, data, "--posterior", "platt", words="method is 'platt'; allowed are 'vanilla'")
    fails("calibrate", model, *task, data, "--tolerance", 0.1, "--loss", "f1", words="--loss f1: choose one of")
    fails("calibrate", model, *task, data, "--alpha", 2, words="alpha is 2")
    wrong = ("--tolerance", 0.1, "--reference", "x")
    fails("calibrate", model, *task, data, *wrong, words="reference is 'x'; allowed are 'last-exit', 'posterior'")
    fails("classify", model, "x.png", "--budget", 0.5, words="--budget needs --posterior")
    both = ("--posterior", calibrated[0], "--budget", 0.7)
    fails("classify", model, "x.png", *both, "--threshold", 1, words="give one of --budget and --threshold")
    fails("classify", model, "x.png", *both, words="x.png is missing; give an image")
    fails("classify", runs[1] / "model", "x.png", *both, words="was fitted on another network")
    fails("classify", model, *both, text="", words="standard input is empty; give the inputs")
    fails("classify", model, *both, text=b"a.png\n\xffx.png\n", words="standard input, line 2 is not UTF-8")
