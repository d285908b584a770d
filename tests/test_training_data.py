"""Texts and answers become windows; what is held out is never trained on."""

import copy
import gzip
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp import LanguageModel
from offramp.tasks import TASKS, Example
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.data import (
    Document,
    Windows,
    batch,
    cut,
    divide,
    pair_documents,
    prepare,
    read_texts,
    steps_per_epoch,
    text_documents,
)
from tiny import LAYERS, VOCABULARY, tiny, tokenizer


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
    for path in (plain, lines):  # as files of examples are
        (packed := tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert read_texts(packed) == read_texts(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": " "}', "holds no text under text"),
        ("a.txt.gz", "x", "is not a whole gzip file"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', "line 1 has no text under 'text'; it has 'body'"),
        ("a.jsonl", '"x"\n', "line 1: str 'x' stands where an object with 'text' must"),
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
    windows = cut([Document((7, 1, 2, 3, 4, 5, 6), 4, "")], 7, bos=7)
    assert windows.ids.tolist() == [[7, 1, 2, 3, 4, 5, 6]]
    assert windows.counted.int().tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert windows.shortened == 0


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        (5, 3, (5, 3)),  # fits
        (9, 3, (5, 3)),  # the prompt gives way,
        (9, 20, (4, 4)),  # down to half the window,
        (2, 20, (2, 6)),  # if it is as long,
        (60, 1, (7, 1)),  # and no more than it must
    ],
)
def test_what_an_answer_and_its_prompt_keep(prompt, answer, kept):
    ids = tuple(range(1, prompt + answer + 1))
    for bos in (None, 99):
        head = () if bos is None else (bos,)
        windows = cut([Document((*head, *ids), prompt + len(head), "")], 8 + len(head), bos)
        assert windows.ids.tolist() == [[*head, *ids[prompt - kept[0] : prompt + kept[1]]]]
        assert windows.counted.int().tolist() == [[0] * (len(head) + kept[0]) + [1] * kept[1]]
        assert windows.shortened == (prompt + answer > 8)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(2, 30),
    st.booleans(),
)
def test_no_window_begins_behind_its_prompt(lengths, window, start_token):
    """Every counted token stands behind the one that it followed, and so on back to a token of the prompt."""
    head = (7,) if start_token else ()
    made = []
    for place, (prompt, answer) in enumerate(lengths):
        first = 1000 * (place + 1)
        made.append(Document((*head, *range(first - prompt, first + answer)), prompt + len(head), str(place)))
    windows = cut(made, window, bos=7)
    for ids, counted in zip(windows.ids.tolist(), windows.counted, strict=True):
        body = ids[len(head) : int(counted.nonzero().max()) + 1]
        assert body == list(range(body[0], body[0] + len(body)))
        if lengths[(body[-1] + 500) // 1000 - 1][0]:
            assert body[0] % 1000 >= 500  # a token of the prompt
            assert {token for token, counts in zip(ids, counted, strict=True) if counts} == {
                t for t in body if t % 1000 < 500
            }
    long = sum(p > 0 and len(head) + p + a > window for p, a in lengths)
    assert windows.shortened == long
    assert len(windows.ids[0] if len(windows) else ()) <= window


def test_documents_that_were_shortened_are_on_the_record(lm):
    made = [Document(tuple(range(10, 40)), 20, str(i)) for i in range(4)] + [Document((5, 6, 7), 1, "x")]
    assert prepare(lm, made, window=16, share=0.3, seed=0).settings["shortened"] == 4
    assert "shortened" not in prepare(lm, made, window=30, share=0.3, seed=0).settings


def test_a_single_answer_is_not_divided(lm):
    with pytest.raises(ValueError, match="nothing to hold out: 1 documents"):
        prepare(lm, [Document(tuple(range(10, 40)), 20, "")], window=64, share=0.5, seed=0)


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


# ---------------------------------------------------------------- batches


@st.composite
def some_windows(draw):
    """Windows that begin with their number, of random lengths, with random prompts, perhaps with sources."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=40))
    count, width = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(3, VOCABULARY, (count, width), generator=generator)
    columns, ends = torch.arange(width), torch.tensor(lengths)[:, None]
    starts = 1 + (torch.rand(count, 1, generator=generator) * (ends - 1)).long()
    counted = (columns >= starts) & (columns < ends)
    ids[:, 0] = torch.arange(count)
    ids = ids * (columns < ends)
    if not draw(st.booleans()):
        return Windows(ids, counted)
    present = torch.arange(7) < torch.randint(1, 8, (count, 1), generator=generator)
    sources = torch.randint(3, VOCABULARY, (count, 7), generator=generator) * present
    return Windows(ids, counted, sources, present)


BATCHES = settings(max_examples=30, deadline=None, derandomize=True)


@BATCHES
@given(some_windows(), st.integers(1, 12), st.integers(-5, 2**31), st.integers(0, 3))
def test_an_epoch_holds_each_window_once(windows, size, seed, epoch):
    steps = steps_per_epoch(windows, size)
    parts = [batch(windows, step, size, seed) for step in range(epoch * steps, (epoch + 1) * steps)]
    numbers = [part.ids[:, 0].tolist() for part in parts]
    assert sorted(sum(numbers, [])) == list(range(len(windows)))
    assert all(len(part) == size for part in parts[:-1])
    for part, rows in zip(parts, numbers, strict=True):
        width = part.ids.shape[1]
        assert torch.equal(part.ids, windows.ids[rows][:, :width])
        assert torch.equal(part.counted, windows.counted[rows][:, :width])
        assert bool(part.counted[:, -1].any())  # no column that nobody counts
        assert part.positions == int(windows.counted[rows].sum())  # and none is lost
        assert torch.equal(part.first, windows.counted[rows].int().argmax(1))
        if windows.sources is not None:
            depth = part.sources.shape[1]
            assert bool(part.present[:, -1].any())
            assert torch.equal(part.sources, windows.sources[rows][:, :depth])
            assert torch.equal(part.present, windows.present[rows][:, :depth])
            assert int(part.present.sum()) == int(windows.present[rows].sum())


@BATCHES
@given(some_windows(), st.integers(1, 6), st.integers(0, 9), st.integers(0, 20), st.integers(1, 5))
def test_drawn_positions_are_some_of_those_that_count(windows, size, seed, step, most):
    whole, drawn = batch(windows, step, size, seed), batch(windows, step, size, seed, most)
    assert torch.equal(whole.ids, drawn.ids)
    assert not (drawn.counted & ~whole.counted).any()
    assert drawn.counted.sum(1).tolist() == whole.counted.sum(1).clamp(max=most).tolist()
    assert torch.equal(drawn.first, whole.first)


def test_draws_depend_on_seed_and_step_only_and_reach_every_position():
    windows = Windows(torch.ones(6, 9, dtype=torch.long), torch.ones(6, 9, dtype=torch.bool))
    state = torch.random.get_rng_state()
    one, two, other = (batch(windows, 5, 4, seed, most=3) for seed in (20261114, 20261114, 20261115))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.counted, two.counted)
    assert not torch.equal(one.counted, other.counted)
    times = sum(batch(windows, step, 6, 0, most=3).counted.float().sum(0) for step in range(100)) / 600
    assert (times - 1 / 3).abs().max() < 0.1


def test_batches_are_of_like_length():
    """Within a pool of 64 batches the lengths are sorted: no two batches overlap."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (200,), generator=generator)
    counted = (torch.arange(60) < lengths[:, None]) & (torch.arange(60) > 0)
    windows = Windows(torch.ones(200, 60, dtype=torch.long), counted)
    assert windows.lengths.tolist() == lengths.tolist()
    spans = []
    for step in range(steps_per_epoch(windows, 8)):
        found = batch(windows, step, 8, seed=1).counted.sum(1) + 1
        spans.append((int(found.min()), int(found.max())))
    ordered = sorted(spans)
    assert all(before[1] <= after[0] for before, after in zip(ordered, ordered[1:], strict=False))
    assert spans != ordered  # but they come in any order


def test_lengths_are_those_of_both_sides():
    sources = torch.tensor([[5, 6, 7], [5, 0, 0]])
    windows = Windows(torch.ones(2, 4), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]]).bool(), sources, sources > 0)
    assert windows.lengths.tolist() == [3 + 3, 4 + 1]
    assert windows[torch.tensor([0])].sources.tolist() == [[5, 6, 7]]
    assert windows[1:].sources.tolist() == [[5]]
    assert windows[1:].ids.shape == (1, 4)
    assert windows[:1].ids.shape == (1, 3)
    assert windows.digest() != replace(windows, sources=sources + 1).digest()


