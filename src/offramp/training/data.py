"""What exits are trained on: texts, or the model's own answers to prompts, as windows of tokens with a loss mask.

Texts come from plain-text files (a file is a document), JSON and JSON Lines. Answers are generated once and kept in a
file that an interrupted generation continues. Training and held-out data are divided by document before anything is cut
into windows; answers to the same prompt and repeated texts always fall on the same side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.exits import fingerprint

if TYPE_CHECKING:
    from offramp.language_model import LanguageModel

Progress = Callable[..., None]
"""(done, total[, what is next])."""


@dataclass(frozen=True)
class Document:
    """Token ids; those from `start` on are to be predicted. Documents of one `group` are never divided."""

    ids: tuple[int, ...]
    start: int
    group: str


@dataclass(frozen=True)
class Windows:
    """N windows of up to T tokens: `ids` [N, T]; `counted` [N, T] marks the tokens whose prediction is trained."""

    ids: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """How many predictions are trained."""
        return int(self.counted.sum())

    def digest(self) -> str:
        """SHA-256 of the content."""
        parts = (self.ids.to(torch.int32), self.counted.to(torch.uint8))
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Data:
    """Windows to train on, windows of other documents to judge by, and how they came about, for the record."""

    train: Windows
    held_out: Windows
    settings: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- texts


def read_texts(path: Path, fields: Sequence[str] = ("text",)) -> list[str]:
    """The documents of a file: the objects of a `.json` list or of `.jsonl` lines, or the whole file as one.

    Args:
        path: The file, UTF-8.
        fields: Keys of an object whose texts are joined by line ends.

    Returns:
        Texts, at least one.

    Raises:
        ValueError: Not of that layout, or without any text.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() not in (".json", ".jsonl"):
        if not text.strip():
            raise ValueError(f"{path} is empty; give a file with text")
        return [text]
    texts = [_joined(value, fields, place) for place, value in _objects(path, text)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text under {' + '.join(fields)}; give a file with text, or other fields")
    return texts


def _objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place for messages, JSON value) of each entry."""
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); JSON Lines need the ending .jsonl") from None
        if not isinstance(values, list):
            raise ValueError(f"{path} holds a JSON {type(values).__name__}, but a list of objects is needed")
        yield from ((f"{path}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from None


def _joined(value: Any, fields: Sequence[str], place: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON {type(value).__name__} stands where an object with {fields[0]!r} is needed")
    for key in fields:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{place} has no text under {key!r}; it has {', '.join(map(repr, value)) or 'no keys'}")
    return "\n".join(value[key] for key in fields)


def text_documents(lm: LanguageModel, texts: Sequence[str]) -> list[Document]:
    """Texts as token ids, of which every one is to be predicted; without such that are shorter than two tokens."""
    if lm.tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer; exits are trained on texts or on prompts")
    documents = []
    for text in texts:
        ids = tuple(lm.tokenizer(text, verbose=False)["input_ids"])
        if len(ids) > 1:
            documents.append(Document(ids, 0, hashlib.sha256(text.encode()).hexdigest()))
    return documents


# ---------------------------------------------------------------- the model's own answers


@dataclass(frozen=True)
class AnswerConfig:
    """How the model answers prompts.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: Sample at this temperature; None: greedily.
        per_prompt: Answers to each prompt; more than one needs a temperature.
        prompts_too: Train on the prompts' own tokens as well.
        chat: Put prompts into the model's chat template.
        seed: Of the samples.
        batch_size: Prompts answered together.

    Raises:
        ValueError: A value out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    per_prompt: int = 1
    prompts_too: bool = False
    chat: bool = False
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.per_prompt, self.batch_size) < 1:
            raise ValueError("max_new_tokens, per_prompt and batch_size of the answers must be at least 1")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"the answers' temperature is {self.temperature}; give one above 0, or None for greedy")
        if self.per_prompt > 1 and self.temperature is None:
            raise ValueError(f"{self.per_prompt} greedy answers to a prompt would be the same; give a temperature")


def answer_documents(
    lm: LanguageModel,
    prompts: Sequence[str],
    config: AnswerConfig,
    cache: Path,
    progress: Progress | None = None,
) -> list[Document]:
    """Let the full model answer prompts; only the answers are to be predicted, unless `config.prompts_too`.

    Every finished batch is appended to `cache` (JSON Lines), from which a repeated call goes on; batches are always the
    same and have seeds of their own, so the answers do not depend on interruptions.

    Args:
        lm: The model.
        prompts: Texts.
        config: How to answer.
        cache: Where answers are kept.
        progress: Called with the answers done and asked for.

    Returns:
        One document per answer: prompt and answer.

    Raises:
        ValueError: No prompts, or `cache` holds other answers.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least two")
    jobs = [prompt for prompt in prompts for _ in range(config.per_prompt)]
    digest = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    header = {"model": fingerprint(lm.model), "prompts": digest, **asdict(config)}
    records = _open_cache(cache, header, config.batch_size, len(jobs))
    for at in range(len(records), len(jobs), config.batch_size):
        if progress is not None:
            progress(at, len(jobs), "answers")
        new = _answer(lm, jobs[at : at + config.batch_size], config, seed=config.seed + at)
        _append(cache, new)
        records += new
    if progress is not None:
        progress(len(jobs), len(jobs), "answers")
    starts = [0 if config.prompts_too else record["start"] for record in records]
    return [
        Document(tuple(record["ids"]), start, record["prompt"])
        for record, start in zip(records, starts, strict=True)
    ]  # fmt: skip


def _answer(lm: LanguageModel, prompts: list[str], config: AnswerConfig, seed: int) -> list[dict[str, Any]]:
    inputs = lm.encode(prompts, chat=config.chat)
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens}
    if config.temperature is not None:
        options |= {"temperature": config.temperature, "seed": seed}
    answers = lm.generate(inputs, **options)
    records = []
    for row, (prompt, tokens) in enumerate(zip(prompts, answers.tokens, strict=True)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        records.append({"prompt": prompt, "answer": answers.texts[row], "start": len(ids), "ids": ids + tokens})
    return records


def _append(cache: Path, records: list[dict[str, Any]]) -> None:
    with cache.open("ab") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def _open_cache(cache: Path, header: dict[str, Any], batch: int, total: int) -> list[dict[str, Any]]:
    """The answers of finished batches; whatever an interruption left behind them is cut off."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []  # behind the last line end: half a line
    if not lines:
        cache.write_bytes(b"")
        _append(cache, [header])
        return []
    if differing := differences(json.loads(lines[0]), header):
        raise ValueError(
            f"{cache} holds answers made otherwise ({'; '.join(differing)}); remove it, or use another folder"
        )
    done = len(lines) - 1
    done -= done % batch if done < total else 0
    os.truncate(cache, sum(len(line) + 1 for line in lines[: done + 1]))
    return [json.loads(line) for line in lines[1 : done + 1]]


