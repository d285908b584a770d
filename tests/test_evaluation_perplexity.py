"""Perplexity with exits against the logits that transformers gives for the whole text at once."""

import math

import pytest
import torch

from evaluation_runs import perplexity_records
from offramp import ExitPolicy, LanguageModel
from offramp.evaluation import Passage, read_passages
from tiny import VOCABULARY, tiny, tokenizer, truncated

SOFTMAX = ExitPolicy(threshold=0.2, min_layer=1)
PRUNED = ExitPolicy(threshold=0.2, min_layer=1, vocabulary="fixed", vocabulary_size=10)


def model(name="llama"):
    return LanguageModel(tiny(name), tokenizer(), name="tiny")


def passages(count=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [length - index % 2 * 3 for index in range(count)]
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]  # ends of sequence, too
    return [Passage(f"p{i}", f"g{i}", tuple(row)) for i, row in enumerate(rows)]


def records(folder, policy=None, *, lm=None, given=None, name="a", **options):
    lm, given = lm or model(), given or passages()
    full = {r.id: r for r in perplexity_records(lm, given, "full", None, folder / "full.jsonl")}
    return perplexity_records(lm, given, "arm", policy, folder / f"{name}.jsonl", full=full, **options)


def log_probabilities(hf, ids):
    """Closed form: [T - 1] log-probabilities and [T - 1] best tokens."""
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0], logits.argmax(-1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", [None, ExitPolicy(threshold=1.0, min_layer=1), ExitPolicy("static", min_layer=2)])
def test_equals_transformers_logits_of_as_many_layers(tmp_path, name, policy):
    lm = model(name)
    depth = 2 if policy and policy.confidence == "static" else lm.num_layers
    hf = truncated(tiny(name), depth) if depth < lm.num_layers else tiny(name)
    for record, passage in zip(records(tmp_path, policy, lm=lm), passages(), strict=True):
        log_p, best = log_probabilities(hf, passage.ids)
        assert record.sums["nats"] == pytest.approx(-float(log_p.sum()), rel=1e-4)
        assert record.scores["probability"] == pytest.approx(math.exp(float(log_p.mean())), rel=1e-4)
        assert record.tokens == best.tolist()
        assert record.scores["accuracy"] == pytest.approx((best == torch.tensor(passage.ids[1:])).double().mean())
        assert record.exit_layers == [depth] * (len(passage.ids) - 1)
        assert record.sums["outside"] == 0


@pytest.mark.parametrize("policy", [SOFTMAX, PRUNED, ExitPolicy("static", min_layer=2)])
def test_along_the_policys_own_answer_layers_and_costs_are_those_of_generate(tmp_path, policy):
    lm = model()
    prompts = [[1], [20], [33]]
    answers = [lm.generate(torch.tensor([p]), policy=policy, max_new_tokens=8) for p in prompts]
    given = [Passage(f"{p}", "g", (*p, *a.tokens[0])) for p, a in zip(prompts, answers, strict=True)]
    for record, answer in zip(records(tmp_path, policy, lm=lm, given=given), answers, strict=True):
        assert record.exit_layers == answer.exit_layers[0]
        assert record.tokens == answer.tokens[0]
        assert record.scores["accuracy"] == 1
        assert record.sums["outside"] == 0
        assert (record.flops, record.bytes) == (answer.costs.flops, answer.costs.bytes)


def test_pruning_changes_when_tokens_leave_but_not_what_a_layer_thinks_of_them(tmp_path):
    """All leave at layer 2 of tests after 1 and 2: pruned or not, the distribution is that of layer 2."""
    at_two = {"min_layer": 1, "exit_layers": (1, 2), "threshold": (1.0, -math.inf)}
    plain = records(tmp_path, ExitPolicy(**at_two))
    pruned = records(tmp_path, ExitPolicy(**at_two, vocabulary="fixed", vocabulary_size=10), name="b")
    assert {layer for r in pruned for layer in r.exit_layers[1:]} == {2}
    for a, b in zip(plain, pruned, strict=True):
        assert b.sums["nats"] == pytest.approx(a.sums["nats"])
    assert sum(r.sums["outside"] for r in plain) == 0
    assert 0 < sum(r.sums["outside"] for r in pruned) < sum(len(r.tokens) for r in pruned)
    assert sum(r.flops for r in pruned) < sum(r.flops for r in plain)


@pytest.mark.parametrize("policy", [None, SOFTMAX, PRUNED])
def test_passages_of_different_lengths_together(tmp_path, policy):
    one = records(tmp_path, policy)
    together = records(tmp_path, policy, name="b", batch_size=3)
    for a, b in zip(one, together, strict=True):
        assert (a.tokens, a.exit_layers) == (b.tokens, b.exit_layers)
        assert b.sums["nats"] == pytest.approx(a.sums["nats"])


def test_agreement_is_with_what_the_full_model_would_have_said(tmp_path):
    full = records(tmp_path)
    for record, theirs in zip(records(tmp_path, SOFTMAX, name="b"), full, strict=True):
        pairs = zip(record.tokens, theirs.tokens, strict=True)
        assert record.agreement == pytest.approx(sum(a == b for a, b in pairs) / len(record.tokens))
        assert record.same == (record.tokens == theirs.tokens)


# ---------------------------------------------------------------- passages


def test_every_token_of_a_text_is_predicted_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(20, 43)))
    with_start = read_passages(model(), [path], window=10)
    assert [p.ids[0] for p in with_start] == [1, 1, 1]
    assert [i for p in with_start for i in p.ids[1:]] == list(range(20, 43))
    lm = model()
    lm.tokenizer.bos_token = None
    without = read_passages(lm, [path], window=10)
    assert [i for p in without for i in p.ids[1:]] == list(range(21, 43))
    assert [p.ids[0] for p in without] == [20, 30, 40]
    assert len({p.group for p in without}) == len({p.id for p in without}) == 3
    two = read_passages(lm, [path, path], window=10)
    assert len({p.id for p in two}) == 6
    assert len({p.group for p in two}) == 2


@pytest.mark.parametrize(("window", "message"), [(0, r"allowed are 1\.\.255"), (256, r"allowed are 1\.\.255")])
def test_windows_that_do_not_fit(tmp_path, window, message):
    path = tmp_path / "text.txt"
    path.write_text("the sky")
    with pytest.raises(ValueError, match=message):
        read_passages(model(), [path], window=window)


def test_bad_input(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the sky")
    with pytest.raises(ValueError, match="decoder-only"):
        read_passages(model("t5"), [path])
    with pytest.raises(ValueError, match="without a tokenizer"):
        read_passages(LanguageModel(tiny("llama")), [path])
    with pytest.raises(ValueError, match="'propagate' or 'defer'"):
        records(tmp_path, ExitPolicy(min_layer=1, skipped="verify"))
    with pytest.raises(ValueError, match="decode_from='contrastive'"):
        records(tmp_path, ExitPolicy("contrastive", min_layer=2, decode_from="contrastive"))
