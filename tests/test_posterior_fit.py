"""Fitting a posterior: cached readout inputs, the same view of a token as decoding has, reports, and the command."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp import ExitPolicy, Exits, LanguageModel, cli
from offramp.calibration import PosteriorConfig, fit_posterior
from offramp.calibration.posterior_report import (
    PosteriorReport,
    ProbabilityQuality,
    _rank_correlation,
    _standard_error,
    _warnings,
)
from offramp.calibration.token_rows import SPLITS, cache_tokens, factors_of, split_documents, views_of
from offramp.core.vocabulary import Pruning
from offramp.hub.exit_files import load_exits
from offramp.hub.exit_posterior import METHODS, Posterior
from offramp.runs.digests import fingerprint
from offramp.training.data import Document
from offramp.uncertainty.candidates import shortlist
from offramp.uncertainty.token_sets import EvidenceSets
from test_brute_force import NO_END, lively
from tiny import VOCABULARY, inputs_for, tiny, tokenizer

LAYERS = (1, 2, 3)


def with_exits(name, model=None, rank=0):
    lm = LanguageModel(lively(name) if model is None else model)
    torch.manual_seed(0)
    exits = Exits.fresh(lm.split, LAYERS, rank)
    with torch.no_grad():
        for parameter in exits.lenses.parameters():
            parameter.normal_(0, 0.1)
    lm.attach_exits(exits)
    return lm


def documents_of(lm, name, count=12, new=10):
    """The model's own greedy answers, so that teacher forcing is what decoding without exits does."""
    made = []
    for seed in range(count):
        inputs = inputs_for(name, 1, seed=seed)
        out = lm.generate(inputs, max_new_tokens=new, eos_token_id=NO_END)
        prompt = tuple(inputs["input_ids"][0].tolist())
        if lm.split.is_encoder_decoder:
            made.append(Document(tuple(out.sequences[0].tolist()), 1, str(seed), prompt))
        else:
            made.append(Document((*prompt, *out.tokens[0]), len(prompt), str(seed)))
    return made


def cached(lm, documents, folder, **options):
    return cache_tokens(lm, documents, folder, layers=LAYERS, window=64, **options)


# ---------------------------------------------------------------- splits and cache


