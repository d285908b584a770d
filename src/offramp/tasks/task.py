"""Tasks: how an example becomes a prompt and tokens for a family of models, and what its answer is judged by.

Prompts are encoded exactly as generation encodes them, targets as it would produce them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel


@dataclass(frozen=True)
class Example:
    """One sample of a task.

    Attributes:
        id: Unique and stable in its file: SQuAD's id, DialogSum's fname, else the line or entry, counted from 1.
        source: The dialogue, passage, or text to translate.
        references: Right answers; a training target is the first. None for prompts without answers.
        group: Examples of one group are never divided between splits: the title of a SQuAD article, or the SHA-256 of
            the source.
        question: For question answering.
    """

    id: str
    source: str
    references: tuple[str, ...]
    group: str
    question: str | None = None


@dataclass(frozen=True)
class Task:
    """What is asked; change it with `dataclasses.replace`.

    The templates are for `str.format` and know `{source}`, `{question}` and `{languages[0]}`, `{languages[1]}`.

    Attributes:
        name: "question-answering", "summarisation", "translation" or "prompts"; decides which layouts are read.
        metrics: Names in `offramp.metrics.text.METRICS`; the first is the main one.
        max_new_tokens: Longest answer.
        instruction: Template of the instruction for a decoder-only model.
        cue: What stands at the end of the prompt of a decoder-only model without a chat template.
        prefix: Template of the input of T5 (Raffel et al., 2020, appendix D).
        languages: Names of the language of the source and of the target, in English.
    """

    name: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    instruction: str
    cue: str
    prefix: str
    languages: tuple[str, str] = ("English", "German")

    def prompt(self, example: Example, *, instruct: bool) -> str:
        """The text a model is given, with an instruction or with T5's prefix, but without cue and chat template."""
        template = self.instruction if instruct else self.prefix
        if example.question is None and "{question}" in template:
            raise ValueError(f"example {example.id} has no question, which {self.name} needs")
        return template.format(source=example.source, question=example.question, languages=self.languages)

    def prompts(self, lm: LanguageModel, examples: Sequence[Example]) -> list[Prompt]:
        """What `lm.generate` and `lm.encode` take, with nothing else to set: one chat or one text for each example.

        A decoder-only model with a chat template gets the instruction as a user's message, one without gets it as plain
        text with a cue at the end; T5 and mT5 get the prefix; other encoder-decoders the bare source (and the question
        as T5 does, if there is one).

        Returns:
            The prompts; a ValueError if the model does not take texts, or an example lacks a question.
        """
        return [self._prompt(lm, example) for example in examples]

    def _prompt(self, lm: LanguageModel, example: Example) -> Prompt:
        if not lm.split.is_encoder_decoder:
            text = self.prompt(example, instruct=True)
            if lm.has_chat_template:
                return [{"role": "user", "content": text}]
            return f"{text}\n\n{self.cue.format(languages=self.languages)}" if self.cue else text
        if lm.split.family.listens:
            raise ValueError(f"{lm.name} listens and does not read; {self.name} needs a model for text")
        bare = lm.split.name not in ("t5", "mt5") and example.question is None
        return example.source if bare else self.prompt(example, instruct=False)

    def target(self, example: Example) -> str:
        """The answer to train on: the first reference; a ValueError if there is none."""
        if not example.references:
            raise ValueError(f"example {example.id} has no reference to train on")
        return example.references[0]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="question-answering",
            metrics=("f1", "exact_match"),
            max_new_tokens=32,
            instruction="Answer the question with a short phrase copied from the text, and nothing else.\n\n"
            "Text: {source}\n\nQuestion: {question}",
            cue="Answer:",
            prefix="question: {question} context: {source}",
        ),
        Task(
            name="summarisation",
            metrics=("rougeL", "rouge1", "rouge2"),
            max_new_tokens=64,
            instruction="Summarize the following dialogue in one or two sentences.\n\n{source}",
            cue="Summary:",
            prefix="summarize: {source}",
        ),
        Task(
            name="translation",
            metrics=("bleu", "chrf"),
            max_new_tokens=64,
            instruction="Translate the following text from {languages[0]} to {languages[1]}. "
            "Reply with the translation only.\n\n{source}",
            cue="{languages[1]}:",
            prefix="translate {languages[0]} to {languages[1]}: {source}",
        ),
        Task(
            name="prompts",  # of one's own, without references: answers are compared with the full model's
            metrics=("rougeL",),
            max_new_tokens=64,
            instruction="{source}",
            cue="",
            prefix="{source}",
        ),
    )
}
"""Tasks by name."""


@dataclass(frozen=True)
class Pair:
    """An example to train on.

    Attributes:
        source_ids: The prompt as generation encodes it; for an encoder-decoder the encoder's input, its end included.
        target_ids: The answer with the token that ends it; for an encoder-decoder the decoder's labels, start token not
            included.
        group: That of the example.
    """

    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    group: str


def task_documents(
    lm: LanguageModel, task: Task, examples: Sequence[Example], *, longest: int | None = None
) -> tuple[list[Pair], int]:
    """Examples as prompts and answers to train on; sources that are too long lose their end.

    `longest` are the most tokens of prompt and answer together, for an encoder-decoder of each; None: what the model's
    context holds.

    Returns:
        A pair for each example, and how many sources were shortened.

    Raises:
        ValueError: An answer leaves no room for the prompt, or the model has no tokenizer or no end token.
    """
    limit = _limit(lm, longest)
    pairs, shortened = [], 0
    for example in examples:
        target = _target(lm, task, example)
        room = 0 if lm.split.is_encoder_decoder else len(target)
        if limit is not None and len(target) > limit:
            raise ValueError(
                f"the answer of example {example.id} has {len(target)} tokens, its end included, and {limit} are all "
                "there may be; allow more, or leave the example out"
            )
        kept = shorten(lm, task, example, None if limit is None else limit - room)
        shortened += kept is not example
        pairs.append(Pair(_encode(lm, task, kept), target, example.group))
    return pairs, shortened


