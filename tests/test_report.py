"""The HTML report: nothing beside it is needed, whatever data says is escaped, and figures are those of the runs."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

import browser
import evaluation_runs
import scripted_calibration
import training_runs
from evaluation_runs import examples, model
from offramp import ExitPolicy, cli
from offramp.calibration import Promise, calibrate, decoded
from offramp.evaluation import Evaluation, Passage, evaluate_perplexity, read_records
from offramp.lm.probe import probe
from offramp.lm.probe_result import Probe
from offramp.report import evaluation, training
from offramp.report.blocks import Picture, inline
from offramp.report.html import report
from offramp.runs.files import write_json
from offramp.runs.folder import RunFolder
from offramp.runs.resume import read_lines, write_lines

pytest.importorskip("matplotlib")
KINDS = ("evaluation", "training", "probe", "calibration")
COSTS = ("flops_ratio", "flops_per_token_ratio", "seconds_ratio")
SECTIONS = {
    "evaluation": ["In short", "Examples", "Pareto front", "Where tokens leave", "Costs by part", "Quality and cost"],
    "training": ["What each exit reached", "Training curves"],
    "probe": ["Is it worth it?", "Confidence and accuracy by layer"],
    "calibration": ["The certificate", "What was tested", "What the policy loses and saves", "Repeated calibrations"],
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Document(HTMLParser):
    """A page taken apart; tags that are not closed in their order fail."""

    def __init__(self, path):
        super().__init__()
        self.path, self.open, self.tags, self.text, self.texts = path, [], [], "", {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def rows(path):
    """The cells of all rows of all tables, by the row's name; an independent look at the source."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", path.read_text(encoding="utf-8"), re.DOTALL):
        name, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        found.setdefault(name, []).append(cells)
    return found