def differences(have: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two JSON objects, in words."""
    found = []
    for key in dict.fromkeys([*have, *asked]):
        old, new = have.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is now {new!r}")
    return found


# ---------------------------------------------------------------- windows


def prepare(lm: LanguageModel, documents: Sequence[Document], *, window: int, share: float, seed: int) -> Data:
    """Divide documents and cut them into windows.

    Args:
        lm: The model they are for.
        documents: At least one.
        window: Longest window, in tokens.
        share: Of the documents to hold out, in (0, 1); at least one is. A single text is cut, its end held out.
        seed: Of the choice.

    Returns:
        Windows of both parts.

    Raises:
        ValueError: Nothing to learn from or to judge by, a window out of range, or an encoder-decoder.
    """
    if lm.split.is_encoder_decoder:
        raise ValueError("exits of an encoder-decoder cannot be trained yet; give a decoder-only model")
    longest = lm.split.max_positions
    if window < 2 or (longest is not None and window > longest):
        raise ValueError(f"a window of {window} tokens is outside 2..{longest or 'any'}, the model's context")
    bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
    train, held_out = divide(documents, share, seed)
    settings = {"documents": len(documents), "window": window, "held_out_share": share, "split_seed": seed}
    data = Data(cut(train, window, bos), cut(held_out, window, bos), settings)
    for part, name in ((data.train, "train on"), (data.held_out, "hold out")):
        if not len(part):
            raise ValueError(
                f"there is nothing to {name}: {len(documents)} documents with {sum(len(d.ids) for d in documents)} "
                "tokens are too few or too short; give more text or more prompts"
            )
    return data


def divide(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, whole groups each."""
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}; give one between 0 and 1")
    groups = list(dict.fromkeys(document.group for document in documents))
    if len(groups) == 1 and len(documents) == 1:
        ids, start = documents[0].ids, documents[0].start
        edge = round(len(ids) * (1 - share))
        return [Document(ids[:edge], start, "")], [Document(ids[edge:], max(start - edge, 0), "")]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    chosen = {groups[index] for index in order[: max(count, 0)]}
    inside: list[Document] = []
    outside: list[Document] = []
    for document in documents:
        (outside if document.group in chosen else inside).append(document)
    return inside, outside


def cut(documents: Sequence[Document], window: int, bos: int | None = None) -> Windows:
    """Pieces of documents, a start token in front of each where the document has one.

    Args:
        documents: Any number.
        window: Longest piece.
        bos: The start token.

    Returns:
        The pieces in which anything is to be predicted; a document's first token never is.
    """
    pieces = []
    for document in documents:
        head = document.ids[:1] if len(document.ids) > 1 and document.ids[0] == bos else ()
        body, first = document.ids[len(head) :], document.start - len(head)
        for at in range(0, len(body), window - len(head)):
            piece = (*head, *body[at : at + window - len(head)])
            start = max(first - at + len(head), 1)
            if start < len(piece):
                pieces.append((piece, start))
    width = max((len(piece) for piece, _ in pieces), default=0)
    ids = torch.zeros(len(pieces), width, dtype=torch.long)
    counted = torch.zeros(len(pieces), width, dtype=torch.bool)
    for row, (tokens, start) in enumerate(pieces):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counted[row, start : len(tokens)] = True
    return Windows(ids, counted)


def batch(windows: Windows, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Batch number `step`, counted from 0: `ids` and `counted`, [B, T], without columns nobody counts.

    Epochs are permutations with seeds of their own, run through one after the other, so the order depends on nothing
    but these numbers: whoever continues at a step needs no other state.

    Returns:
        Ids and mask.
    """
    rows: list[int] = []
    while len(rows) < size:
        epoch, at = divmod(step * size + len(rows), len(windows))
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        rows += torch.randperm(len(windows), generator=generator)[at : at + size - len(rows)].tolist()
    ids, counted = windows.ids[rows], windows.counted[rows]
    width = int(counted.any(0).nonzero().max()) + 1
    return ids[:, :width], counted[:, :width]