@pytest.mark.parametrize("groups", [4, 5, 11, 50])
def test_no_group_is_in_two_splits_and_none_is_lost(groups):
    documents = [Document((1, 2, 3), 0, str(i % groups)) for i in range(3 * groups)]
    parts = split_documents(documents, seed=1)
    home = Counter()
    for part in parts.values():
        assert part
        home.update({d.group for d in part})
    assert set(home.values()) == {1}
    assert sum(map(len, parts.values())) == len(documents)
    if groups == 50:
        assert [len({d.group for d in parts[name]}) for name in SPLITS] == pytest.approx([20, 10, 10, 10], abs=2)
    assert split_documents(documents, seed=1) == parts
    assert groups == 4 or split_documents(documents, seed=2) != parts


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="3 documents of their own, but .* one each"):
        split_documents([Document((1, 2), 0, str(i)) for i in range(3)], 0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_cached_inputs_are_the_normed_states_of_the_model_itself(name, tmp_path):
    lm = with_exits(name, rank=3)
    documents = documents_of(lm, name)
    tokens, record = cached(lm, documents, tmp_path)
    part = split_documents(documents, 0)["tune"]
    found = {layer: [] for layer in LAYERS}
    chosen, written, positions = [], [], []
    for document in part:
        ids = torch.tensor([document.ids])
        inputs = {"input_ids": ids}
        if document.source:
            inputs = {"input_ids": torch.tensor([document.source]), "decoder_input_ids": ids}
        with torch.no_grad():
            out = lm.model(**inputs, output_hidden_states=True)
        states = out.decoder_hidden_states if document.source else out.hidden_states
        first = document.start + (0 if document.source else 1)  # a prompt's own pass gives the first token
        for at in range(first, len(document.ids)):
            for layer in LAYERS:
                lens = lm.exits.lenses[str(layer)]
                h = states[layer][0, at - 1]
                h = h + lens.up.weight @ (lens.down.weight @ h) + lens.up.bias
                norm = lm.model.decoder.final_layer_norm if document.source else lm.model.model.norm
                scale = lm.model.config.d_model**-0.5 if document.source else 1
                found[layer].append((norm(h) * scale).detach())
            chosen.append(int(out.logits[0, at - 1].argmax()))
            written.append(document.ids[at])
            positions.append(at - document.start)
    got = tokens["tune"]
    assert (got.chosen.tolist(), got.written.tolist(), got.positions.tolist()) == (chosen, written, positions)
    assert got.chosen.tolist() == written, "these are the model's own answers"
    for layer in LAYERS:
        torch.testing.assert_close(got.inputs[layer], torch.stack(found[layer]), atol=2e-5, rtol=1e-4)
    assert record["tune"]["tokens"] == len(chosen)


def test_an_interrupted_pass_goes_on_and_keeps_no_logits(tmp_path, monkeypatch):
    lm = with_exits("llama")
    documents = documents_of(lm, "llama", 24, 4)
    expected, _ = cached(lm, documents, tmp_path)
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) > 4
    size = sum(file.stat().st_size for file in files)
    total = sum(len(part) for part in expected.values())
    assert size < total * (len(LAYERS) * 32 * 4 + 64) + 2000 * len(files), "features and four numbers a token"
    files[1].unlink()
    passes = []
    states = type(lm.split).states
    monkeypatch.setattr(type(lm.split), "states", lambda *a, **k: passes.append(1) or states(*a, **k))
    again, _ = cached(lm, documents, tmp_path)
    assert len(passes) == 1
    for name in SPLITS:
        assert torch.equal(again[name].inputs[2], expected[name].inputs[2])
        assert torch.equal(again[name].chosen, expected[name].chosen)
    with pytest.raises(ValueError, match="readout inputs of something else .*splits"):
        cached(lm, documents[:-3], tmp_path)


# ---------------------------------------------------------------- views


class Seen:
    """A measure that writes down candidates as the confidences get them, and lets nobody leave."""

    def __init__(self, candidates):
        self.candidates, self.rows, self.first = candidates, [], None

    def __call__(self, reading):
        short = shortlist(reading.logits, self.candidates, reading.ids)
        if reading.layer == LAYERS[0]:
            self.first = short.ids
        at = reading.of(self.first)
        self.rows.append((reading.layer, reading.position, short, at, reading.logits.logsumexp(-1)))
        return torch.zeros(len(reading.hidden))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", [None, "fixed", "decaying"])
