"""The probe against a plain double loop over hidden states, and the break-even layer against counting."""

import dataclasses
import json
import math
import re
import statistics

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from offramp.core.costs import break_even, exit_flops, ratios
from offramp.core.language_model import LanguageModel
from offramp.families.sizes import BlockShape, ModelShape
from offramp.lm.given import bundled_prompts
from offramp.lm.probe import Readings, probe, read_layers, summarise

WORDS = ["<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


def _tokenizer(**options):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>",
        **options,
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=4,
        vocab_size=len(WORDS), bos_token_id=0, eos_token_id=None, pad_token_id=1, initializer_range=0.3,
        max_position_embeddings=64,
    )  # fmt: skip
    return LanguageModel(transformers.LlamaForCausalLM(config).eval(), _tokenizer())


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0, initializer_factor=3.0,
    )  # fmt: skip
    return LanguageModel(transformers.T5ForConditionalGeneration(config).eval(), _tokenizer())


def _reference(logits):
    """Rank, largest probability and gap by plain loops; logits [L][N] rows of V."""
    final = [row.tolist().index(max(row.tolist())) for row in logits[-1]]
    rank, peak, gap = [], [], []
    for layer in logits:
        rank.append(
            [sum(score > row[token] for score in row.tolist()) for row, token in zip(layer, final, strict=True)]
        )
        probabilities = [sorted(row.double().softmax(-1).tolist(), reverse=True) for row in layer]
        peak.append([p[0] for p in probabilities])
        gap.append([p[0] - p[1] for p in probabilities])
    return torch.tensor(rank), torch.tensor(peak), torch.tensor(gap)


def _check(found, logits):
    """The report of a probe follows from the readouts [L, N, V]."""
    rank, peak, gap = _reference(logits)
    depth, tokens = rank.shape
    assert (found.tokens, found.num_layers) == (tokens, depth)
    saturation = [next(layer for layer in range(1, depth + 1) if not rank[layer - 1 :, n].any()) for n in range(tokens)]
    oracle = [
        next(layer for layer in range(found.min_layer, depth + 1) if rank[layer - 1, n] == 0) for n in range(tokens)
    ]
    for report in found.layers:
        ranks = sorted(rank[report.layer - 1].tolist())
        right = ranks.count(0) / tokens
        assert report.agreement == pytest.approx(right)
        assert report.max_probability == pytest.approx(peak[report.layer - 1].mean().item(), abs=1e-5)
        assert report.gap == pytest.approx(gap[report.layer - 1].mean().item(), abs=1e-5)
        assert report.overconfidence == pytest.approx(peak[report.layer - 1].mean().item() - right, abs=1e-5)
        for name, value in report.rank.items():
            assert value == pytest.approx(torch.tensor(ranks).double().quantile(int(name[1:]) / 100).item())
        held = [sum(r < k for r in ranks) / tokens >= 0.995 for k in range(found.vocabulary + 1)]
        assert report.coverage_size == held.index(True)
        assert report.settled == pytest.approx(sum(s <= report.layer for s in saturation) / tokens)
    assert found.saturation.mean == pytest.approx(sum(saturation) / tokens)
    assert found.saturation.counts == tuple(saturation.count(layer) for layer in range(1, depth + 1))
    assert found.oracle.mean == pytest.approx(sum(oracle) / tokens)
    assert found.oracle.counts == tuple(oracle.count(layer) for layer in range(1, depth + 1))


def _by_hidden_states(lm, hidden, norm, scale=1.0):
    """Logits [L, N, V] from the hidden states [1, N, D] that transformers gives; the last one is already normed."""
    with torch.no_grad():
        normed = [*map(norm, hidden[:-1]), hidden[-1]]
        return torch.stack([lm.model.lm_head(h * scale)[0] for h in normed])


def test_prompts_give_what_the_hidden_states_say(llama):
    prompts = ["a b c", "d e f g h i", "j", "k l m n"]  # padded together
    logits = []
    for prompt in prompts:
        ids = llama.encode(prompt)["input_ids"]
        full = llama.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
        with torch.no_grad():
            hidden = llama.model(full, output_hidden_states=True).hidden_states[1:]
        positions = range(ids.shape[1] - 1, full.shape[1] - 1)
        logits.append(_by_hidden_states(llama, hidden, llama.model.model.norm)[:, positions])
    _check(probe(llama, prompts, max_new_tokens=5), torch.cat(logits, dim=1))


