"""What exits are trained on: texts, answers or translations, as windows of tokens with a loss mask.

Texts come from plain-text files (a file is a document), JSON and JSON Lines; examples of a task from `offramp.tasks`;
the model's own answers from `offramp.training.answers`. Training and held-out data are divided by document before
anything is cut into windows; answers to the same prompt and repeated texts always fall on the same side.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from offramp.tasks import task_documents
from offramp.tasks.rows import Row, json_rows, kind, objects, read_text

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task

T = TypeVar("T")
Progress = Callable[..., None]
"""(done, total[, what is next])."""


@dataclass(frozen=True)
class Document:
    """Token ids; those from `start` on are to be predicted. Documents of one `group` are never divided.

    For an encoder-decoder, `source` is what the encoder reads, and `ids` begins with the decoder's start token.
    `attribute` is a number of the prompt, for reports that tell groups of prompts apart; -1: unknown.
    """

    ids: tuple[int, ...]
    start: int
    group: str
    source: tuple[int, ...] = ()
    attribute: int = -1


@dataclass(frozen=True)
class Windows:
    """N windows of up to T tokens: `ids` [N, T]; `counted` [N, T] marks the tokens whose prediction is trained.

    For an encoder-decoder also what the encoder reads, up to X tokens: `sources` and its mask `present`, [N, X] both.
    Where only some of the tokens to be predicted are counted, `begins` [N] says where these begin. `weights` [N, T] of
    tokens and `attributes` [N] of the documents go wherever the windows go; None: all weigh 1, nothing is known.
    `shortened` is how many documents lost tokens when they were cut; parts of the windows do not know. `rows` [N] says
    which of all windows these are, where they come from `batch`.
    """

    ids: Tensor
    counted: Tensor
    sources: Tensor | None = None
    present: Tensor | None = None
    begins: Tensor | None = None
    weights: Tensor | None = None
    attributes: Tensor | None = None
    shortened: int = 0
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """How many predictions are trained."""
        return int(self.counted.sum())

    def digest(self) -> str:
        """SHA-256 of the content."""
        parts = [self.ids.to(torch.int32), self.counted.to(torch.uint8)]
        if self.sources is not None:
            parts.append(self.sources.to(torch.int32))
        if self.attributes is not None:
            parts.append(self.attributes.to(torch.int32))
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    @property
    def first(self) -> Tensor:
        """Column of the first token to be predicted, [N]."""
        return self.counted.int().argmax(1) if self.begins is None else self.begins

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each window, of both sides, [N]."""
        own = self.counted.int().flip(1).argmax(1)  # columns behind the last that counts
        return self.ids.shape[1] - own + (0 if self.present is None else self.present.sum(1))

    def __getitem__(self, rows: Any) -> Windows:
        """Some of the windows, without columns nobody needs."""
        ids, counted = self.ids[rows], self.counted[rows]
        width = int(counted.any(0).nonzero().max()) + 1
        begins = None if self.begins is None else self.begins[rows]
        weights = None if self.weights is None else self.weights[rows][:, :width]
        attributes = None if self.attributes is None else self.attributes[rows]
        sources, present = None, None
        if self.sources is not None and self.present is not None:
            depth = int(self.present[rows].sum(1).max())
            sources, present = self.sources[rows][:, :depth], self.present[rows][:, :depth]
        numbers = None if self.rows is None else self.rows[rows]
        return Windows(ids[:, :width], counted[:, :width], sources, present, begins, weights, attributes, rows=numbers)

    def of_tokens(self, values: Tensor) -> Tensor:
        """What `values` [N, T] or [N] say of the counted tokens, in the order in which their states are taken."""
        whole = values if values.ndim == 2 else values[:, None].expand_as(self.counted)
        return whole[:, 1:][self.counted[:, 1:]]


@dataclass(frozen=True)
class Data:
    """Windows to train on, windows of other documents to judge by, and how they came about, for the record."""

    train: Windows
    held_out: Windows
    settings: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- texts