def test_views_of_cached_tokens_are_what_decoding_sees(name, kind, tmp_path):
    lm = with_exits(name)
    documents = documents_of(lm, name, 8, 6)
    tokens, _ = cached(lm, documents, tmp_path)
    pruning = None if kind is None else Pruning(kind, VOCABULARY, 4, 1, 15)
    protected = [NO_END]
    views = views_of(lm.split, tokens["test"], LAYERS, candidates=9, pruning=pruning, protected=protected)
    seen = Seen(9)
    policy = ExitPolicy(
        seen, threshold=0.5, exit_layers=LAYERS, vocabulary=kind, vocabulary_size=None if kind is None else 15
    )
    for document in split_documents(documents, 0)["test"]:
        prompt = document.source or document.ids[: document.start]
        lm.generate({"input_ids": torch.tensor([prompt])}, policy=policy, max_new_tokens=6, eos_token_id=NO_END)
    for layer in LAYERS:
        view = views.exits[layer]
        rows = [row for row in seen.rows if row[0] == layer]
        assert [row[1] for row in rows] == views.positions.tolist()
        for name, index in (("ids", 0), ("logits", 1), ("rest", 2)):
            got, expected = getattr(view.rows.short, name), torch.cat([row[2][index] for row in rows])
            if name != "rest" and expected.shape[1] < 9:  # pruning kept fewer: columns without a token stand behind
                assert bool(view.rows.short.logits[:, expected.shape[1] :].isinf().all())
                got = got[:, : expected.shape[1]]
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(view.logits, torch.cat([row[3] for row in rows]), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(view.normaliser, torch.cat([row[4] for row in rows]), atol=2e-4, rtol=1e-4)
    for row, target in enumerate(views.target.tolist()):
        k = views.ids.shape[1]
        assert (int(views.place[row]) == k) == (target not in views.ids[row].tolist())
        if views.place[row] < k:
            assert int(views.ids[row, views.place[row]]) == target


def test_the_surprise_of_true_tokens_is_their_negative_log_probability(tmp_path):
    lm = with_exits("llama")
    tokens, _ = cached(lm, documents_of(lm, "llama", 8, 6), tmp_path)
    views = views_of(lm.split, tokens["test"], LAYERS, candidates=9)
    for layer, got in views.surprise().items():
        with torch.no_grad():
            z = lm.split.project(tokens["test"].inputs[layer]).double()
        expected = -z.log_softmax(-1).gather(1, views.target[:, None])[:, 0]
        inside = views.place < 9
        torch.testing.assert_close(got[inside].double(), expected[inside], atol=1e-5, rtol=1e-5)
        assert bool(got[~inside].isinf().all())


def test_factors_read_the_whole_vocabulary(tmp_path):
    lm = with_exits("llama")
    tokens, _ = cached(lm, documents_of(lm, "llama", 8, 6), tmp_path)
    fit = tokens["fit"]
    factors = factors_of(lm.split, fit, LAYERS)[2]
    x = fit.inputs[2].double()
    torch.testing.assert_close(factors.features, x.T @ x, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        p = lm.split.project(fit.inputs[2]).double().softmax(-1)
    torch.testing.assert_close(factors.classes, (p - p * p).sum(0), atol=1e-5, rtol=1e-5)
    assert factors.rows == len(fit)


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", [None, "fixed"])
def test_fitted_saved_loaded_and_used(name, kind, tmp_path):
    lm = with_exits(name)
    before = fingerprint(lm.exits)
    documents = documents_of(lm, name, 16, 8)
    config = PosteriorConfig(candidates=10, alpha=0.3, vocabulary=kind, vocabulary_size=None if kind is None else 20)
    report = fit_posterior(lm, documents, tmp_path, config, window=64)
    assert fingerprint(lm.exits) == before, "the model's own exits stay as they are"
    assert [h.layer for h in report.honesty] == list(LAYERS)
    assert [(s.kind, s.layer) for s in report.sets] == [(k, e) for k in ("conformal", "avcs") for e in LAYERS]
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert "NLPD Laplace" in (tmp_path / "table.md").read_text()
    splits = report.settings["splits"]
    assert len({entry["digest"] for entry in splits.values()}) == 4
    assert splits["test"]["tokens"] == report.tokens
    for h in report.honesty:
        assert -1 <= h.correlation <= 1
        assert 0 <= min(h.ece.values()) <= max(h.ece.values()) <= 1
        difference = h.nlpd["temperature"] - h.nlpd["laplace"]
        assert h.better["temperature"] == pytest.approx(difference, abs=1e-9)
    for a, b in zip(report.sets[:-1], report.sets[1:], strict=True):
        assert a.kind != b.kind or (a.size >= b.size and a.coverage >= b.coverage)
        assert a.interval[0] <= a.coverage <= a.interval[1]
    again = LanguageModel(lm.model)
    again.attach_exits(load_exits(tmp_path / "exits"))
    assert again.exits.posterior.settings == report.settings
    for method in METHODS:
        policy = again.exits.posterior.policy(ExitPolicy(method, threshold=0.3))
        again.generate(inputs_for(name, 2), policy=policy, max_new_tokens=4, eos_token_id=NO_END)


def test_some_layers_and_methods_only(tmp_path):
    lm = with_exits("llama", rank=2)
    documents = documents_of(lm, "llama", 8, 6)
    report = fit_posterior(lm, documents, tmp_path, PosteriorConfig(("avcs",), layers=(2, 3), candidates=10))
    assert not report.honesty
    exits = load_exits(tmp_path / "exits")
    assert (exits.layers, exits.posterior.layers, exits.posterior.methods) == ((2, 3), (2, 3), ("avcs",))
    assert set(exits.lenses) == {"2", "3"}


def test_too_few_candidates_are_called_so(tmp_path):
    lm = with_exits("llama")
    generator = torch.Generator().manual_seed(0)
    documents = [
        Document(tuple(torch.randint(3, VOCABULARY, (20,), generator=generator).tolist()), 0, str(i)) for i in range(16)
    ]
    config = PosteriorConfig(("conformal",), candidates=2, to_text=True)
    report = fit_posterior(lm, documents, tmp_path, config)
    assert report.settings["conformal"]["limit"] == "inf"
    assert any("k too small: after layer 1" in warning for warning in report.warnings)
    assert "no token leaves" in report.table()
    loaded = load_exits(tmp_path / "exits").posterior
    assert loaded.sets("conformal").limit == math.inf


def test_evidence_that_covers_too_little_is_told(tmp_path):
    lm = with_exits("llama")
    documents = documents_of(lm, "llama", 8, 6)
    report = fit_posterior(lm, documents, tmp_path, PosteriorConfig(("avcs",), candidates=10, alpha=0.001))
    covered = report.settings["avcs"]["coverage"]
    assert covered <= 0.999
    assert set(report.settings["avcs"]["thresholds"].values()) == {1.0}
    said = f"avcs covers {covered:.1%} of the tuning tokens, not more than 1 - alpha = 99.9%"
    assert any(said in warning for warning in report.warnings)
    assert said in (tmp_path / "table.md").read_text()


def test_evidence_sets_saved_without_their_coverage_can_be_used():
    settings = {
        "layers": [2], "candidates": 4, "sizes": {"2": None}, "pruning": None, "methods": ["avcs"],
        "avcs": {"alpha": 0.1, "seed": 0, "thresholds": {"2": 1.5}},
    }  # fmt: skip
    assert Posterior(settings, {}).sets("avcs") == EvidenceSets(0.1, {2: 1.5}, 0)
    assert _warnings(Posterior(settings, {}), {}) == []
    enough = {**settings, "avcs": {**settings["avcs"], "coverage": 0.95}}
    assert Posterior(enough, {}).sets("avcs").coverage == 0.95
    assert _warnings(Posterior(enough, {}), {}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("laplace", "mie")}, "posterior is laplace, mie; choose from laplace, conformal, avcs"),
        ({"methods": ()}, "posterior is empty"),
        ({"candidates": 1}, "candidates is 1"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"vocabulary": "adaptive"}, "vocabulary is 'adaptive'"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        PosteriorConfig(**change)


def test_models_and_layers_that_do_not_fit(tmp_path):
    lm = LanguageModel(tiny("llama"))
    with pytest.raises(ValueError, match="no exits; attach some"):
        fit_posterior(lm, [], tmp_path)
    lm = with_exits("llama")
    with pytest.raises(ValueError, match="layer 4 is no exit"):
        fit_posterior(lm, [], tmp_path, PosteriorConfig(layers=(3, 4)))


# ---------------------------------------------------------------- figures


def test_ranks_correlate_as_they_should():
    a = torch.tensor([0.1, 0.2, 0.3, 0.9])
    assert _rank_correlation(a, a**3) == pytest.approx(1)
    assert _rank_correlation(a, -a) == pytest.approx(-1)
    assert _rank_correlation(a, torch.ones(4)) == 1.0


def test_errors_of_means_know_which_tokens_belong_together():
    values, windows = torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), torch.tensor([0, 0, 1, 1])
    assert _standard_error(values, torch.arange(4)) == pytest.approx(2 / 4)
    assert _standard_error(values, windows) == pytest.approx(math.sqrt(8) / 4)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    lively("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = [" ".join(f"w{13 + (7 * i + j * j) % 80}" for j in range(12)) for i in range(16)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_command_writes_exits_for_a_model_without_any(folder, texts, tmp_path):
    command = ["calibrate", folder, "--posterior", "laplace,avcs,conformal", "--task", "text", "--data", texts]
    command += ["--to-text", "--layers", "2,3", "--candidates", 20, "--alpha", 0.4, "--out", tmp_path / "run"]
    result = run(*command, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "rank corr." in result.stdout
    assert "coverage" in result.stdout
    assert f"--exits {tmp_path / 'run' / 'exits'} --confidence laplace" in result.stderr
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["settings"]["target"] == "text"
    lm = offramp.load(folder, exits=tmp_path / "run" / "exits")
    assert lm.exits.layers == lm.exits.posterior.layers == (2, 3)
    assert lm.exits.rank == 0
    words = ["generate", folder, "the sky", "--exits", tmp_path / "run" / "exits", "--max-new-tokens", 3]
    assert run(*words, "--confidence", "conformal", "--threshold", 0.2).exit_code == 0
    features = sorted((tmp_path / "run" / "features").glob("*/*"))
    times = [file.stat().st_mtime_ns for file in features]
    assert run(*command).exit_code == 0
    assert [file.stat().st_mtime_ns for file in features] == times, "cached inputs are used again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--posterior", "mie"), "choose from laplace, conformal, avcs"),
        (("--posterior", "laplace", "--vocabulary-size", "5,9"), "a posterior is for one size"),
        (("--posterior", "laplace", "--vocabulary", "adaptive"), "vocabulary is 'adaptive'"),
        (("--posterior", "laplace", "--draws", "0"), "draws is 0"),
    ],
)
def test_the_command_says_what_is_wrong(folder, texts, tmp_path, words, message):
    result = run("calibrate", folder, "--task", "text", "--data", texts, "--out", tmp_path, *words)
    assert result.exit_code != 0
    said = " ".join((result.output + str(result.exception)).replace("│", " ").split())
    assert message in said