def test_an_encoder_decoder_begins_at_its_start_token(t5):
    prompts = ["a b c d", "e f"]
    logits = []
    for prompt in prompts:
        inputs = t5.encode(prompt)
        full = t5.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            output = t5.model(**inputs, decoder_input_ids=full[:, :-1], output_hidden_states=True)
            hidden, scale = output.decoder_hidden_states[1:], 16**-0.5 if t5.model.config.scale_decoder_outputs else 1
            rows = _by_hidden_states(t5, hidden, t5.model.decoder.final_layer_norm, scale)
        torch.testing.assert_close(rows[-1], output.logits[0])
        logits.append(rows)
    _check(probe(t5, prompts, max_new_tokens=6), torch.cat(logits, dim=1))


def test_rows_that_end_early_count_up_to_their_end(llama, monkeypatch):
    full = probe(llama, ["a b", "c d e"], max_new_tokens=6)
    tokens = llama.generate(["a b", "c d e"], max_new_tokens=6).tokens
    stop = tokens[0][2]  # ends row 0 after three tokens at the latest
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", stop)
    lengths = [row.index(stop) + 1 if stop in row else 6 for row in tokens]
    assert lengths[0] <= 3
    assert (full.tokens, probe(llama, ["a b", "c d e"], max_new_tokens=6).tokens) == (12, sum(lengths))


def test_token_ids_and_texts_give_the_same(llama):
    texts = ["a b c", "d e f"]
    ids = llama.encode(texts)["input_ids"]
    assert probe(llama, ids, max_new_tokens=3).layers == probe(llama, texts, max_new_tokens=3).layers


def test_plain_texts_are_read_in_windows(llama, monkeypatch):
    monkeypatch.setattr("offramp.lm.probe.WINDOW", 4)
    seen = []
    found = probe(llama, texts=["a b c d e f", "g h"], progress=lambda done, total: seen.append((done, total)))
    logits = []
    for piece in ("a b c d", "e f", "g h"):
        with torch.no_grad():
            hidden = llama.model(llama.encode(piece)["input_ids"], output_hidden_states=True).hidden_states[1:]
        logits.append(_by_hidden_states(llama, hidden, llama.model.model.norm))
    _check(found, torch.cat(logits, dim=1))
    assert (found.source, found.examples, seen) == ("texts", 3, [(1, 3), (2, 3), (3, 3)])


def test_every_window_begins_with_the_start_token(llama, monkeypatch):
    monkeypatch.setattr("offramp.lm.probe.WINDOW", 4)
    found = probe(llama, texts=["<bos> a b c d e f"])
    assert (found.examples, found.tokens) == (2, 8)


