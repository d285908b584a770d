"""Texts and answers become windows; what is held out is never trained on."""

import json

import pytest

from offramp import LanguageModel
from offramp.training import AnswerConfig, answer_documents, prepare, read_texts, text_documents
from offramp.training.data import Document, batch, cut, divide, steps_per_epoch
from tiny import tiny, tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny("llama"), tokenizer(), name="tiny")


def documents(count, length=10, *, groups=None):
    return [
        Document(tuple(range(100 * i, 100 * i + length)), 0, str(i % groups if groups else i)) for i in range(count)
    ]


def test_layouts_of_texts(tmp_path):
    plain, lines, listed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.json"
    plain.write_text("the sky\n\nis blue\n")
    lines.write_text('{"text": "one", "more": "two"}\n\n{"text": "three", "more": "four"}\n')
    listed.write_text('[{"dialogue": "a", "summary": "b"}]')
    assert read_texts(plain) == ["the sky\n\nis blue\n"]
    assert read_texts(lines) == ["one", "three"]
    assert read_texts(lines, ["text", "more"]) == ["one\ntwo", "three\nfour"]
    assert read_texts(listed, ["dialogue", "summary"]) == ["a\nb"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "holds no text under text"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', "line 1 has no text under 'text'; it has 'body'"),
        ("a.jsonl", '"x"\n', "a JSON str stands where an object"),
        ("a.json", '{"text": "x"}', "holds a JSON dict"),
        ("a.json", '{"text": "x"}\n{"text": "x"}', "need the ending .jsonl"),
    ],
)
def test_wrong_layouts_say_where(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_windows_cover_every_token_but_the_first_of_each():
    windows = cut([Document(tuple(range(1, 12)), 0, "")], 4)
    assert windows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    assert windows.counted.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]


def test_a_start_token_stands_in_front_of_each_window():
    windows = cut([Document((7, 1, 2, 3, 4, 5), 0, "")], 4, bos=7)
    assert windows.ids.tolist() == [[7, 1, 2, 3], [7, 4, 5, 0]]
    assert windows.counted.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]
    assert windows.positions == 5


def test_only_answers_count():
    windows = cut([Document((7, 1, 2, 3, 4, 5, 6), 4, "")], 4, bos=7)
    assert windows.ids.tolist() == [[7, 4, 5, 6]]  # the first window has nothing to predict
    assert windows.counted.int().tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_the_held_out_part_shares_no_document(share):
    train, held_out = divide(documents(20, groups=7), share, seed=5)
    assert train
    assert held_out
    assert not {d.group for d in train} & {d.group for d in held_out}
    assert len(train) + len(held_out) == 20
    assert divide(documents(20, groups=7), share, seed=5) == (train, held_out)


def test_repeated_texts_fall_on_one_side(lm):
    made = text_documents(lm, ["the sky is blue", "why is the sky blue ?"] * 10)
    train, held_out = divide(made, 0.5, seed=0)
    assert len(train) == len(held_out) == 10
    assert not {d.ids for d in train} & {d.ids for d in held_out}


def test_a_single_text_is_cut(lm):
    words = " ".join(f"w{i}" for i in range(13, 93))
    data = prepare(lm, text_documents(lm, [words]), window=8, share=0.2, seed=0)
    assert set(data.train.ids.unique().tolist()) & set(data.held_out.ids.unique().tolist()) <= {0}
    assert data.held_out.positions == 14  # two windows


def test_batches_run_through_epochs():
    windows = cut(documents(5), 10)
    assert steps_per_epoch(windows, 2) == 3
    seen = [batch(windows, step, 2, seed=3).ids[:, 0] // 100 for step in range(6)]
    order = [int(i) for rows in seen for i in rows]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5] != order[5:]
    assert batch(windows, 0, 12, seed=3).ids.shape == (5, 10)  # an epoch at most


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 documents with 0 tokens are too few"),
        (["sky"], {}, "too few or too short"),
        (["the sky", "is"], {}, "nothing to hold out|nothing to train on"),
        (["the sky is", "is blue ."], {"window": 1}, r"a window of 1 tokens is outside 2\.\.256"),
        (["the sky is", "is blue ."], {"window": 999}, r"outside 2\.\.256"),
        (["the sky is", "is blue ."], {"share": 1.0}, "give one between 0 and 1"),
    ],
)
def test_too_little_is_refused(lm, texts, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(lm, text_documents(lm, texts), **{"window": 8, "share": 0.5, "seed": 0, **options})


PROMPTS = ["why is the sky blue ?", "the sky", "is the sky", "why", "blue ."]


@pytest.mark.parametrize("config", [
    AnswerConfig(6, batch_size=2), AnswerConfig(6, temperature=1.0, per_prompt=2, batch_size=3, chat=True),
])  # fmt: skip
def test_answers_are_the_models_own_and_kept(lm, tmp_path, config):
    cache = tmp_path / "answers.jsonl"
    calls = []
    made = answer_documents(lm, PROMPTS, config, cache, lambda *a: calls.append(a))
    assert len(made) == len(PROMPTS) * config.per_prompt
    assert calls[-1][:2] == (len(made), len(made))
    for document in made:
        prompt = lm.encode([document.group], chat=config.chat)["input_ids"]
        assert list(document.ids[: document.start]) == prompt[0].tolist()
        if config.temperature is None:
            answer = lm.generate(prompt, max_new_tokens=6).tokens[0]
            assert list(document.ids[document.start :]) == answer
    whole = cache.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 3, len(whole)):  # killed at any moment
        cache.write_bytes(whole[:size])
        assert answer_documents(lm, PROMPTS, config, cache) == made
        assert cache.read_bytes() == whole
    with pytest.raises(ValueError, match="max_new_tokens was 6 and is now 7"):
        answer_documents(lm, PROMPTS, AnswerConfig(7, config.temperature, config.per_prompt), cache)


def test_prompts_may_count_too(lm, tmp_path):
    made = answer_documents(lm, PROMPTS, AnswerConfig(3, prompts_too=True), tmp_path / "answers.jsonl")
    assert [d.start for d in made] == [0] * 5
    first = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[1])
    assert first["prompt"] == PROMPTS[0]


def test_bad_answer_settings():
    for options, message in [
        ({"per_prompt": 2}, "would be the same"), ({"temperature": 0.0}, "above 0"), ({"max_new_tokens": 0}, "least 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AnswerConfig(**options)