# ---------------------------------------------------------------- tasks and answers of encoder-decoders


EXAMPLES = [
    Example(f"q{i}", f"w{20 + i} the sky is w{30 + i}", (f"w{i + 40} w{i + 41}", "the sky"), f"g{i // 2}", "why ?")
    for i in range(6)
]


@pytest.mark.parametrize("chat", [True, False])
def test_pairs_of_a_decoder_only_model(chat):
    lm, task = LanguageModel(tiny("llama"), tokenizer(chat=chat), name="tiny"), TASKS["question-answering"]
    made, shortened = pair_documents(lm, task, EXAMPLES)
    assert shortened == 0
    for document, example in zip(made, EXAMPLES, strict=True):
        prompt = lm.encode(task.prompts(lm, [example]), chat=chat)["input_ids"][0].tolist()
        assert list(document.ids[: document.start]) == prompt
        answer = [int(word[1:]) for word in example.references[0].split()]
        assert list(document.ids[document.start :]) == [*answer, 2]
        assert (document.group, document.source) == (example.group, ())
    data = prepare(lm, made, window=64, share=0.3, seed=0)
    assert data.train.positions + data.held_out.positions == 6 * 3  # the answers and nothing else
    assert data.train.sources is None


def test_pairs_of_an_encoder_decoder():
    lm, task = LanguageModel(copy.deepcopy(tiny("t5")), tokenizer(), name="tiny"), TASKS["question-answering"]
    lm.model.generation_config.eos_token_id = 2
    made, _ = pair_documents(lm, task, EXAMPLES)
    for document, example in zip(made, EXAMPLES, strict=True):
        assert list(document.source) == lm.encode(task.prompts(lm, [example]))["input_ids"][0].tolist()
        assert list(document.ids) == [0, *(int(word[1:]) for word in example.references[0].split()), 2]
        assert (document.start, document.group) == (1, example.group)
    longer, shortened = pair_documents(lm, task, EXAMPLES, longest=8)
    assert shortened == 6
    assert max(len(document.source) for document in longer) <= 8
    data = prepare(lm, made, window=4, share=0.3, seed=0)
    assert data.train.ids[:, 0].tolist() == [0] * len(data.train)
    assert data.train.counted[:, 0].any().item() is False
    assert data.train.positions + data.held_out.positions == 6 * 3
    groups = {tuple(d.source): d.group for d in made}
    sides = [
        {groups[tuple(row[mask].tolist())] for row, mask in zip(part.sources, part.present, strict=True)}
        for part in (data.train, data.held_out)
    ]
    assert not sides[0] & sides[1]