def test_layers_are_read_in_chunks(llama, monkeypatch):
    torch.manual_seed(2)
    states = torch.randn(4, 50, 16)
    with torch.no_grad():
        whole = read_layers(llama.split, states)
        monkeypatch.setattr(llama.split, "shape", dataclasses.replace(llama.split.shape, vocabulary=1 << 30))
        parts = read_layers(llama.split, states)
        expected = _reference(llama.split.readout(states))
    for columns in zip(whole, parts, expected, strict=True):
        for column in columns[1:]:
            torch.testing.assert_close(column.double(), columns[0].double(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- costs


def _shape(weights, kv, width, vocabulary, depth):
    return ModelShape((BlockShape(weights, kv, width, width),) * depth, width, vocabulary, 4)


SHAPES = {
    "small head": _shape(1000, 100, 10, 37, 12),
    "large head": _shape(1000, 100, 10, 913, 12),
    "wide keys": _shape(1000, 450, 10, 333, 7),
    "two layers": _shape(1000, 10, 10, 250, 2),
}


def _enumerated(shape, layer, first, kept):
    """FLOPs of one token, written down as it goes through the layers."""
    depth, spent, tests = len(shape.blocks), 0, 0
    for at in range(1, depth + 1):
        if at > layer:
            spent += 2 * shape.blocks[at - 1].kv_weights
            continue
        spent += 2 * shape.blocks[at - 1].weights
        if first <= at < depth:
            spent += 2 * shape.width * (kept if tests else shape.vocabulary)
            tests += 1
    return spent + (2 * shape.width * shape.vocabulary if layer == depth else 0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pruned", [False, True])
def test_break_even_is_where_the_enumerated_costs_cross(name, pruned):
    shape = SHAPES[name]
    depth, kept = len(shape.blocks), 20 if pruned else shape.vocabulary
    full = sum(2 * block.weights for block in shape.blocks) + 2 * shape.width * shape.vocabulary
    for first in range(1, depth):
        costs = {layer: _enumerated(shape, layer, first, kept) for layer in range(first, depth + 1)}
        for layer, cost in costs.items():
            assert exit_flops(shape, layer, first, kept) == cost
        wins = [layer for layer in range(first, depth) if costs[layer] < full]
        assert max(wins) == math.ceil(break_even(shape, first, kept) - 1e-9) - 1
        assert costs[depth] > full


def test_without_pruning_the_mean_exit_decides():
    """Costs lie on a straight line up to and including layer L, so a mixture costs what its mean layer costs."""
    shape, first = SHAPES["large head"], 4
    line = break_even(shape, first)
    full = exit_flops(shape, 12, None)
    for exits in ([4, 12], [4, 4, 12], [5, 6, 7], [4, 5, 12, 12], [11, 4, 4, 4, 4, 4]):
        cost = sum(exit_flops(shape, layer, first) for layer in exits) / len(exits)
        assert (cost < full) == (sum(exits) / len(exits) < line)


def test_untested_exits_pay_one_readout():
    shape = SHAPES["small head"]
    assert exit_flops(shape, 3, None) == 3 * 2000 + 9 * 200 + 2 * 10 * 37
    assert ratios(shape) == pytest.approx((0.37, 0.1))


# ---------------------------------------------------------------- summaries


def _readings(rank, peak=0.5):
    rank = torch.tensor(rank)
    return Readings(rank, torch.full(rank.shape, peak), torch.full(rank.shape, peak / 2))


def _summary(readings, shape, min_layer=1, examples=2):
    return summarise(readings, shape, min_layer, model="m", source="prompts", examples=examples)


def test_a_believable_layer_has_only_believable_ones_behind_it():
    shape = _shape(1000, 100, 10, 100, 5)
    right = [[0, 9], [0, 0], [0, 9], [0, 9], [0, 0]]  # agreement .5, 1, .5, .5, 1
    assert _summary(_readings(right), shape).suggested_min_layer == 3
    assert _summary(_readings(right, peak=0.9), shape).suggested_min_layer is None


def test_the_verdict_follows_the_costs():
    cheap, dear = _shape(1000, 10, 10, 20, 6), _shape(1000, 10, 10, 2000, 6)
    early = [[5], [0], [0], [0], [0], [0]]
    late = [[5], [5], [5], [5], [5], [0]]
    good = _summary(_readings(early), cheap)
    assert good.suitable
    assert good.verdict.startswith("Worth trying: ")
    pruned = _summary(_readings(early), dear)
    assert pruned.flops["pruned"] < 1 < pruned.flops["tested"]
    assert pruned.verdict.startswith("Worth trying with a pruned vocabulary: ")
    bad = _summary(_readings(late), dear)
    assert not bad.suitable
    assert bad.verdict.startswith("Not suitable as is: ")
    for word in ("settled late", "20.0 layers", "train the exits", "fewer", "prune", "verify"):
        assert word in bad.verdict
    assert bad.ceiling == pytest.approx(1)


def test_a_gain_that_few_examples_do_not_show_is_none():
    """Layers 1 and 6 by halves: a token costs a full model's or a sixth of one, .58 on average with the readouts."""
    shape = _shape(1000, 10, 10, 20, 6)
    mixed = [[5, 0], [5, 0], [5, 0], [5, 0], [5, 0], [0, 0]]
    upper = {}
    for name, kept in (("tested", None), ("pruned", 6)):
        costs = [exit_flops(shape, layer, 1, kept) / exit_flops(shape, 6, None) for layer in (6, 1)]
        upper[name] = (statistics.fmean(costs), 1.96 * statistics.pstdev(costs))
    for examples in (2, 3, 4, 5, 6, 8, 12, 50):
        found = _summary(_readings(mixed), shape, examples=examples)
        assert {name: found.flops[name] for name in upper} == pytest.approx({name: upper[name][0] for name in upper})
        shown = {name for name, (mean, half) in upper.items() if mean + half / math.sqrt(examples - 1) < 1}
        assert found.suitable == bool(shown)
        assert found.verdict.startswith("Worth trying" if shown else "Not shown: ")
        assert found.verdict.startswith("Worth trying: ") == ("tested" in shown)
    assert "more would" in _summary(_readings(mixed), shape, examples=1).verdict
    few = _summary(_readings(mixed), shape, examples=2).verdict
    enough = int(few.split("about ")[1].split()[0])
    assert _summary(_readings(mixed), shape, examples=enough).suitable
    assert not _summary(_readings(mixed), shape, examples=enough - 2).suitable


def test_json_round_trip(llama, tmp_path):
    found = probe(llama, ["a b"], max_new_tokens=2, min_layer=1)
    values = found.to_dict()
    assert values["schema"] == "offramp/probe/1"
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert {f.name for f in dataclasses.fields(found)} | {"schema"} == set(values)
    found.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "probe.json").read_text()) == values


def test_json_has_no_nan():
    readings = _readings([[1, 0], [0, 0]], peak=math.nan)
    values = _summary(readings, _shape(1000, 100, 10, 100, 2)).to_dict()
    assert values["layers"][0]["gap"] is None
    json.dumps(values, allow_nan=False)


def test_table_has_a_row_per_layer_and_the_verdict(llama):
    found = probe(llama, ["a b"], max_new_tokens=2)
    lines = found.table().splitlines()
    begin = next(i for i, line in enumerate(lines) if "99.5%" in line) + 1
    rows = lines[begin : lines.index("", begin)]
    assert [int(row.lstrip("|> ").split()[0]) for row in rows[1:]] == [1, 2, 3, 4]
    assert "2 positions of 1 prompts" in lines[1]
    assert " ".join(found.verdict.split()) in " ".join(found.table().split())
    assert max(map(len, lines)) <= 100


def test_a_deep_model_gets_fewer_rows():
    shape, depth = _shape(1000, 100, 10, 100, 50), 50
    table = _summary(_readings([[1]] * (depth - 1) + [[0]]), shape, 25).table()
    numbers = [int(found[1]) for line in table.splitlines() if (found := re.match(r"\| >?(\d+) ", line))]
    assert len(numbers) <= 22
    assert {1, 25, 50} <= set(numbers)


def test_bundled_prompts():
    prompts = bundled_prompts()
    assert len(prompts) == len(set(prompts)) == 60
    assert all(prompt.strip() for prompt in prompts)


def test_the_chat_template_is_used_if_there_is_one(llama):
    template = "{% for m in messages %}x y {{ m['content'] }}{% endfor %}"
    chatty = LanguageModel(llama.model, _tokenizer(chat_template=template))
    templated = probe(llama, ["x y a b"], max_new_tokens=3)
    assert probe(chatty, ["a b"], max_new_tokens=3) == templated
    assert probe(chatty, [[{"role": "user", "content": "a b"}]], max_new_tokens=3) == templated
    assert probe(chatty, ["x y a b"], max_new_tokens=3, chat=False) == templated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there are no prompts; give at least one"),
        ({"prompts": [" "]}, "prompt 1 is empty"),
        ({"texts": []}, "there are no texts; give at least one"),
        ({"prompts": ["a"], "texts": ["b"]}, "both prompts and texts"),
        ({"prompts": ["a"], "min_layer": 4}, "min_layer is 4; a model of 4 layers can exit after layers 1..3"),
    ],
)
def test_errors_say_what_to_do(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        probe(llama, **arguments)


def test_texts_are_not_for_encoder_decoders(t5):
    with pytest.raises(ValueError, match="give an encoder-decoder prompts"):
        probe(t5, texts=["a b"])
