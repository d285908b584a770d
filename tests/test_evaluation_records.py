"""Records of arms: what they say, and that their files survive interruptions and refuse what does not belong."""

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation_runs import SHORT, TASK, decode_records, examples, model
from offramp import ExitPolicy, LanguageModel
from offramp.core.generation import pieces
from offramp.evaluation import read_records
from offramp.evaluation.records import agreement
from offramp.metrics.text import f1
from tiny import greedy, tiny

SOFTMAX = ExitPolicy(threshold=0.2, min_layer=1)


def records(path, policy=None, full=None, *, name="llama", count=5, lm=None, **options):
    full = None if full is None else {record.id: record for record in full}
    options = {"max_new_tokens": SHORT, **options}
    return decode_records(lm or model(name), TASK, examples(count), "arm", policy, path, full=full, **options)


def timeless(records):
    return [replace(record, seconds=0.0, prompt_seconds=0.0, round=0.0) for record in records]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_full_model_is_transformers_generate(tmp_path, name):
    lm = model(name)
    for record, example in zip(records(tmp_path / "a.jsonl", name=name), examples(), strict=True):
        inputs = lm.encode(TASK.prompts(lm, [example]))
        prompt = 1 if name == "t5" else inputs["input_ids"].shape[1]
        assert record.tokens == greedy(tiny(name), inputs, SHORT)[0, prompt:].tolist()
        assert record.text == lm.tokenizer.decode(record.tokens, skip_special_tokens=True)
        assert record.scores["f1"] == f1(record.text, example.references)
        assert (record.id, record.group, record.arm) == (example.id, example.group, "arm")
        assert record.exit_layers == [lm.num_layers] * len(record.tokens)
        assert (record.agreement, record.same) == (1, True)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "policy", [None, SOFTMAX, replace(SOFTMAX, vocabulary="fixed"), ExitPolicy("static", min_layer=2)]
)
def test_costs_are_those_of_generate(tmp_path, name, policy):
    lm = model(name)
    full = records(tmp_path / "full.jsonl", name=name)
    for record, example in zip(records(tmp_path / "a.jsonl", policy, full, name=name), examples(), strict=True):
        costs = lm.generate(TASK.prompts(lm, [example]), policy=policy, max_new_tokens=SHORT).costs
        assert (record.flops, record.bytes) == (costs.flops, costs.bytes)
        assert sum(record.parts.values()) == record.flops
        assert record.parts["encoder"] == costs.parts["encoder"].flops
        assert record.seconds > 0


def test_without_references_the_full_models_answer_is_one(tmp_path):
    lm, asked = model(), [replace(example, references=()) for example in examples(4)]
    options = {"max_new_tokens": SHORT}
    full = decode_records(lm, TASK, asked, "full", None, tmp_path / "full.jsonl", **options)
    assert all(record.scores["f1"] == 1 for record in full)
    policy = ExitPolicy(threshold=-math.inf, min_layer=1)
    early = decode_records(
        lm, TASK, asked, "early", policy, tmp_path / "early.jsonl", full={r.id: r for r in full}, **options
    )
    assert any(record.scores["f1"] < 1 for record in early)
    for mine, theirs in zip(early, full, strict=True):
        assert mine.scores["f1"] == pytest.approx(f1(mine.text, [theirs.text]))


def test_tokens_bring_their_texts_and_confidences(tmp_path):
    lm = model()
    full = records(tmp_path / "full.jsonl")
    assert {value for record in full for value in record.confidences} == {None}
    for record, example in zip(records(tmp_path / "a.jsonl", SOFTMAX, full), examples(), strict=True):
        out = lm.generate(TASK.prompts(lm, [example]), policy=SOFTMAX, max_new_tokens=SHORT)
        assert record.confidences == [None if math.isnan(c) else round(c, 4) for c in out.confidences[0]]
        assert any(record.confidences)
        words = [lm.tokenizer.decode([token], skip_special_tokens=True) for token in record.tokens]
        assert [piece.strip() for piece in record.pieces] == words
        assert "".join(record.pieces) == record.text