def test_shortlists_hold_the_best_and_sum_up_the_rest():
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    short = shortlist(z, 7, torch.arange(40).expand(6, -1) + 100)
    assert SimpleNamespace(**short._asdict()).ids.min() >= 100
    whole = torch.cat([short.logits, short.rest[:, None]], dim=1).logsumexp(-1)
    torch.testing.assert_close(whole, z.logsumexp(-1))
    assert shortlist(z, 99).rest.tolist() == [-math.inf] * 6


def test_a_better_nlpd_is_said_only_where_the_intervals_of_all_exits_say_so():
    """1.5 standard errors were once called better; of two exits, 2.24 is what 95 % together ask for."""

    def honesty(layer, better):
        of_ways = {"map": 0.0, "temperature": better}
        return ProbabilityQuality(
            layer, {"map": 1.0}, {"map": 0.1}, of_ways, {"map": 1.0, "temperature": 1.0}, 1.0, 0.5, 0.5, 0.1
        )

    def said(*gains):
        found = tuple(honesty(layer, gain) for layer, gain in enumerate(gains, 2))
        return PosteriorReport({}, found, (), 0.0, 100, ())._verdict()

    assert "lower than that of a temperature after no layer, higher after no layer" in said(1.5, 2.2)
    assert "lower than that of a temperature after 3, higher after no layer" in said(2.2, 2.3)
    assert "lower than that of a temperature after no layer, higher after 2" in said(-2.3, 0.1)
