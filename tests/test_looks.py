"""How things look where they are typed: short in a terminal, tables and tinted tokens in notebooks, rows in pandas."""

import math
import sys
from html.parser import HTMLParser

import pytest

import calibration_runs
import classifier_runs
import evaluation_runs
import training_runs
from offramp import Contrast, ExitPolicy, LanguageModel
from offramp.core.generation import DEPTH, places, tinted
from offramp.evaluation import records_of
from offramp.lm.bench import run_bench
from offramp.runs.results import frame
from tiny import LAYERS, tiny, tokenizer

POLICY = ExitPolicy(threshold=0.2, min_layer=1)


class Page(HTMLParser):
    """Elements with their attributes and what stands in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open, "all elements are closed"

    def handle_starttag(self, tag, attrs):
        self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag
        self.found.append(self.open.pop())

    def handle_data(self, data):
        for _, _, said in self.open:
            said.append(data)

    def texts(self, *tags):
        return ["".join(said) for tag, _, said in self.found if tag in tags]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def results(lm, tmp_path_factory):
    """One of each, small; by name."""
    place = tmp_path_factory.mktemp("looks")
    return {
        "probe": lm.probe(["why is the sky", "the sky is blue ."], max_new_tokens=4),
        "evaluation": evaluation_runs.run(place / "evaluation"),
        "calibration": calibration_runs.run(place / "calibration", **calibration_runs.JOBS["path"]),
        "training": training_runs.run(place / "training", steps=2),
        "classifier": classifier_runs.run(place / "classifier", epochs=1)[2],
        "bench": run_bench(lm, ["the sky is", "why is"], {"mine": POLICY}, max_new_tokens=3, repeats=2),
        "place": place,
    }


RESULTS = ("probe", "evaluation", "calibration", "training", "classifier", "bench")


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy(),
        ExitPolicy("static", min_layer=20),
        ExitPolicy(threshold=(0.5, 0.25), exit_layers=(3, 5), skipped="defer"),
        ExitPolicy("jsd", contrast=Contrast(alpha=0.2), vocabulary="fixed", vocabulary_size=100),
        ExitPolicy(threshold=None, skipped="verify", accept=0.5),
    ],
    ids=lambda policy: f"{policy.confidence}-{policy.skipped}",
)
def test_a_policy_is_written_as_what_makes_an_equal_one(policy):
    assert eval(repr(policy)) == policy


def test_a_policy_says_only_what_is_not_the_default():
    assert repr(ExitPolicy()) == "ExitPolicy()"
    assert repr(ExitPolicy(threshold=0.9, min_layer=25)) == "ExitPolicy(min_layer=25)"


def test_a_model_says_what_it_is(lm):
    assert repr(lm) == f"LanguageModel('tiny', {LAYERS} layers, float32, cpu, no trained exits)"


def test_a_generation_is_one_line_and_its_tokens_have_colours(lm):
    out = lm.generate(["the sky is", "why"], policy=POLICY, chat=False, max_new_tokens=8)
    assert repr(out).startswith(f"Generation({out.costs.tokens} tokens in 2 rows, mean exit layer ")
    assert "\n" not in repr(out) + repr(out.costs)
    page = Page(out._repr_html_())
    spans = [(attributes, said) for tag, attributes, said in page.found if tag == "span" and "title" in attributes]
    assert "".join("".join(said) for _, said in spans) == "".join(out.texts)
    shown = [layer for row, pieces in zip(out.exit_layers, out.pieces, strict=True)
             for layer, piece in zip(row, pieces, strict=True) if piece]  # fmt: skip
    assert [int(attributes["title"].split()[1]) for attributes, _ in spans] == shown
    colours = {layer: attributes["style"] for layer, (attributes, _) in zip(shown, spans, strict=True)}
    assert len(set(colours.values())) == len(colours) > 1
    assert dict.fromkeys(colours.values()).keys() == {
        f"--at:{at:.3f}" for at in places(colours, out.num_layers).values()
    }
    assert DEPTH in page.texts("style")[0]  # as on all pages


def test_what_a_model_says_is_escaped():
    row = [("<script>alert(1)</script>", 2, 0.5), (' & "x" \n', 4, math.nan), ("", 4, 0.5)]
    page = Page(tinted([row], 4))
    assert page.texts("script") == []
    assert "".join(text for text, *_ in row) in page.texts("p")
    titles = [attributes["title"] for tag, attributes, _ in page.found if tag == "span" and "title" in attributes]
    assert titles == ["layer 2 of 4, confidence 0.500", "layer 4 of 4, not tested"]


def test_without_a_tokenizer_tokens_are_numbers():
    out = LanguageModel(tiny("llama")).generate([[5, 6]], max_new_tokens=3)
    assert "".join(out.pieces[0]).split() == [str(token) for token in out.tokens[0]]
    Page(out._repr_html_())


def test_tokens_are_rows_of_a_frame(lm):
    out = lm.generate(["the sky is", "why"], policy=POLICY, chat=False, max_new_tokens=5)
    found = out.to_pandas()
    assert list(found.columns) == ["row", "position", "token", "text", "exit_layer", "confidence"]
    for row, (tokens, layers) in enumerate(zip(out.tokens, out.exit_layers, strict=True)):
        own = found[found.row == row]
        assert own.token.tolist() == tokens
        assert own.exit_layer.tolist() == layers
        assert "".join(own.text) == out.texts[row]
    sure = [c for row in out.confidences for c in row]
    assert [None if math.isnan(c) else c for c in sure] == [None if c != c else c for c in found.confidence]


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_one_line_here_and_tables_in_notebooks(results, name):
    result = results[name]
    assert "\n" not in repr(result)
    assert len(repr(result)) < 400
    page, text = Page(result._repr_html_()), result.table()
    lines = [line for line in text.split("\n") if not line.startswith("| -")]  # all but the rules of tables
    rows = [line for line in lines if line.startswith("| ")]
    cells = [cell.strip() for line in rows for cell in line[2:-2].split(" | ")]
    assert sorted(page.texts("th", "td")) == sorted(cells)
    words = " ".join(page.texts("th", "td", "p", "pre", "h4")).split()
    assert sorted(words) == sorted(word for word in " ".join(lines).split() if word not in ("|", "##"))


def test_results_have_rows(results):
    bench, evaluation, calibration = (results[name] for name in ("bench", "evaluation", "calibration"))
    assert results["probe"].to_pandas().agreement.tolist() == [layer.agreement for layer in results["probe"].layers]
    arms = evaluation.to_pandas().set_index("name")
    assert arms.loc["softmax", "flops_ratio.value"] == evaluation.arm("softmax").flops_ratio.value
    assert arms.loc["softmax", "quality.f1.low"] == evaluation.arm("softmax").quality["f1"].low
    grid = calibration.to_pandas()
    assert grid.setting.tolist() == [setting.name for setting in calibration.settings]
    assert grid.p_value.notna().sum() == len(calibration.outcome.tests)
    assert grid.chosen.sum() == (calibration.outcome.selected is not None)
    timed = bench.to_pandas().set_index("name")
    assert timed.loc["mine", "flops_ratio"] == bench.arm("mine").flops_ratio
    assert timed.loc["mine", "seconds_ratio.median"] == bench.seconds_ratio(bench.arm("mine")).median
    assert results["training"].to_pandas().layer.tolist() == list(results["training"].layers)
    assert len(results["classifier"].to_pandas()) == len(results["classifier"].accuracy)
    records = frame(records_of(results["place"] / "evaluation", "softmax"))
    assert records.id.tolist() == [example.id for example in evaluation_runs.examples()]


def test_a_certificate_says_its_promise(results):
    certificate = results["calibration"].certificate
    assert repr(certificate).startswith("Certificate(textual loss of f1 at most 0.3, failure 0.3, by ")
    assert "".join(Page(certificate._repr_html_()).texts("p", "pre")) == certificate.words()


def test_frames_say_how_to_get_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        frame([{"a": 1}])