def result_of_calibration(certified=True):
    """What `offramp calibrate` writes, in short."""
    part = {
        "examples": 40, "loss": {"value": 0.021, "low": 0.01, "high": 0.04}, "histogram": [0, 5, 0, 9],
        "quality": {"f1": {"value": 0.5, "low": None, "high": None}}, "exit_layer": {"value": 2.5},
        **{f"{cost}_ratio": {"value": 0.61, "low": 0.58, "high": 0.66} for cost in ("flops", "bytes")},
    }  # fmt: skip
    tests = [
        {"name": f"softmax > {t}", "setting": i, "chain": 0, "loss": 0.02 * (i + 1), "p_value": p, "passed": p <= 0.05}
        for i, (t, p) in enumerate([(0.9, 0.001), (0.5, 0.02), (0.1, 0.7)])
    ]
    promise = {
        "metric": "f1", "tolerance": 0.05, "failure": 0.05, "kind": "risk", "margin": None, "unit": "prompt",
        "bound": "hoeffding-bentkus",
    }  # fmt: skip
    policy = ExitPolicy(threshold=0.5).to_dict()
    return {
        "schema": "offramp/calibrate/1",
        "certificate": {
            "certified": certified, "promise": promise, "policy": policy, "order": "path", "n": 120, "seed": 3,
            "splits": {"certification": [120, 120], "test": [40, 40]}, "base": policy, "grid": {"thresholds": [0.9]},
            "tests": tests, "selected": 1 if certified else None, "level": 0.05, "needed": None,
            "conditions": {
                "model": "tiny", "weights": "ab12", "dtype": "float32", "exits": None, "chat_template": None,
                "task": {"name": "question-answering"}, "settings": {"max_new_tokens": 7}, "batch_size": 1,
            },
            "data": {"name": "questions.json", "sha256": "cd34", "command": "offramp calibrate tiny --seed 3"},
            "estimates": {"certification": part, "test": {**part, "upper": 0.049}},
            "versions": {"offramp": "0.1.0"},
        },
        "words": "New prompts lose at most 0.05 of f1 on average. This holds with probability at least 0.95."
        if certified else "Nothing was certified: the policy never leaves early.",
        "settings": [],
        "validation": {
            "promise": promise, "repeats": 20, "pool": 160, "certifying": 120.0, "exceeded_pool": 1, "loss": 0.03,
            "exceeded_held_out": 2, "uncertified": 0, "flops_ratio": 0.62, "chosen": {"1": 20},
            "exceeded_pool_interval": [0.001, 0.249], "exceeded_held_out_interval": [0.012, 0.317],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation_runs.run(folder / "evaluation")
    training_runs.run(folder / "training", steps=6, validate_every=3)
    probe(model(), ["the sky is", "why ?"], max_new_tokens=6, chat=False).save(folder / "probe")
    write_json(folder / "calibration" / "result.json", result_of_calibration())
    return folder


@pytest.fixture(scope="module")
def whole(runs):
    return Document(report([runs / kind for kind in KINDS], runs / "all.html"))


@pytest.fixture
def _undrawn(monkeypatch):
    monkeypatch.setattr(evaluation, "draw", lambda figure, says: Picture("<svg></svg>", says))


def one(runs, kind, tmp_path, **options):
    return Document(report([runs / kind], tmp_path / f"{kind}.html", **options))


# ---------------------------------------------------------------- as a document


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(runs, kind, tmp_path):
    page = one(runs, kind, tmp_path)
    for title in [*SECTIONS[kind], "How to repeat it"]:
        assert page.text.count(title) >= 2  # in the contents and above the section
    assert "tiny" in "".join(page.texts["h2"])


def test_all_together_with_contents_that_lead_somewhere(whole):
    ids = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    ids = [id for id in ids if id.startswith("run-")]
    assert sum(re.fullmatch(r"run-\d", id) is not None for id in ids) == len(KINDS)
    assert {f"#{id}" for id in ids} == {link["href"] for link in whole.of("a")}


def test_nothing_beside_the_file_is_needed(whole):
    assert not whole.of("img")
    assert all(link["href"].startswith("#") for link in whole.of("a"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in whole.tags}
    source = whole.path.read_text(encoding="utf-8")
    assert "http" not in source
    ids = {attributes["id"] for _, attributes in whole.tags if "id" in attributes}
    assert set(re.findall(r"url\((.*?)\)", source)) <= {f"#{id}" for id in ids}
    assert "@import" not in source


def test_pictures_are_drawn_in_the_colours_of_the_page_and_described(whole, runs):
    pictures = [figure for figure in whole.of("figure")]
    arms = json.loads((runs / "evaluation" / "results.json").read_text())["arms"]
    panels = sum(any(arm[cost] for arm in arms) for cost in COSTS)
    assert panels >= 2
    assert len(pictures) == len(whole.of("svg")) == panels + 2 + 3
    assert all(len(picture["aria-label"]) > 10 for picture in pictures)
    styles = " ".join(attributes.get("style", "") for tag, attributes in whole.tags if tag in ("path", "text", "use"))
    assert "var(--blue)" in styles
    assert not [word for word in ("#0072b2", "#666666", "DejaVu") if word in styles]
    assert {"full model = 1", "softmax"} <= set(whole.texts["text"])  # letters, not paths


def test_it_is_made_for_phones_and_dark_rooms(whole):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in whole.of("meta")
    assert "light-dark(" in "".join(whole.texts["style"])


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no chromium")
def test_in_a_browser(whole):
    with browser.browsing() as tab:
        seen = set()
        for width, scheme in ((1300, "light"), (400, "dark")):
            tab.look(width, scheme=scheme)
            tab.open(whole.path.as_uri())
            assert not tab.overflows()
            lefts = tab.get("[...document.querySelectorAll('.panels figure')].map((it) => it.offsetLeft)")
            assert len(set(lefts)) == (1 if width == 400 else len(lefts))  # one below the other, or side by side
            widths = tab.get("[...document.querySelectorAll('.panels svg')].map((it) => it.clientWidth)")
            assert all(320 < it < 400 for it in widths)
            seen.add(tab.get("getComputedStyle(document.querySelector('svg path[style*=\"--blue\"]')).stroke"))
            plain, tinted = (
                tab.get(f"getComputedStyle(document.querySelector('.tokens:not(.legend) .depth{which}')).background")
                for which in (".full", ":not(.full)")
            )
            assert "rgba(0, 0, 0, 0)" in plain
            assert "oklch" in tinted
        assert len(seen) == 2
        assert tab.complaints == []
        assert all(url.startswith("file:") for url in tab.requested)


@pytest.mark.parametrize(
    "bad",
    [
        '<script>alert(1)</script>',
        '<foreignObject><p>x</p></foreignObject>',
        '<path onclick="alert(1)" d="M0 0"/>',
        '<path style="fill: url(https://example.org/x)" d="M0 0"/>',
        '<path clip-path="url(&quot;https://example.org/x&quot;)" d="M0 0"/>',
        '<path style="position: fixed; fill: #0072b2" d="M0 0"/>',
        '<use xlink:href="https://example.org/x#a"/>',
        '<image xlink:href="https://example.org/x.png"/>',
        '<a xlink:href="javascript:alert(1)"><path d="M0 0"/></a>',
        '<style>* { color: red }</style>',
    ],
)  # fmt: skip
def test_a_picture_of_a_file_only_draws(bad):
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    found = inline(f"{head}{bad}<text>a &lt; b</text></svg>".encode())
    assert not [w for w in ("script", "alert", "example.org", "foreign", "onclick", "position", "red") if w in found]
    assert "a &lt; b" in found


def test_the_same_runs_give_the_same_bytes(whole, runs):
    again = report([runs / kind for kind in KINDS], runs / "again.html")
    assert again.read_bytes() == whole.path.read_bytes()


@pytest.mark.usefixtures("_undrawn")
def test_text_of_data_is_escaped(runs, tmp_path):
    bad = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    shutil.copytree(runs, tmp_path / "runs")
    shutil.copytree(runs / "evaluation", tmp_path / "runs" / "<b>evaluation")
    folder = tmp_path / "runs" / "<b>evaluation"
    results = json.loads((folder / "results.json").read_text())
    results["conditions"] |= {"model": bad, "data": bad, "command": bad}
    results["arms"][2]["name"] = bad
    write_json(folder / "results.json", results)
    path = folder / "records" / "softmax.jsonl"
    header, *lines = read_lines(path, "records")
    lines = [line | {"arm": bad, "pieces": [bad, *line["pieces"][1:]]} for line in lines]
    write_lines(path, [header, *lines])
    config = tmp_path / "runs" / "training" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"model": {"name": bad, "fingerprint": bad, "dtype": bad}})
    certificate = result_of_calibration() | {"words": bad}
    certificate["certificate"]["tests"][0]["name"] = bad
    write_json(tmp_path / "runs" / "calibration" / "result.json", certificate)
    probed = tmp_path / "runs" / "probe" / "probe.json"
    write_json(probed, json.loads(probed.read_text()) | {"model": bad, "verdict": bad})
    found = [folder, *(tmp_path / "runs" / kind for kind in KINDS[1:])]
    page = Document(report(found, tmp_path / "all.html"))
    assert page.text.count(bad) > 10
    assert bad in "".join(page.texts["span"])  # as a token
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert not page.of("img")
    assert "<b>evaluation" in page.text


# ---------------------------------------------------------------- an evaluation


@pytest.mark.usefixtures("_undrawn")
def test_every_arm_is_in_every_table_and_bar(runs, tmp_path):
    page = one(runs, "evaluation", tmp_path)
    results = json.loads((runs / "evaluation" / "results.json").read_text())
    found = rows(page.path)
    for arm in results["arms"]:
        quality, cost = found[arm["name"]]
        assert quality[0].startswith(f"{100 * arm['quality']['f1']['value']:.1f} (")
        assert cost[1].startswith(f"{arm['flops_ratio']['value']:.3f} (")
    bars = re.findall(r'class="name">(.*?)</span> <span class="total">(.*?)<', page.path.read_text())
    assert bars[0] == ("softmax", f"mean {results['arms'][2]['exit_layer']['value']:.1f}")  # where its tokens left
    assert dict(bars[1:]) == {arm["name"]: f"{arm['flops_ratio']['value']:.3f}" for arm in results["arms"]}
    widths = re.findall(r'<div class="stack">(.*?)</div>', page.path.read_text())
    left, *totals = [sum(map(float, re.findall(r"width:([\d.]+)%", bar))) for bar in widths]
    assert left == pytest.approx(100, abs=0.01)
    most = max(arm["flops_ratio"]["value"] for arm in results["arms"])
    assert totals == pytest.approx([100 * arm["flops_ratio"]["value"] / most for arm in results["arms"]], abs=0.01)
    marks = [row.get("class", "").split() for row in page.of("tr")]
    assert [mark[0] for mark in marks if {"full", "static"} & set(mark)] == ["full", "static"] * 2


@pytest.mark.usefixtures("_undrawn")
def test_tokens_have_the_colour_and_the_words_of_their_layer(runs, tmp_path):
    page = one(runs, "evaluation", tmp_path, examples=5)
    source = page.path.read_text(encoding="utf-8")
    answers = re.findall(r'<p class="who"><b>(.*?)</b>.*?</p>\s*<p class="tokens">(.*?)</p>', source)
    names = ["full model", "softmax", "static 2"]  # policies before static exits
    files = [runs / "evaluation" / "records" / f"{name.replace(' ', '-')}.jsonl" for name in names]
    records = [read_records(path)[1] for path in files]
    assert [name for name, _ in answers] == names * 5
    places = set()
    for (_, answer), record in zip(answers, [arm[i] for i in range(5) for arm in records], strict=True):
        spans = re.findall(
            r'<span class="depth( full)?" style="--at:(.*?)" title="layer (\d+) of 4(?:, confidence (.*?))?">'
            r"(.*?)</span>",
            answer,
        )
        assert [int(layer) for _, _, layer, *_ in spans] == record.exit_layers
        assert [bool(full) for full, *_ in spans] == [layer == 4 for layer in record.exit_layers]
        assert "".join(text for *_, text in spans).replace("·", "") == record.text
        said = [f"{value:.2f}" if value is not None else "" for value in record.confidences]
        assert [confidence for *_, confidence, _ in spans] == said
        places |= {(int(layer), float(at)) for _, at, layer, *_ in spans}
    layers = sorted({layer for record in sum(records, []) for layer in record.exit_layers})
    assert sorted(places) == [(n, pytest.approx((n - layers[0]) / (4 - layers[0]), abs=1e-3)) for n in layers]


@pytest.mark.usefixtures("_undrawn")
def test_an_evaluation_opens_with_a_verdict_and_shows_what_was_asked(runs, tmp_path):
    page = one(runs, "evaluation", tmp_path, examples=5)
    result = json.loads((runs / "evaluation" / "results.json").read_text())
    softmax = result["arms"][2]
    assert (
        "No policy here is shown to be near the full model's answers for less; nearest to it is softmax." in page.text
    )
    tiles = re.findall(r"<div><span>(.*?)</span><b>(.*?)</b><span>(.*?)</span></div>", page.path.read_text())
    assert [name for name, *_ in tiles] == ["f1 of softmax", "FLOPs per generated token", "seconds per generated token"]
    assert tiles[0][1] == f"{100 * softmax['difference']['f1']['value']:+.1f}"
    assert tiles[1][1] == f"{softmax['flops_per_token_ratio']['value']:.3f}"
    assert all("the full model" in says for *_, says in tiles)
    for example in examples():
        assert {example.question, example.source} <= {text.strip() for text in page.texts["p"]}
    assert page.text.index("nearest to it") < page.text.index("the sky is") < page.text.index("the full model's whole")


def test_a_lossless_policy_is_among_the_examples(tmp_path, monkeypatch):
    some = {f"softmax {t}": ExitPolicy(threshold=t, min_layer=1) for t in (0.1, 0.2, 0.3, 0.4)}
    some["checked"] = ExitPolicy(threshold=0.2, min_layer=1, skipped="verify")
    monkeypatch.setattr(evaluation_runs, "POLICIES", some)
    evaluation_runs.run(tmp_path / "evaluation", 2)
    page = one(tmp_path, "evaluation", tmp_path)
    assert "the full model's very answer; lossless: every token is checked by the full model" in page.text


@pytest.mark.usefixtures("_undrawn")
def test_examples_are_drawn_by_seed(runs, tmp_path):
    def drawn(**options):
        return re.findall(r"Example (q\d)", one(runs, "evaluation", tmp_path, **options).text)

    assert drawn(examples=2, seed=1) == drawn(examples=2, seed=1)
    assert len({tuple(drawn(examples=2, seed=seed)) for seed in range(6)}) > 1
    assert drawn(examples=99) == [example.id for example in examples()]
    assert drawn(examples=0) == []


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("missing", ["records", "pieces"])
def test_without_records_everything_else_is_there(runs, tmp_path, missing):
    shutil.copytree(runs / "evaluation", tmp_path / "evaluation")
    if missing == "records":
        shutil.rmtree(tmp_path / "evaluation" / "records")
    else:  # as an earlier version wrote them
        for path in (tmp_path / "evaluation" / "records").iterdir():
            header, *lines = read_lines(path, "records")
            lines = [{key: line[key] for key in line if key not in ("pieces", "confidences")} for line in lines]
            write_lines(path, [header, *lines])
    page = one(tmp_path, "evaluation", tmp_path)
    assert {"records": "are not there", "pieces": "hold no texts of tokens"}[missing] in page.text
    assert "softmax" in rows(page.path)


@pytest.mark.usefixtures("_undrawn")
def test_perplexity_has_a_page(tmp_path):
    passages = [Passage(f"{i}", f"{i}", tuple(range(20 + i, 27 + i))) for i in range(3)]
    policies = {"softmax": ExitPolicy(threshold=0.2, min_layer=1)}
    evaluate_perplexity(model(), passages, policies, tmp_path / "evaluation", static_layers=(2,), resamples=20)
    page = one(tmp_path, "evaluation", tmp_path)
    assert "what each would have said next" in page.text
    assert "By the estimates, not beaten in perplexity for as few FLOPs" in page.text


def test_results_can_be_read_back(runs):
    results = json.loads((runs / "evaluation" / "results.json").read_text())
    assert json.loads(json.dumps(Evaluation.from_dict(results).to_dict())) == results
    probed = json.loads((runs / "probe" / "probe.json").read_text())
    assert json.loads(json.dumps(Probe.from_dict(probed).to_dict())) == probed
    for kind in (Evaluation, Probe):
        with pytest.raises(ValueError, match="the schema is 'other', not"):
            kind.from_dict({"schema": "other"})


# ---------------------------------------------------------------- the other kinds


def test_a_training_before_and_after(runs, tmp_path):
    found = rows(one(runs, "training", tmp_path).path)
    metrics = [json.loads(line) for line in (runs / "training" / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in metrics if row["kind"] == "validation"]
    for place, layer in enumerate((1, 3)):
        said = [f"{row[key][place]:.3f}" for key in ("agreement", "loss") for row in (judged[0], judged[-1])]
        assert found[f"{layer}"] == [said]
    assert found["learning rate"] == [["0.01"]]
    assert "model.norm" not in found


def test_an_unfinished_training_says_so(runs, tmp_path):
    shutil.copytree(runs / "training", tmp_path / "training")
    path = tmp_path / "training" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # before the first step, two steps, and half a line
    assert "Not finished: 2 of 6 steps" in one(tmp_path, "training", tmp_path).text
    path.unlink()
    with pytest.raises(ValueError, match="has measured nothing yet"):
        one(tmp_path, "training", tmp_path)


@pytest.mark.usefixtures("_undrawn")
def test_a_stop_for_nan_and_what_was_changed_behind_it_are_told(runs, tmp_path):
    shutil.copytree(runs / "training", tmp_path / "training")
    folder, record = RunFolder(tmp_path / "training"), json.loads((runs / "training" / "config.json").read_text())
    del record["about"]
    folder.stopped("training met NaN or infinity at step 4 in the gradient")
    assert "Not finished: training met NaN or infinity at step 4" in one(tmp_path, "training", tmp_path).text
    del record["digest"]
    folder.check({**record, "config": {**record["config"], "learning_rate": 0.5}})
    said = one(tmp_path, "training", tmp_path).text
    assert "Not finished" not in said
    assert "learning_rate was 0.01 and is now 0.5, after training met NaN or infinity at step 4" in said
    assert "do not repeat this run" in said
    assert "do not repeat this run" not in one(runs, "training", tmp_path).text


def test_curves_are_the_metrics():
    steps = [
        {"tokens": 10 * i, "loss": [i, 2.0 * i], "agreement": [0.1, 0.2], "full_loss": 3.0} for i in range(1, 1001)
    ]
    judged = [
        {"tokens": t, "step": t, "positions": 9, "loss": [1.0, 2.0], "agreement": [0.3, 0.4], "full_loss": f}
        for t, f in ((0, 3.0), (10000, 2.5))
    ]
    left, right = training.curves_figure(training.Curves("m", (1, 3), steps, judged)).axes
    line, dots = left.lines[:2]
    assert len(line.get_xdata()) <= training.POINTS
    assert line.get_xdata()[-1] == 10000
    assert sum(line.get_ydata()) / len(line.get_ydata()) == pytest.approx(500.5)  # means of equal groups keep the mean
    assert list(dots.get_ydata()) == [1.0, 1.0]
    assert "full model, on the text" in [line.get_label() for line in left.lines]  # it changed
    assert list(right.lines[3].get_ydata()) == [0.4, 0.4]


def test_a_probe_is_read_from_its_json_as_well(runs, tmp_path):
    shutil.copy(runs / "probe" / "probe.json", tmp_path / "mine.json")
    page = Document(report([tmp_path / "mine.json"], tmp_path / "a.html"))
    values = json.loads((tmp_path / "mine.json").read_text())
    assert values["verdict"] in page.text
    found = rows(page.path)
    for layer in values["layers"]:
        assert found[f"{layer['layer']}"][0][:2] == [f"{layer['agreement']:.1%}", f"{layer['max_probability']:.1%}"]


def test_a_certificate_in_words(runs, tmp_path):
    page = one(runs, "calibration", tmp_path)
    assert result_of_calibration()["words"] in page.text
    found = rows(page.path)
    assert [found[f"softmax &gt; {t}"][0][-1] for t in (0.9, 0.5, 0.1)] == ["passed", "chosen", "failed"]
    assert found["test"][0][:4] == ["40", "0.021 (0.010 to 0.040)", "0.049", "0.610 (0.580 to 0.660)"]
    assert found["certification"][0][2] == ""  # no limit where the policy was chosen
    assert found["mean loss of the whole pool above 0.05"][0][1].startswith("1 of 20 (5.0%")  # by an earlier version
    assert "the first count understates how often the promise fails" in page.text
    assert "offramp calibrate tiny --seed 3" in "".join(page.texts["pre"])
    assert {"class": "text good"} in page.of("div")


@pytest.mark.parametrize("bound", ["hoeffding-bentkus", "crc"])
def test_what_a_calibration_writes_has_a_page(tmp_path, monkeypatch, bound):
    losses = scripted_calibration.at_most({0.9: 0.01, 0.5: 0.03, 0.1: 0.3})
    monkeypatch.setattr(decoded, "decode_arms", scripted_calibration.Script(losses).together)
    lm, task, base = scripted_calibration.model(), scripted_calibration.TASK, scripted_calibration.BASE
    result = calibrate(
        lm, task, scripted_calibration.examples(400), base, Promise("f1", 0.1, bound=bound), tmp_path / "calibration",
        grid=scripted_calibration.GRID, repeats=3, resamples=20, about={"command": "offramp calibrate x"},
    )  # fmt: skip
    page = one(tmp_path, "calibration", tmp_path)
    assert result.certificate.certified
    assert result.certificate.words() in page.text
    assert len(page.of("svg")) == 1
    verdicts = [found[0][-1] for name, found in rows(page.path).items() if name.startswith("softmax")]
    assert verdicts == ["passed", "chosen", "failed"]
    assert ("guarantee on the mean" in page.text) == (bound == "crc")
    draws, count = rows(page.path)["mean loss of the pool above 0.1"][0]
    assert draws == f"{result.validation.drawn} prompts drawn with replacement"
    assert count.startswith(f"{result.validation.exceeded_population} of 3")
    assert "understates" not in page.text
    assert "offramp calibrate x" in "".join(page.texts["pre"])


def test_nothing_certified_is_said_plainly(tmp_path):
    values = result_of_calibration(certified=False) | {"validation": None}
    write_json(tmp_path / "calibration" / "result.json", values)
    page = one(tmp_path, "calibration", tmp_path)
    assert "Nothing was certified" in page.text
    assert {"class": "text bad"} in page.of("div")
    assert "chosen" not in page.text
    assert "Repeated" not in page.text


# ---------------------------------------------------------------- how to repeat


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    lm = model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def offramp(monkeypatch, *arguments):
    arguments = [str(a) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["offramp", *arguments])
    run = CliRunner().invoke(cli.app, arguments)
    return run, f"offramp {' '.join(arguments)}"


def test_the_command_is_recorded_and_not_compared(saved, tmp_path, monkeypatch):
    text, out = tmp_path / "a.txt", tmp_path / "run"
    text.write_text("the sky is blue . " * 20)
    base = ["train", saved, "--text", text, "--window", 8, "--layers", 2, "--steps", 2, "--out", out]
    run, command = offramp(monkeypatch, *base)
    assert run.exit_code == 0, run.output
    about = json.loads((out / "config.json").read_text())["about"]
    assert about["command"] == command
    assert {"torch", "transformers", "offramp", "threads", "cores"} <= set(about)
    run, _ = offramp(monkeypatch, *base, "--json", tmp_path / "a.json")  # another command, the same run
    assert run.exit_code == 0, run.output
    run, _ = offramp(monkeypatch, "report", out)
    assert run.exit_code == 0, run.output
    assert command in Document(out / "report.html").text


@pytest.mark.usefixtures("_undrawn")
def test_an_evaluation_can_be_repeated(saved, tmp_path, monkeypatch):
    text, out = tmp_path / "a.txt", tmp_path / "run"
    text.write_text(" ".join(f"w{i}" for i in range(20, 60)))
    run, command = offramp(
        monkeypatch,
        "evaluate",
        saved,
        "--task",
        "perplexity",
        "--data",
        text,
        "--window",
        8,
        "--limit",
        2,
        "--out",
        out,
    )
    assert run.exit_code == 0, run.output
    assert command not in run.stdout
    run, _ = offramp(monkeypatch, "report", out, "--out", tmp_path / "here" / "a.html", "--examples", 1)
    assert run.exit_code == 0, run.output
    assert f"wrote {tmp_path / 'here' / 'a.html'}" in run.stderr
    page = Document(tmp_path / "here" / "a.html")
    assert command in "".join(page.texts["pre"])
    assert len(page.texts["h4"]) == 1


# ---------------------------------------------------------------- what is refused


def test_runs_that_are_none(runs, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            report([path, runs / "probe"], tmp_path / "a.html")
        assert not (tmp_path / "a.html").exists()

    refused(tmp_path / "nowhere", "there is no .*nowhere; give a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no run")
    write_json(tmp_path / "foreign" / "config.json", {"model_type": "llama"})
    refused(tmp_path / "foreign", "foreign holds no run")
    write_json(tmp_path / "list" / "config.json", [1])
    refused(tmp_path / "list", "list holds no run")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text('{"schema": "offramp/eval')
    refused(tmp_path / "damaged", "is damaged: it is not JSON")
    write_json(tmp_path / "begun" / "config.json", {"schema": "offramp/evaluate-config/1"})
    refused(tmp_path / "begun", "the evaluation in .*begun is not finished")
    write_json(tmp_path / "old" / "results.json", {"schema": "offramp/evaluate/1", "arms": [{}]})
    refused(tmp_path / "old", "old is not as this version of offramp writes it")
    refused(runs / "evaluation" / "results.json", "is no probe; give the folder of the run")


def test_wrong_use(runs, tmp_path):
    with pytest.raises(ValueError, match="no runs to report"):
        report([], tmp_path / "a.html")
    with pytest.raises(ValueError, match="examples is -1"):
        report([runs / "probe"], tmp_path / "a.html", examples=-1)
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        report([runs / "probe"], tmp_path)


def test_without_matplotlib_the_error_names_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'offramp[report]'")):
        report([runs / "probe"], tmp_path / "a.html")
