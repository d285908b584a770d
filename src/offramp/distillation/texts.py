"""What a language model is distilled on: texts and prompts with groups, from JSON files, and the student's own answers.

On-policy text is given anew every so many steps by the student as it then is (Agarwal et al. 2023, "On-Policy
Distillation of Language Models" (GKD), arXiv 2306.13649): the student learns the teacher's distribution at every token
of what it would itself have said. Differs in giving all answers anew at once, every `every` steps, rather than those of
a batch at every step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.families.backbone import evaluating
from offramp.tasks.rows import Row, json_rows, kind, objects, prompt_rows, read_text, written
from offramp.training.answers import AnswerConfig, answer_documents
from offramp.training.data import Document, Progress, Windows, cut, divide, with_text

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel


@dataclass(frozen=True)
class Entry:
    """One text.

    Attributes:
        text: To be learnt.
        prompt: What stands before it and is not learnt; empty: nothing.
        group: Name of its group; None: unknown.
    """

    text: str
    prompt: str = ""
    group: str | None = None


def read_entries(
    path: Path, fields: Sequence[str] = ("text",), *, prompt: str | None = None, group: str | None = None
) -> list[Entry]:
    """The entries of a file: the objects of a `.json` list or of `.jsonl` lines; of any other the whole, without group.

    Args:
        path: The file, UTF-8, gzipped if its name ends in `.gz`.
        fields: Keys whose texts are joined by line ends.
        prompt: Key of what stands before it; None: nothing does.
        group: Key of the group, a text, a whole number or a truth value; null: unknown. None: all are unknown.

    Returns:
        The entries, at least one.

    Raises:
        ValueError: Not of that layout; the message names file and row.
    """
    if kind(path) not in (".json", ".jsonl"):
        if prompt is not None or group is not None:
            raise ValueError(f"{path} is plain text and tells no prompts or groups apart; give .jsonl, or no keys")
        return [Entry(read_text(path))]
    found = [
        Entry(
            "\n".join(_text(row, key) for key in fields),
            "" if prompt is None else _text(row, prompt),
            _group(row, group),
        )
        for row in objects(json_rows(path), *fields)
    ]
    return with_text(found, [entry.text for entry in found], path, fields)


def read_prompts(path: Path, key: str | None = None, *, group: str | None = None) -> list[Entry]:
    """Prompts without answers: lines of a text file, or as `read_entries` reads JSON; each is an `Entry.text`.

    Args:
        path: The file.
        key: Of the prompt in JSON objects; None: "prompt".
        group: As for `read_entries`.

    Returns:
        The prompts.

    Raises:
        ValueError: Not of that layout, or plain text that is to have keys.
    """
    if kind(path) in (".json", ".jsonl") or group is not None:
        return read_entries(path, (key or "prompt",), group=group)
    if key is not None:
        raise ValueError(f"{path} is plain text, a prompt per line, and has no key {key!r}; give .jsonl, or no key")
    return [Entry(row.value.strip()) for row in prompt_rows(path) if row.value.strip()]


def group_names(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Names of all groups that occur, sorted; their places are the groups' numbers."""
    return tuple(sorted({entry.group for entry in entries if entry.group is not None}))


def group_numbers(entries: Sequence[Entry], names: Sequence[str]) -> list[int]:
    """The group of each entry, by its place among the names; -1: unknown."""
    return [-1 if entry.group is None else names.index(entry.group) for entry in entries]