def read_texts(path: Path, fields: Sequence[str] = ("text",)) -> list[str]:
    """The documents of a file: the objects of a `.json` list or of `.jsonl` lines, or the whole file as one.

    Returns:
        Texts, at least one, of an object those of its fields joined by line ends; a ValueError for another layout.
    """
    if kind(path) not in (".json", ".jsonl"):
        return [read_text(path)]
    texts = [_joined(row, fields) for row in objects(json_rows(path), *fields)]
    return with_text(texts, texts, path, fields)


def with_text(entries: list[T], texts: Sequence[str], path: Path, fields: Sequence[str]) -> list[T]:
    """Entries of a file that hold any text; a warning counts the others.

    Args:
        entries: All that there are.
        texts: Of each.
        path: Their file.
        fields: Keys of the texts.

    Returns:
        At least one.

    Raises:
        ValueError: There is none.
    """
    found = [entry for entry, text in zip(entries, texts, strict=True) if text.strip()]
    if not found:
        raise ValueError(f"{path} holds no text under {' + '.join(fields)}; give a file with text, or other fields")
    if left_out := len(entries) - len(found):
        warnings.warn(f"{path}: {left_out} of {len(entries)} entries are empty and were left out", stacklevel=3)
    return found


def _joined(row: Row, fields: Sequence[str]) -> str:
    for key in fields:
        if not isinstance(row.value.get(key), str):
            raise ValueError(f"{row.place} has no text under {key!r}; it has {row.keys}")
    return "\n".join(row.value[key] for key in fields)


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


# ---------------------------------------------------------------- tasks


def pair_documents(
    lm: LanguageModel, task: Task, examples: Sequence[Example], *, longest: int | None = None
) -> tuple[list[Document], int]:
    """A document per example of a task, its answer to be predicted, and how many sources were shortened."""
    pairs, shortened = task_documents(lm, task, examples, longest=longest)
    if not lm.split.is_encoder_decoder:
        made = [Document((*p.source_ids, *p.target_ids), len(p.source_ids), p.group) for p in pairs]
    else:
        start = lm.model.generation_config.decoder_start_token_id
        made = [Document((start, *p.target_ids), 1, p.group, p.source_ids) for p in pairs]
    return made, shortened


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
        Windows of both parts; `settings` counts documents that were shortened, if any were.

    Raises:
        ValueError: Nothing to learn from or to judge by, a window out of range, or plain texts for an encoder-decoder.
    """
    require_sources(lm, documents)
    check_window(lm, window)
    bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
    train, held_out = divide(documents, share, seed)
    settings = {"documents": len(documents), "window": window, "held_out_share": share, "split_seed": seed}
    data = Data(cut(train, window, bos), cut(held_out, window, bos), settings)
    if shortened := data.train.shortened + data.held_out.shortened:
        settings["shortened"] = shortened
    for part, name in ((data.train, "train on"), (data.held_out, "hold out")):
        if not len(part):
            raise ValueError(
                f"there is nothing to {name}: {len(documents)} documents with {sum(len(d.ids) for d in documents)} "
                "tokens are too few or too short; give more text or more prompts"
            )
    return data


def require_sources(lm: LanguageModel, documents: Sequence[Document]) -> None:
    """Raise a ValueError if an encoder-decoder would be given plain texts."""
    if lm.split.is_encoder_decoder and not all(document.source for document in documents):
        raise ValueError("an encoder-decoder learns to answer or to translate, not plain text; give a task or prompts")


def check_window(lm: LanguageModel, window: int) -> None:
    """Raise a ValueError unless a window has at least two tokens and fits the model's context."""
    longest = lm.split.max_positions
    if window < 2 or (longest is not None and window > longest):
        raise ValueError(f"a window of {window} tokens is outside 2..{longest or 'any'}, the model's context")


def check_share(share: float) -> None:
    """Raise a ValueError unless the held-out share leaves something on both sides."""
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is {share}; give one between 0 and 1")


