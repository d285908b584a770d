"""Texts and prompts of which each may say to what group it belongs, from JSON files, as documents to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.tasks.rows import Row, json_rows, kind, objects, prompt_rows, read_text, written
from offramp.training.data import Document, with_text

if TYPE_CHECKING:
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


def read_prompts(path: Path, key: str = "prompt", *, group: str | None = None) -> list[Entry]:
    """Prompts without answers: lines of a text file, or as `read_entries` reads JSON; each is an `Entry.text`."""
    if kind(path) in (".json", ".jsonl") or group is not None:
        return read_entries(path, (key,), group=group)
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
