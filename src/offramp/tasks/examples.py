"""Examples of a task: read from files or the hub, divided by group, taken in part."""

from __future__ import annotations

import hashlib
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

from offramp.tasks.rows import HUB, Row, hub_rows, json_rows, kind, objects, prompt_rows, text_rows, written
from offramp.tasks.task import Example, Task

CODES = {
    "Arabic": "ar", "Bulgarian": "bg", "Chinese": "zh", "Croatian": "hr", "Czech": "cs", "Danish": "da", "Dutch": "nl",
    "English": "en", "Estonian": "et", "Finnish": "fi", "French": "fr", "German": "de", "Greek": "el", "Hindi": "hi",
    "Hungarian": "hu", "Irish": "ga", "Italian": "it", "Japanese": "ja", "Korean": "ko", "Latvian": "lv",
    "Lithuanian": "lt", "Maltese": "mt", "Norwegian": "no", "Polish": "pl", "Portuguese": "pt", "Romanian": "ro",
    "Russian": "ru", "Slovak": "sk", "Slovenian": "sl", "Spanish": "es", "Swedish": "sv", "Turkish": "tr",
    "Ukrainian": "uk", "Vietnamese": "vi",
}  # fmt: skip
"""ISO 639-1 codes of languages, by which rows of parallel text name them."""