def divide(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, whole groups each."""
    check_share(share)
    groups = list(dict.fromkeys(document.group for document in documents))
    if len(documents) == 1 and not documents[0].start:  # an answer is not divided: its end needs the prompt
        ids = documents[0].ids
        edge = round(len(ids) * (1 - share))
        return [replace(documents[0], ids=ids[:edge])], [replace(documents[0], ids=ids[edge:])]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    chosen = {groups[index] for index in order[: max(count, 0)]}
    inside: list[Document] = []
    outside: list[Document] = []
    for document in documents:
        (outside if document.group in chosen else inside).append(document)
    return inside, outside


def cut(documents: Sequence[Document], window: int, bos: int | None = None) -> Windows:
    """Pieces of documents, at most a window long, the start token in front of each where the document has one.

    An answer stays behind its prompt, in one piece: where both are longer than the window, the prompt loses its
    beginning, down to half the window, and then the answer its end.

    Returns:
        The pieces in which anything is to be predicted; a document's first token never is.
    """
    pieces, shortened = [], 0
    for document in documents:
        kind = document.attribute
        if document.source:  # what the encoder read belongs to the beginning
            pieces.append((document.ids, max(document.start, 1), document.source, kind))
            continue
        head = document.ids[:1] if len(document.ids) > 1 and document.ids[0] == bos else ()
        body, first = document.ids[len(head) :], document.start - len(head)
        room = window - len(head)
        if first > 0 and len(body) > room:
            before = max(room - len(body[first:]), min(first, room // 2), 1)  # tokens of the prompt that stay
            body, first = body[first - before :][:room], before
            shortened += 1
        for at in range(0, len(body), room):
            piece = (*head, *body[at : at + room])
            start = max(first - at + len(head), 1)
            if start < len(piece):
                pieces.append((piece, start, (), kind))
    ids, present = padded([piece for piece, _, _, _ in pieces])
    counted = present & (torch.arange(ids.shape[1]) >= torch.tensor([start for _, start, _, _ in pieces])[:, None])
    kinds = torch.tensor([kind for _, _, _, kind in pieces])
    attributes = kinds if bool((kinds >= 0).any()) else None
    if any(source for _, _, source, _ in pieces):
        return Windows(ids, counted, *padded([source for _, _, source, _ in pieces]), attributes=attributes)
    return Windows(ids, counted, attributes=attributes, shortened=shortened)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different length as ids, filled up with 0 behind, and a mask of what is there, [N, T] both."""
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    present = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        present[index, : len(row)] = True
    return ids, present


def steps_per_epoch(windows: Windows, size: int) -> int:
    """Batches that hold every window once."""
    return -(-len(windows) // size)


def epoch_batches(lengths: Tensor, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch, which hold every row once, rows of like length together.

    A permutation is sorted by length within pools of 64 batches, and the batches are permuted again. All of it is drawn
    from (seed, epoch), so the order depends on nothing but these numbers: whoever continues at a step needs no other
    state.

    Args:
        lengths: Of the rows, [N].
        size: Rows of a batch; the last may have fewer.
        seed: Of the order.
        epoch: Counted from 0.

    Returns:
        Places of rows, [B] each.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(lengths), generator=generator)
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in torch.split(order, 64 * size)]
    batches = torch.split(torch.cat(pools), size)
    whole = len(lengths) // size
    which = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]  # a rest comes last
    return [batches[at] for at in which]


def batch(windows: Windows, step: int, size: int, seed: int, most: int | None = None) -> Windows:
    """Batch number `step`, counted from 0: B windows, without columns nobody counts.

    Args:
        windows: All of them.
        step: Which batch; their order is that of `epoch_batches`.
        size: Windows in it; the last batch of an epoch may have fewer.
        seed: Of the order.
        most: Positions per window that count, drawn at random; None: all.

    Returns:
        The windows of the batch.
    """
    epoch, at = divmod(step, steps_per_epoch(windows, size))
    rows = epoch_batches(windows.lengths, size, seed, epoch)[at]
    part = replace(windows[rows], rows=rows)
    if most is None:
        return part
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)  # torch heeds 32 bits of a seed
    marks = torch.where(part.counted, torch.rand(part.counted.shape, generator=generator), 2.0)
    drawn = part.counted & (marks.argsort(1).argsort(1) < most)
    return replace(part, counted=drawn, begins=part.first)