def fit(
    lm: LanguageModel, task: Task, examples: Sequence[Example], *, longest: int | None = None, room: int | None = None
) -> tuple[list[Example], int]:
    """Examples whose prompts fit, for evaluation: shortened exactly as for training.

    Args:
        lm: The model they are for.
        task: How to ask.
        examples: Any number.
        longest: Most tokens of prompt and answer together; for an encoder-decoder, of the prompt. None: what the
            model's context holds.
        room: Tokens left to the answer of a decoder-only model; None: `task.max_new_tokens`.

    Returns:
        The examples, and how many of their sources were shortened.

    Raises:
        ValueError: No room for prompts, or an example whose prompt does not fit even with next to no source.
    """
    limit = _limit(lm, longest)
    if limit is not None and not lm.split.is_encoder_decoder:
        room = task.max_new_tokens if room is None else room
        if room >= limit:
            raise ValueError(
                f"answers of {room} tokens leave no room for a prompt in {limit}; lower one or raise the other"
            )
        limit -= room
    kept = [shorten(lm, task, example, limit) for example in examples]
    return kept, sum(new is not old for new, old in zip(kept, examples, strict=True))


def shorten(lm: LanguageModel, task: Task, example: Example, limit: int | None) -> Example:
    """Cut the end of an example's source, between two tokens, so that its prompt has at most `limit` tokens.

    The rest of the prompt, question included, stays as it is.

    Returns:
        The example, the same object if it fits.

    Raises:
        ValueError: It does not fit even with next to no source.
    """
    if limit is None or len(_encode(lm, task, example)) <= limit:
        return example
    ends = _token_ends(lm, example.source)

    def cut(tokens: int) -> Example:
        return replace(example, source=example.source[: ends[tokens - 1]])

    fits, too_long = 0, len(ends)  # numbers of the source's tokens
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(_encode(lm, task, cut(middle))) <= limit:
            fits = middle
        else:
            too_long = middle
    if not fits:
        raise ValueError(
            f"the prompt of example {example.id} does not fit in {limit} tokens even with next to no source; allow more"
        )
    return cut(fits)


def _limit(lm: LanguageModel, longest: int | None) -> int | None:
    if longest is not None and longest < 2:
        raise ValueError(f"at most {longest} tokens were asked for; allow at least 2")
    return min((n for n in (longest, lm.split.max_positions) if n is not None), default=None)


def _encode(lm: LanguageModel, task: Task, example: Example) -> tuple[int, ...]:
    return tuple(lm.encode(task.prompts(lm, [example]))["input_ids"][0].tolist())


def _token_ends(lm: LanguageModel, text: str) -> list[int]:
    """Where the tokens of a text end, in characters; words, for a tokenizer that cannot tell."""
    if not lm.tokenizer.is_fast:
        return [match.end() for match in re.finditer(r"\S+", text)]
    offsets = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return sorted({end for _, end in offsets if end})


# ---------------------------------------------------------------- answers


def _target(lm: LanguageModel, task: Task, example: Example) -> tuple[int, ...]:
    """The tokens a model would produce if it gave the example's first reference as its answer, and stopped."""
    text, (prompt,) = task.target(example), task.prompts(lm, [example])
    if lm.split.is_encoder_decoder:
        ids, end = list(_tokens(lm, text, answer=True)), _end(lm, None)
        if ids[:1] == [lm.model.generation_config.decoder_start_token_id]:
            ids = ids[1:]
        return tuple(ids if ids[-1:] == [end] else [*ids, end])
    if isinstance(prompt, str):
        before, answer, special = prompt, f" {text}", True  # behind the cue
    else:
        before = lm.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        answer, special = text, False
    start, whole = (_tokens(lm, part, special=special) for part in (before, before + answer))
    joined = whole[: len(start)] == start  # else the answer's first letters changed the prompt's last token
    return (*(whole[len(start) :] if joined else _tokens(lm, text, special=False)), _end(lm, prompt))


def _tokens(lm: LanguageModel, text: str, *, special: bool = True, answer: bool = False) -> tuple[int, ...]:
    if lm.tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer, which tasks need")
    given = {"text_target": text} if answer else {"text": text}
    return tuple(lm.tokenizer(**given, add_special_tokens=special, verbose=False)["input_ids"])


def _end(lm: LanguageModel, prompt: Prompt | None) -> int:
    """The token that ends an answer: one that generation stops at; for a chat the one its template puts there."""
    given, own = lm.model.generation_config.eos_token_id, lm.tokenizer.eos_token_id
    given = own if given is None else given
    if given is None:
        raise ValueError(f"{lm.name} has no end token; set eos_token_id in its generation config")
    ends: list[int] = [given] if isinstance(given, int) else given
    if prompt is not None and not isinstance(prompt, str):
        mark = "offramp"
        chat = [*prompt, {"role": "assistant", "content": mark}]
        behind = lm.tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
        if written := [id for id in _tokens(lm, behind, special=False) if id in ends]:
            return written[0]
    return own if own in ends else ends[0]