def test_encoder_decoders_learn_no_plain_text():
    lm = LanguageModel(tiny("t5"), tokenizer(), name="tiny")
    with pytest.raises(ValueError, match="not plain text; give a task or prompts"):
        prepare(lm, text_documents(lm, ["the sky is blue", "why ?"]), window=8, share=0.5, seed=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoders_own_answers(tmp_path, name):
    """They stand as the decoder saw them; what is predicted from them is what was answered."""
    lm, groups = LanguageModel(copy.deepcopy(tiny(name)), tokenizer(), name="tiny"), ["a", "a", "b", "c", "b"]
    lm.model.generation_config.forced_eos_token_id = None  # BART's, at the longest answer's end
    cache = tmp_path / "answers.jsonl"
    made = answer_documents(lm, PROMPTS, AnswerConfig(6, batch_size=2), cache, groups=groups)
    assert [document.group for document in made] == groups
    for document, prompt in zip(made, PROMPTS, strict=True):
        inputs = lm.encode([prompt])
        assert list(document.source) == inputs["input_ids"][0].tolist()
        answer = lm.generate(inputs, max_new_tokens=6)
        assert list(document.ids) == [lm.model.config.decoder_start_token_id, *answer.tokens[0]]
        assert document.start == 1
    windows = cut(made, 64)
    with torch.no_grad():
        memory = lm.split.encode(windows.sources, windows.present)
        states = lm.split.states(windows.ids[:, :-1], [LAYERS], memory=memory, memory_mask=windows.present)[0]
        choice = lm.split.readout(states).argmax(-1)
    assert torch.equal(choice[windows.counted[:, 1:]], windows.ids[windows.counted])
    assert answer_documents(lm, PROMPTS, AnswerConfig(6, batch_size=2), cache, groups=groups) == made


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
