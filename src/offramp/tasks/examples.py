"""Examples of a task: read from files or the hub, divided by group, taken in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.tasks.task import Task


@dataclass(frozen=True)
class Example:
    """One sample of a task.

    Attributes:
        id: Unique and stable in its file: SQuAD's id, DialogSum's fname, else the line or entry, counted from 1.
        source: The dialogue, passage, or text to translate.
        references: Right answers, at least one; a training target is the first.
        group: Examples of one group are never divided between splits: the title of a SQuAD article, or the SHA-256 of
            the source.
        question: For question answering.
    """

    id: str
    source: str
    references: tuple[str, ...]
    group: str
    question: str | None = None


def read_examples(task: Task, path: str | Path, target: str | Path | None = None) -> list[Example]:
    """The examples of a file or of a data set on the hub, in its order.

    Layouts, each also with `.gz` at the end of the name:

    - question answering: SQuAD's `.json`, or rows (`.json` list, `.jsonl`) with context, question and answers;
    - summarisation: rows with dialogue and summary, or summary1, summary2, …; rows of one id and dialogue are merged;
    - translation: two text files (line i belongs to line i); `.tsv` with two columns; rows with
      {"translation": {"en": …, "de": …}} or with the languages' codes as keys.

    `hub:OWNER/NAME[:CONFIG][:SPLIT]` reads rows through `datasets` (extra `eval`).

    Entries without a source, and SQuAD v2's questions without an answer, are left out with one warning that counts them.

    Args:
        task: Which task they are for.
        path: The file, UTF-8, or a hub name.
        target: The second file of a parallel text.

    Returns:
        Examples, at least one.

    Raises:
        ValueError: Another layout, empty, something missing, not UTF-8, or lines that do not belong together.
        ModuleNotFoundError: `datasets` is not installed.
    """
    raise NotImplementedError


def split_groups(examples: Sequence[Example], shares: Sequence[float], seed: int) -> list[list[Example]]:
    """Divide examples at random, never one group into two parts.

    Args:
        examples: With at least as many groups as parts.
        shares: Of the examples, one for each part, adding up to 1; kept as well as the groups' sizes allow.
        seed: Of the division.

    Returns:
        The parts, none empty, each in the order of `examples`.

    Raises:
        ValueError: Shares out of range, or too few groups.
    """
    raise NotImplementedError


def take(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """A random subset, in the order of `examples`; a smaller one is part of a larger one of the same seed.

    Args:
        examples: Any number.
        limit: How many at most; None: all.
        seed: Of the choice.

    Returns:
        The subset.

    Raises:
        ValueError: A limit below 1.
    """
    raise NotImplementedError