def entry_documents(lm: LanguageModel, entries: Sequence[Entry], names: Sequence[str]) -> list[Document]:
    """Entries as token ids; where there is a prompt, only what follows it counts, and the token that ends an answer.

    Returns:
        Documents, without such that are shorter than two tokens; equal prompts or texts are never divided.

    Raises:
        ValueError: The model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer, which texts need")
    made = []
    for entry, number in zip(entries, group_numbers(entries, names), strict=True):
        before = _tokens(lm, entry.prompt) if entry.prompt else []
        whole = _tokens(lm, entry.prompt + entry.text)
        if whole[: len(before)] != before:  # the text's first letters changed the prompt's last token
            whole = before + _tokens(lm, entry.text, special=False)
        end = [lm.tokenizer.eos_token_id] if entry.prompt and lm.tokenizer.eos_token_id is not None else []
        ids = tuple([*whole, *([] if whole[-1:] == end else end)])
        if len(ids) > 1:
            made.append(Document(ids, len(before), entry.prompt or entry.text, attribute=number))
    return made


def _tokens(lm: LanguageModel, text: str, *, special: bool = True) -> list[int]:
    ids: list[int] = lm.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _text(row: Row, key: str) -> str:
    text = _value(row, key)
    if not isinstance(text, str):
        raise ValueError(f"{row.place}: {key!r} is a JSON {type(text).__name__}, but a text is needed")
    return text


def _group(row: Row, key: str | None) -> str | None:
    value = None if key is None else _value(row, key)
    if value is None or isinstance(value, bool):
        return None if value is None else str(value)
    if (name := written(value)) is None or not name.strip():
        what = "empty" if name is not None else f"a JSON {type(value).__name__}"
        raise ValueError(
            f"{row.place}: the group is {what}; give a text or a whole number, or null where it is unknown"
        )
    return name.strip()


def _value(row: Row, key: str) -> Any:
    if key not in row.value:
        raise ValueError(f"{row.place} has no {key!r}; it has {row.keys}")
    return row.value[key]


@dataclass(frozen=True)
class OwnAnswers:
    """Prompts, and how the student answers them.

    Attributes:
        prompts: Texts or chats, two at least.
        attributes: The group of each prompt, in 0..G-1, or -1; None: all unknown.
        config: Configuration of the answers.
        every: Steps between answers.
        window: Longest prompt with its answer, in tokens; longer ones are shortened, see `offramp.training.data.cut`.
        share: Share of the prompts to hold out. Their answers are those of the student before training, so that what it
            is judged on stays the same.
        seed: Seed of the choice of those held out.

    Raises:
        ValueError: A value out of range.
    """

    prompts: Sequence[Prompt]
    attributes: Sequence[int] | None = None
    config: AnswerConfig = field(default_factory=AnswerConfig)
    every: int = 100
    window: int = 512
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise ValueError(f"{len(self.prompts)} prompts are given; one to learn from and one to hold out are needed")
        if self.attributes is not None and len(self.attributes) != len(self.prompts):
            raise ValueError(
                f"there are groups of {len(self.attributes)} prompts for {len(self.prompts)} prompts; give one for each"
            )
        if self.every < 1 or self.window < 2:
            raise ValueError(f"every is {self.every} and window {self.window}; they count from 1 and 2")

    @property
    def settings(self) -> dict[str, Any]:
        """For the record of a run, as JSON values."""
        numbers = None if self.attributes is None else [int(number) for number in self.attributes]
        content = hashlib.sha256(json.dumps([list(self.prompts), numbers]).encode()).hexdigest()
        return {"prompts": len(self.prompts), "content": content, "every": self.every, "window": self.window,
                "held_out_share": self.share, "split_seed": self.seed, "answers": asdict(self.config)}  # fmt: skip

    def parts(self) -> tuple[list[int], list[int]]:
        """Places of the prompts to train on and of those held out; a prompt that is there twice falls on one side."""
        rows = [Document((place,), 0, repr(prompt)) for place, prompt in enumerate(self.prompts)]
        inside, outside = divide(rows, self.share, self.seed)
        return [row.ids[0] for row in inside], [row.ids[0] for row in outside]

    def round(self, step: int) -> int:
        """Number of the answers that are learnt from after so many steps."""
        return step // self.every

    def answered(
        self, lm: LanguageModel, places: Sequence[int], file: Path, by: str, progress: Progress | None = None
    ) -> Windows:
        """Answers to the prompts at these places by the student as it is, from the file as far as they are there.

        `by` says which student that is: the run and the steps it has done.

        Returns:
            Windows in which only answers count.
        """
        with evaluating(lm.model), torch.no_grad():
            documents = answer_documents(lm, [self.prompts[p] for p in places], self.config, file, progress, by=by)
        if self.attributes is not None:
            kinds = [self.attributes[place] for place in places for _ in range(self.config.per_prompt)]
            documents = [replace(d, attribute=kind) for d, kind in zip(documents, kinds, strict=True)]
        bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
        return cut(documents, self.window, bos)
