"""Confidences of a posterior in decoding: by hand, row by row, saved and loaded, refused where they do not fit."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import offramp
import test_brute_force
from evaluation_runs import perplexity_records
from offramp import ExitPolicy, Exits, LanguageModel, ModelError, cli
from offramp.evaluation import document_arms
from offramp.evaluation.perplexity import Passage
from offramp.hub.exit_files import load_exits
from offramp.hub.exit_posterior import METHODS, SETS, NestedSets, RunningSet
from offramp.runs.digests import fingerprint
from posteriors import CANDIDATES, LAYERS, with_posterior
from sealing import rewrite
from test_brute_force import NO_END, batch_of, lively
from test_exits import same
from tiny import VOCABULARY, greedy, inputs_for, tiny, tokenizer

NAMES = ("llama", "t5")
ALWAYS = -math.inf


def policy_for(method, threshold=None, **options):
    return ExitPolicy(
        method, threshold={"laplace": 0.1}.get(method, 0.9) if threshold is None else threshold, **options
    )


def answer(lm, policy, inputs, new=8, **options):
    return lm.generate(inputs, policy=policy, max_new_tokens=new, eos_token_id=NO_END, **options)


def early(out, depth=4):
    return sum(layer < depth for row in out.exit_layers for layer in row)


# ---------------------------------------------------------------- laplace


@pytest.mark.parametrize("name", [*NAMES, "bart"])
@pytest.mark.parametrize("vocabulary", [None, "fixed"])
@pytest.mark.parametrize("rival", [False, True])
def test_laplace_decoding_by_hand(monkeypatch, name, vocabulary, rival):
    """Every confidence from the exit's state by dense algebra and a loop over draws, in double precision."""
    size = None if vocabulary is None else 20
    lm = with_posterior(name, vocabulary=vocabulary, size=size, rival=rival)
    posterior = lm.exits.posterior

    @torch.no_grad()
    def judge(policy, kept, z, h, layer, *_):
        state = posterior.laplace(layer)
        x = lm.split.readout_input(h[layer - 1].float()[None], None)[0].double()
        r = state.root.double()
        spread = float(x @ torch.linalg.inv(r @ r.T) @ x) ** 0.5 * state.spread.double()
        row = z[layer - 1]
        best = [v for v in row.argsort(descending=True).tolist() if kept[v]][:CANDIDATES]
        others = [v for v in range(VOCABULARY) if kept[v] and v not in best]
        rest = row[others].exp().sum().log()
        total = 0
        for draw in state.draws.double():
            sample = torch.cat([row[best] + spread[best] * draw[best], rest[None]]) / state.temperature
            total = total + sample.softmax(-1)
        p = total / len(state.draws)
        first, second = p[:-1].sort(descending=True).values[:2].tolist()
        return max(first - max(second, float(p[-1])), 0.0) if rival else first - second

    monkeypatch.setattr(test_brute_force, "confidence", judge)
    threshold = 0.05 if name == "bart" else 0.15
    policy = ExitPolicy("laplace", threshold=threshold, vocabulary=vocabulary, vocabulary_size=size)
    inputs = batch_of(name)
    rows, _ = test_brute_force.reference(lm.model, inputs, replace(policy, exit_layers=LAYERS), 6, NO_END)
    out = answer(lm, policy, inputs, 6)
    assert out.tokens == [row.tokens for row in rows]
    assert out.exit_layers == [row.layers for row in rows]
    for got, row in zip(out.confidences, rows, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(row.confidences), rtol=0, atol=1e-4, equal_nan=True)
    assert rival or len({layer for row in out.exit_layers for layer in row}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_without_prior_variance_laplace_is_the_softmax_gap(name):
    lm, inputs = with_posterior(name, prior=1e-12), batch_of(name)
    for layer in LAYERS:  # nor any temperature
        lm.exits.posterior.settings["laplace"]["exits"][str(layer)]["temperature"] = 1.0
    lm.attach_exits(lm.exits)
    got, expected = (answer(lm, ExitPolicy(measure, threshold=0.2), inputs) for measure in ("laplace", "softmax"))
    assert (got.tokens, got.exit_layers) == (expected.tokens, expected.exit_layers)
    for a, b in zip(got.confidences, expected.confidences, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_ledger_knows_what_laplace_costs(rank):
    lm, inputs = with_posterior("llama", rank=rank), batch_of("llama")
    out = answer(lm, policy_for("laplace"), inputs)
    solve = 32 * 32 + 2 * 32 if rank is None else 2 * 32 * 4 + 3 * 4 + 2 * 32
    assert out.costs.parts["confidence"].flops == out.costs.tests * (solve + 2 * CANDIDATES * 20)
    assert out.costs.parts["confidence"].bytes > 0
    for method in SETS:
        assert answer(lm, policy_for(method), inputs).costs.parts["confidence"].flops == 0


# ---------------------------------------------------------------- sets


class Spy(NestedSets):
    """The measure of a kind of sets, which writes down what it saw."""

    def __init__(self, lm, kind):
        super().__init__(lm.exits.posterior, kind)
        object.__setattr__(self, "seen", [])

    def begin(self):
        begun = Spied(self.posterior, self.posterior.sets(self.kind))
        begun.seen = self.seen
        return begun


class Spied(RunningSet):
    def __call__(self, reading):
        confidence = super().__call__(reading)
        full = reading.of(torch.arange(VOCABULARY)[None])
        self.seen.append((reading.layer, full, self.running.ids.clone(), self.running.active.clone(), confidence))
        return confidence


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", [None, "fixed", "decaying"])
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("threshold", [0.9, 0.3])
def test_who_leaves_emits_the_best_token_of_a_set_that_is_small_enough(name, vocabulary, kind, threshold):
    size = None if vocabulary is None else 15
    lm = with_posterior(name, vocabulary=vocabulary, size=size, limit=1.6, alpha=0.3)
    spy = Spy(lm, kind)
    left = 0
    for seed in range(4):
        policy = ExitPolicy(spy, threshold=threshold, exit_layers=LAYERS, vocabulary=vocabulary, vocabulary_size=size)
        stream = lm.stream(inputs_for(name, 1, seed=seed), policy=policy, max_new_tokens=8, eos_token_id=NO_END)
        for step in stream:
            for layer, full, ids, active, confidence in spy.seen:
                members = ids[0][active[0]].tolist()
                n = len(members)
                assert float(confidence) == pytest.approx(1 / n if n else 0, abs=1e-6)
                leaves = 0 < n and (n == 1 if threshold == 0.9 else n <= 3)
                assert leaves == (int(step.exit_layer) == layer), "empty and large sets go on"
                if leaves:
                    assert int(step.token) in members
                    assert int(step.token) == max(members, key=lambda v: float(full[0, v]))
                    left += 1
            spy.seen.clear()
    assert left, "somebody should have left"


def by_hand(posterior, seen):
    """Conformal sets of one token, exit by exit, with plain loops."""
    settings = posterior.settings["conformal"]
    first = seen[0][1][0]
    worst = dict.fromkeys(first.argsort(descending=True)[:CANDIDATES].tolist(), 0.0)
    sets = []
    for layer, full, *_ in seen:
        z = full[0].double()
        log_p = z - z.logsumexp(-1)
        top = 3.0 + 0.1 * layer
        for v in worst:
            worst[v] = max(worst[v], float(-log_p[v]) * 3.0 / top)
        sets.append({v for v, m in worst.items() if m <= settings["limit"]})
    return sets


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", [None, "decaying"])
def test_conformal_sets_by_hand(name, vocabulary):
    size = None if vocabulary is None else 15
    lm = with_posterior(name, vocabulary=vocabulary, size=size)
    spy = Spy(lm, "conformal")
    policy = ExitPolicy(spy, threshold=1.0, exit_layers=LAYERS, vocabulary=vocabulary, vocabulary_size=size)
    changed = 0
    for _ in lm.stream(inputs_for(name), policy=policy, max_new_tokens=10, eos_token_id=NO_END):
        if spy.seen:
            got = [set(ids[0][active[0]].tolist()) for _, _, ids, active, _ in spy.seen]
            assert got == by_hand(lm.exits.posterior, spy.seen)
            changed += got[0] != got[-1]
        spy.seen.clear()
    assert changed, "sets should shrink for the test to mean something"


def test_empty_sets_run_to_full_depth():
    lm, inputs = with_posterior("llama", limit=0.0), inputs_for("llama")
    out = answer(lm, policy_for("conformal"), inputs)
    assert set(out.exit_layers[0]) == {4}
    assert set(out.confidences[0][1:]) == {0.0}
    assert out.tokens == answer(lm, None, inputs).tokens


@pytest.mark.parametrize("kind", SETS)
def test_processors_that_forbid_the_whole_set_read_all_tokens(kind):
    lm, inputs = with_posterior("llama", limit=1.6, alpha=0.3), inputs_for("llama")
    plain = answer(lm, policy_for(kind, 0.2), inputs)
    assert early(plain)
    banned = sorted({token for row in plain.tokens for token in row})
    out = answer(lm, policy_for(kind, 0.2), inputs, bad_words_ids=[[token] for token in banned])
    assert not set(banned) & set(out.tokens[0])


def test_perplexity_counts_tokens_outside_a_set_and_stays_finite(tmp_path):
    lm = with_posterior("llama", limit=1.6)
    passages = [Passage(str(i), str(i), tuple(inputs_for("llama", seed=i)["input_ids"][0].tolist())) for i in range(2)]
    full = perplexity_records(lm, passages, "full", None, tmp_path / "full.jsonl")
    policy = policy_for("conformal", 0.2)
    records = perplexity_records(
        lm, passages, "sets", policy, tmp_path / "sets.jsonl", full={r.id: r for r in full}, batch_size=2
    )
    assert any(layer < 4 for r in records for layer in r.exit_layers)
    assert all(math.isfinite(r.sums["nats"]) for r in records)
    assert sum(r.sums["outside"] for r in records) > 0


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocabulary", [None, "fixed"])
def test_rows_of_a_batch_are_what_they_are_alone(name, method, vocabulary):
    size = None if vocabulary is None else 15
    lm = with_posterior(name, vocabulary=vocabulary, size=size, limit=1.8, alpha=0.3)
    policy = policy_for(method, 0.3 if method != "laplace" else 0.15, vocabulary=vocabulary, vocabulary_size=size)
    inputs = inputs_for(name, 4, padded=True)
    together = answer(lm, policy, inputs)
    assert early(together)
    for row in range(4):
        mask = inputs["attention_mask"][row].bool()
        alone = answer(lm, policy, {"input_ids": inputs["input_ids"][row : row + 1, mask]})
        assert alone.tokens[0] == together.tokens[row]
        assert alone.exit_layers[0] == together.exit_layers[row]
        torch.testing.assert_close(
            torch.tensor(alone.confidences[0]), torch.tensor(together.confidences[row]), atol=1e-4, rtol=0,
            equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_never_exiting_and_verifying_give_greedy_text(name, method):
    lm, inputs = with_posterior(name, limit=1.6, alpha=0.3), inputs_for(name, 2)
    expected = greedy(lm.model, inputs, 10, eos_token_id=NO_END)
    for threshold in (1.0, None):
        out = answer(lm, ExitPolicy(method, threshold=threshold), inputs, 10)
        assert torch.equal(out.sequences, expected)
    out = answer(lm, policy_for(method, skipped="verify"), inputs, 10)
    assert torch.equal(out.sequences, expected)
    assert early(answer(lm, policy_for(method, skipped="defer", batch="all"), inputs, 10)) >= 0


@pytest.mark.parametrize("policy", [None, ExitPolicy("static", min_layer=2), ExitPolicy(threshold=0.2)])
def test_a_posterior_changes_nothing_for_others(policy):
    lm, inputs = with_posterior("llama"), batch_of("llama")
    bare = LanguageModel(lively("llama"))
    bare.attach_exits(lm.exits.with_posterior(None))
    got, expected = answer(lm, policy, inputs), answer(bare, policy, inputs)
    same(got, expected)
    assert got.costs.flops == expected.costs.flops


def test_the_same_rule_for_transformers_generate():
    lm, inputs = with_posterior("llama"), inputs_for("llama", 2)
    policy = policy_for("laplace")
    out = lm.model.generate(
        **inputs, custom_generate=policy.custom_generate(lm.exits), max_new_tokens=8, eos_token_id=NO_END
    )
    assert torch.equal(out, answer(lm, policy, inputs).sequences)


# ---------------------------------------------------------------- what does not fit


def refused(lm, policy, message):
    with pytest.raises(ValueError, match=message):
        answer(lm, policy, inputs_for("llama"), 2)


@pytest.mark.parametrize("method", METHODS)
def test_exits_without_a_posterior(method):
    lm = LanguageModel(tiny("llama"))
    refused(lm, policy_for(method), f"{method}.*the model has no exits; fit one with: offramp calibrate")
    lm.attach_exits(Exits.fresh(lm.split, LAYERS, rank=0))
    refused(lm, policy_for(method), "the model's exits have none; fit one")


def test_what_a_posterior_was_not_fitted_for():
    lm = with_posterior("llama", layers=(2, 3))
    refused(lm, policy_for("laplace", min_layer=1), "after layer 1, but it was fitted after layers 2, 3 only")
    refused(lm, policy_for("avcs", exit_layers=(3,)), "at its first exit, after layer 2, but the first test .* 3")
    answer(lm, policy_for("laplace", exit_layers=(3,)), inputs_for("llama"), 2)
    refused(lm, policy_for("laplace", vocabulary="fixed"), "fitted for all tokens, but .* vocabulary='fixed' of other")
    refused(lm, policy_for("laplace", vocabulary="adaptive"), "fitted for all tokens")
    lm = with_posterior("llama", vocabulary="fixed", size=15)
    refused(lm, policy_for("conformal"), "fitted for vocabulary='fixed', .*=15, but the policy has vocabulary=None")
    refused(lm, policy_for("laplace", vocabulary="fixed", vocabulary_size=16), "fitted for vocabulary='fixed'")
    refused(lm, policy_for("laplace", vocabulary="fixed", vocabulary_size=15, min_layer=2, exit_layers=(2, 3)), "first")
    posterior = lm.exits.posterior
    settings = {**posterior.settings, "methods": ["avcs"]}
    del settings["laplace"], settings["conformal"]
    tensors = {n: t for n, t in posterior.state_dict().items() if n != "digest"}
    lm.attach_exits(lm.exits.with_posterior(type(posterior)(settings, tensors)))
    refused(lm, policy_for("laplace", vocabulary="fixed", vocabulary_size=15), "theirs has only avcs")
    answer(lm, policy_for("avcs", vocabulary="fixed", vocabulary_size=15), inputs_for("llama"), 2)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    lively("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lens", [None, 0.1])
@pytest.mark.parametrize("rank", [None, 3])
def test_saved_and_loaded_the_same(folder, tmp_path, lens, rank):
    lm = with_posterior("llama", model=offramp.load(folder).model, lens=lens, rank=rank, limit=1.8)
    lm.save_exits(tmp_path / "exits", settings={"steps": 3})
    again = offramp.load(folder, exits=tmp_path / "exits")
    assert again.exits.posterior.settings == lm.exits.posterior.settings
    assert fingerprint(again.exits) == fingerprint(lm.exits)
    for method in METHODS:
        outs = [answer(m, policy_for(method), inputs_for("llama", 3)) for m in (lm, again)]
        same(*outs)
    again.save_exits(tmp_path / "exits")  # nothing else is in the folder
    assert load_exits(tmp_path / "exits").posterior.layers == LAYERS


def test_a_model_in_bfloat16_keeps_its_posterior_in_float32(folder, tmp_path):
    lm = with_posterior("llama", model=offramp.load(folder).model, lens=0.1)
    lm.save_exits(tmp_path / "exits")
    low = offramp.load(folder, exits=tmp_path / "exits", dtype="bfloat16")
    placed = low.split.exits
    assert placed.lenses["1"].up.weight.dtype == torch.bfloat16
    assert placed.posterior.laplace(1).root.dtype == torch.float32
    for method in METHODS:
        answer(low, policy_for(method), inputs_for("llama"), 3)


def test_exits_without_a_posterior_are_written_as_before_there_were_any(folder, tmp_path):
    lm = LanguageModel(offramp.load(folder).model)
    lm.attach_exits(Exits.fresh(lm.split, (1, 2)))
    lm.save_exits(tmp_path / "exits")
    assert "posterior" not in json.loads((tmp_path / "exits" / "exits.json").read_text())
    assert load_exits(tmp_path / "exits").posterior is None


def change_limit(values):
    values["posterior"]["conformal"]["limit"] = 99.0


def drop(values):
    values["posterior"] = None


def other_layers(values):
    values["layers"] = [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_limit, "posterior in .* is damaged .*not those its tensors were saved with"),
        (drop, "posterior in .* is damaged .*settings are missing"),
        (other_layers, "posterior in .* is damaged .*for layers"),
    ],
)
def test_a_damaged_posterior(tmp_path, change, message):
    lm = with_posterior("llama")
    lm.save_exits(tmp_path / "exits")
    rewrite(tmp_path / "exits" / "exits.json", change)
    with pytest.raises(ModelError, match=message):
        load_exits(tmp_path / "exits")


def test_a_posterior_beside_other_lenses_is_refused(tmp_path):
    lm = with_posterior("llama", lens=0.1)
    with torch.no_grad():
        lm.exits.lenses["2"].up.bias.add_(1)
    lm.save_exits(tmp_path / "exits")
    with pytest.raises(ModelError, match="fitted for other lenses"):
        load_exits(tmp_path / "exits")


def test_another_limit_is_another_fingerprint():
    one, other = (with_posterior("llama", limit=limit) for limit in (2.5, 2.500001))
    assert fingerprint(one.exits) != fingerprint(other.exits)


def test_some_of_the_exits():
    lm = with_posterior("llama", lens=0.1)
    made = lm.exits.with_classifiers().only((2, 3))
    assert (made.layers, made.posterior) == ((2, 3), None)
    assert set(made.lenses) == set(made.classifiers) == {"2", "3"}
    assert lm.exits.layers == LAYERS
    assert lm.exits.posterior is not None


# ---------------------------------------------------------------- tables and commands


def test_default_arms_have_the_confidences_of_the_posterior():
    lm = with_posterior("llama", vocabulary="fixed", size=15)
    arms = document_arms(lm)
    assert {arms[m].vocabulary_size for m in METHODS} == {15}
    for method in METHODS:
        assert arms[method].exit_layers == LAYERS
        answer(lm, arms[method], inputs_for("llama"), 3)
    assert not set(METHODS) & set(document_arms(LanguageModel(tiny("llama"))))


def test_the_command_line(folder, tmp_path):
    with_posterior("llama", model=offramp.load(folder).model).save_exits(tmp_path / "exits")
    words = [
        "generate",
        folder,
        "the sky",
        "--confidence",
        "laplace",
        "--threshold",
        0.1,
        "--exits",
        tmp_path / "exits",
    ]
    result = CliRunner().invoke(cli.app, [str(word) for word in [*words, "--max-new-tokens", 4]])
    assert result.exit_code == 0, result.output