def read_examples(task: Task, path: str | Path, target: str | Path | None = None) -> list[Example]:
    """The examples of a file or of a data set on the hub, in its order.

    Layouts, each also with `.gz` at the end of the name:

    - question answering: SQuAD's `.json`, or rows (`.json` list, `.jsonl`) with context, question and answers;
    - summarisation: rows with dialogue and summary, or summary1, summary2, …; rows of one id and dialogue are merged;
    - prompts: a text file with one per line, or rows with prompt;
    - translation: two text files (line i belongs to line i); `.tsv` with two columns; rows with
      {"translation": {"en": …, "de": …}} or with the languages' codes as keys.

    `hub:OWNER/NAME[:CONFIG][:SPLIT]` reads rows through `datasets` (extra `eval`).

    Entries without a source and SQuAD 2.0's questions without an answer are left out; one warning counts them.

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
    examples: list[Example] = []
    left_out: dict[str, int] = {}
    for found in _READERS[task.name](task, path, target):
        if isinstance(found, str):
            left_out[found] = left_out.get(found, 0) + 1
        else:
            examples.append(found)
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not examples:
        raise ValueError(f"{path} holds no example for {task.name}{f' ({why})' if why else ''}; give a file with some")
    if why:
        warnings.warn(f"{path}: entries were left out, {why}", stacklevel=2)
    examples = _merged(examples) if task.name == "summarisation" else examples
    if repeated := [id for id, count in Counter(example.id for example in examples).items() if count > 1]:
        raise ValueError(f"{path} has several entries of the id {repeated[0]!r}; give each entry its own")
    return examples


Found = Iterator[Example | str]
"""Examples, or why an entry is left out."""
NO_SOURCE = "without a source"
NO_ANSWER = "without an answer in the text"


def _rows(task: Task, path: str | Path, target: str | Path | None) -> Iterator[Row]:
    """The objects of a file or of the hub."""
    if target is not None:
        raise ValueError(f"a second file, {target}, belongs to two text files of a translation; leave it out")
    if str(path).startswith(HUB):
        rows = hub_rows(str(path))
    elif kind(Path(path)) in (".json", ".jsonl"):
        rows = json_rows(Path(path))
    else:
        more = ", .tsv, or two text files" if task.name == "translation" else ""
        raise ValueError(f"{path} is no file with examples for {task.name}; give .json, .jsonl{more}, also with .gz")
    return objects(rows)


def _text(row: Row, key: str) -> str:
    """The text under a key, "" for null."""
    value = row.value.get(key) if key in row.value else 0
    if not isinstance(value, str | None):
        raise ValueError(f"{row.place} has no text under {key!r}; it has {row.keys}")
    return (value or "").strip()


def _reference(text: str, place: str, what: str) -> str:
    if not text:
        raise ValueError(f"{place} has an empty {what}; give every entry its {what}, or remove it")
    return text


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


# ---------------------------------------------------------------- question answering


def _questions(task: Task, path: str | Path, target: str | Path | None) -> Found:
    for row in _rows(task, path, target):
        for part in _paragraphs(row):
            source = _text(part, "context")
            if not source:
                yield NO_SOURCE
            elif part.value.get("is_impossible") or (answers := _answers(part)) is None:
                yield NO_ANSWER
            else:
                id = written(part.value.get("id")) or part.position
                group = str(part.value.get("title") or _digest(source))
                question = _reference(_text(part, "question"), part.place, "question")
                yield Example(id, source, answers, group, question)


def _paragraphs(row: Row) -> Iterator[Row]:
    """The questions of an article of SQuAD as the flat rows they are on the hub; such a row itself."""
    if "paragraphs" not in row.value:
        if "context" not in row.value:
            _text(row, "paragraphs")
        yield row
        return
    article = {"title": row.value.get("title")}
    for p, paragraph in enumerate(_objects(row, "paragraphs"), 1):
        context = {"context": _text(paragraph, "context")}
        for q, question in enumerate(_objects(paragraph, "qas"), 1):
            if not question.value.get("is_impossible") and not _objects(question, "answers"):
                raise ValueError(f"{question.place} has no answer; give every question one")
            yield question._replace(position=f"{row.position}.{p}.{q}", value=article | context | question.value)


def _objects(row: Row, key: str) -> list[Row]:
    """The list of objects under a key."""
    values = row.value.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{row.place} has no list of objects under {key!r}, which the layout of SQuAD needs")
    return [Row(f"{row.place}, {key} {n}", row.position, value) for n, value in enumerate(values, 1)]


def _answers(row: Row) -> tuple[str, ...] | None:
    """Answers without repetitions, from {"text": [...]} or [{"text": ...}]; None if the list is empty (SQuAD 2.0)."""
    found = row.value.get("answers")
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = [{"text": text} for text in found["text"]]
    texts = [_text(answer, "text") for answer in _objects(row._replace(value={"answers": found}), "answers")]
    return tuple(dict.fromkeys(_reference(text, row.place, "answer") for text in texts)) or None


# ---------------------------------------------------------------- summaries


def _dialogues(task: Task, path: str | Path, target: str | Path | None) -> Found:
    for row in _rows(task, path, target):
        keys = sorted((key for key in row.value if re.fullmatch(r"summary\d+", key)), key=lambda key: int(key[7:]))
        texts = [_text(row, key) for key in (["summary"] if "summary" in row.value or not keys else []) + keys]
        if not (source := _text(row, "dialogue")):
            yield NO_SOURCE
            continue
        summaries = dict.fromkeys(_reference(text, row.place, "summary") for text in texts)
        id = written(row.value.get("id", row.value.get("fname"))) or row.position
        yield Example(id, source, tuple(summaries), _digest(source))


def _merged(examples: list[Example]) -> list[Example]:
    """Examples of the same id and source as one, with all references, where the first of them stood.

    DialogSum's test split on the hub has a row for each summary, with the ids test_0_1, test_0_2 and test_0_3.

    Returns:
        One for each id (then test_0) and source.
    """
    same: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        stem = re.sub(r"(_\d+)_\d+$", r"\1", example.id)
        same.setdefault((stem, example.source), []).append(example)
    merged = []
    for (stem, _), (first, *others) in same.items():
        references = dict.fromkeys(text for example in (first, *others) for text in example.references)
        id = stem if any(other.id != first.id for other in others) else first.id
        merged.append(replace(first, id=id, references=tuple(references)))
    return merged


# ---------------------------------------------------------------- translations


def _translations(task: Task, path: str | Path, target: str | Path | None) -> Found:
    for place, position, (source, translation) in _sentences(task, path, target):
        if not source.strip():
            yield NO_SOURCE
        else:
            reference = _reference(translation.strip(), place, "translation")
            yield Example(position, source.strip(), (reference,), _digest(source.strip()))


def _sentences(task: Task, path: str | Path, target: str | Path | None) -> Iterator[Row]:
    """Rows of (source, translation)."""
    if target is not None and not str(path).startswith(HUB):
        left, right = text_rows(Path(path)), text_rows(Path(target))
        if len(left) != len(right):
            raise ValueError(
                f"{path} has {len(left)} lines and {target} has {len(right)}; line i of one must belong to line i of "
                "the other"
            )
        yield from (a._replace(value=(a.value, b.value)) for a, b in zip(left, right, strict=True))
    elif kind(Path(path)) == ".tsv":
        for row in text_rows(Path(path)):
            columns = row.value.split("\t")
            if len(columns) != 2:
                raise ValueError(f"{row.place} has {len(columns)} columns; source, tab, translation are needed")
            if row.position == "1" and _names_columns(columns, task):
                warnings.warn(f"{row.place} is taken for a header, {row.value!r:.80}, not for an example", stacklevel=3)
            else:
                yield row._replace(value=columns)
    else:
        for row in _rows(task, path, target):
            inner = row.value.get("translation", row.value)
            if not isinstance(inner, dict):
                raise ValueError(f"{row.place}: an object must stand under 'translation', as in {{'en': …, 'de': …}}")
            names = [CODES.get(name, name) for name in task.languages]
            yield row._replace(value=[_text(row._replace(value=inner), name) for name in names])


def _names_columns(columns: Sequence[str], task: Task) -> bool:
    """Whether these are what the columns of a parallel text are called: by side, or by their languages."""
    names = {"source", "src", "target", "tgt", "translation"}
    names.update(name.lower() for language in task.languages for name in (language, CODES.get(language, language)))
    return all(column.strip().lower() in names for column in columns)


# ---------------------------------------------------------------- prompts


def _prompts(task: Task, path: str | Path, target: str | Path | None) -> Found:
    named = str(path).startswith(HUB) or kind(Path(path)) in (".json", ".jsonl")
    rows = _rows(task, path, target) if named else prompt_rows(Path(path))
    for row in rows:
        if not (source := _text(row, "prompt") if named else row.value.strip()):
            yield NO_SOURCE
        else:
            yield Example(row.position, source, (), _digest(source))


_READERS = {
    "question-answering": _questions, "summarisation": _dialogues, "translation": _translations, "prompts": _prompts,
}  # fmt: skip


# ---------------------------------------------------------------- parts


def split_groups(examples: Sequence[Example], shares: Sequence[float], seed: int) -> list[list[Example]]:
    """Divide examples at random into parts with these shares, which add up to 1, never one group into two parts.

    Returns:
        The parts, none empty, each in the order of `examples`; shares are kept as well as the groups' sizes allow.

    Raises:
        ValueError: Shares out of range, or too few groups.
    """
    if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the shares are {', '.join(map(str, shares))}; give such above 0 that add up to 1")
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.group] = sizes.get(example.group, 0) + 1
    if len(sizes) < len(shares):
        raise ValueError(f"{len(examples)} examples of {len(sizes)} groups cannot make {len(shares)} parts; give more")
    groups = list(sizes)
    random.Random(seed).shuffle(groups)
    ends = accumulate(sizes[group] for group in groups)
    middles = [end - sizes[group] / 2 for end, group in zip(ends, groups, strict=True)]
    cuts = [0]
    for done, share in enumerate(accumulate(shares), 1):  # a group goes where its middle falls; each part gets one
        cut = sum(middle <= share * len(examples) for middle in middles)
        cuts.append(min(max(cut, cuts[-1] + 1), len(groups) - len(shares) + done))
    cuts[-1] = len(groups)  # whatever the sum of the shares was rounded to
    part = {group: at for at, (a, b) in enumerate(pairwise(cuts)) for group in groups[a:b]}
    parts: list[list[Example]] = [[] for _ in shares]
    for example in examples:
        parts[part[example.group]].append(example)
    return parts


def take(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """A random subset, in the order of `examples`; a smaller one is part of a larger one of the same seed."""
    if limit is None or limit >= len(examples):
        return list(examples)
    if limit < 1:
        raise ValueError(f"the limit is {limit}; take at least one example, or None for all")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in sorted(order[:limit])]