@given(st.text(alphabet="aä€😀 ", max_size=6), st.booleans())
def test_pieces_are_the_text_whatever_tokens_are(text, half):
    """Tokens of single bytes, up to four of which are one character; the last one may lack its end."""
    data = text.encode()[: -1 if half else None]

    class Bytes:
        @staticmethod
        def decode(ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    lm = LanguageModel(tiny("llama"), Bytes())
    found = pieces(lm.tokenizer, list(data))
    assert len(found) == len(data)
    assert "".join(found) == data.decode(errors="replace")
    if not half:
        assert [piece for piece in found if piece] == list(text)


def test_without_a_tokenizer_there_are_no_pieces():
    assert pieces(None, [1, 2]) == []


def test_prefill_is_the_pass_over_the_prompt(tmp_path):
    lm = model()
    record = records(tmp_path / "a.jsonl", max_new_tokens=4)[0]
    prompt = lm.encode(TASK.prompts(lm, examples(1)))["input_ids"].shape[1]
    assert record.parts["prefill"] == lm.split.shape.generation_flops(prompt, 1)
    assert records(tmp_path / "b.jsonl", name="t5")[0].parts["prefill"] == 0


def test_a_batch_shares_its_costs_and_says_the_same(tmp_path):
    one = records(tmp_path / "one.jsonl")
    together = records(tmp_path / "three.jsonl", batch_size=3)
    assert [r.tokens for r in together] == [r.tokens for r in one]
    lm = model()
    costs = [lm.generate(TASK.prompts(lm, examples()[at : at + 3]), max_new_tokens=SHORT).costs for at in (0, 3)]
    assert sum(r.flops for r in together) == sum(c.flops for c in costs)
    assert sum(r.bytes for r in together) == sum(c.bytes for c in costs)
    assert len({r.flops for r in together[:3]}) <= 2


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_agreement(mine, theirs):
    padded = [(*row, *[None] * (6 - len(row))) for row in (mine, theirs)]
    pairs = [(a, b) for a, b in zip(*padded, strict=True) if (a, b) != (None, None)]
    expected = sum(a == b for a, b in pairs) / len(pairs) if pairs else 1
    assert agreement(mine, theirs) == expected == agreement(theirs, mine)
    assert (agreement(mine, theirs) == 1) == (mine == theirs)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("batch_size", [1, 2])
def test_cut_anywhere_it_goes_on_to_the_same_records(tmp_path, batch_size):
    path = tmp_path / "a.jsonl"
    whole = records(path, batch_size=batch_size)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in [
        0,
        10,
        len(lines[0]),
        len(lines[0]) + 5,
        len(content) // 2,
        len(content) - len(lines[-1]),
        len(content) - 1,
    ]:
        path.write_bytes(content[:cut])
        assert timeless(records(path, batch_size=batch_size)) == timeless(whole)
        header, kept = read_records(path)
        assert timeless(kept) == timeless(whole)
        assert header == {k: v for k, v in json.loads(lines[0]).items() if k != "digest"}


def test_a_finished_file_is_read_and_nothing_else(tmp_path, monkeypatch):
    path, lm = tmp_path / "a.jsonl", model()
    first = records(path, lm=lm)
    before = path.read_bytes()
    monkeypatch.setattr(lm, "stream", None)
    assert records(path, lm=lm) == first
    assert path.read_bytes() == before


def test_what_was_answered_is_kept_when_an_answer_fails(tmp_path, monkeypatch):
    path, lm = tmp_path / "a.jsonl", model()
    stream, calls = lm.stream, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("no space left on device")
        return stream(*arguments, **options)

    monkeypatch.setattr(lm, "stream", failing)
    with pytest.raises(OSError, match="no space"):
        records(path, lm=lm)
    records(path, lm=lm)
    assert len(calls) == 3 + 3  # two stood


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "settings.max_new_tokens was 6 and is now 5"),
        ({"settings": {"repetition_penalty": 1.2}}, "repetition_penalty was None and is now 1.2"),
        ({"policy": SOFTMAX}, "policy was None"),
        ({"count": 4}, "examples was"),
        ({"batch_size": 2}, "batch_size was 1 and is now 2"),
        ({"name": "llama-3"}, "model was"),
    ],
)
def test_other_records_are_refused(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    full = records(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        records(path, **{"full": full, **change})
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:.* has no digest")
@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"schema": "x"}\n'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not hold records"):
        records(path)
    assert path.read_text() == content


def test_bad_input(tmp_path):
    path, lm = tmp_path / "a.jsonl", model()
    with pytest.raises(ValueError, match="there are no examples"):
        decode_records(lm, TASK, [], "arm", None, path)
    with pytest.raises(ValueError, match="same id"):
        decode_records(lm, TASK, examples(1) * 2, "arm", None, path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        decode_records(lm, TASK, examples(), "arm", None, path, batch_size=0)
    with pytest.raises(ValueError, match="full model's records of 5 of 5 examples"):
        decode_records(lm, TASK, examples(), "arm", SOFTMAX, path)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        records(path, ExitPolicy("static", min_layer=9), records(tmp_path / "full.jsonl"))
    assert not path.exists()


def test_records_are_json(tmp_path):
    full = records(tmp_path / "full.jsonl")
    for record in records(tmp_path / "a.jsonl", SOFTMAX, full):
        assert json.loads(json.dumps(asdict(record), allow_nan=False)) == asdict(record)
