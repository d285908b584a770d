"""What each exit says about the tokens of real texts, as decoding would see it: the same candidates and pruning.

Readout inputs come from one teacher-forced pass and are kept on disk:

features.json                 what they are of; another model, exits or text is refused
SPLIT/00000.safetensors       windows of one split, a few per file, from which an interrupted pass goes on

Logits are never kept (N · V numbers): whoever needs them computes them from the readout inputs, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.vocabulary import Kept, Pruning
from offramp.families.finite import name_of, require_finite
from offramp.runs.bounded import read_object
from offramp.runs.digests import fingerprint
from offramp.runs.files import write_json
from offramp.runs.resume import REMOVE, require_same
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.training.data import Document, Windows, cut
from offramp.training.loss_sums import chunk_rows
from offramp.training.passes import states_of
from offramp.uncertainty.candidates import Shortlist, TokenRows, place_of, rows_of, shortlist
from offramp.uncertainty.laplace import Factors

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.families import SplitModel

SPLITS = ("fit", "tune", "calibrate", "test")
"""fit: the factors A and G. tune: T, ω, τ and what equalises scores. calibrate: the quantile of conformal sets. test:
the report."""
SHARES = (0.4, 0.2, 0.2, 0.2)
"""Of the documents."""
AGAIN = "remove it, and it is made again"
_OF_TOKENS = ("chosen", "written", "positions", "windows")
_BATCH = 4  # windows of one pass, and of one file
Progress = Callable[..., None]
"""(done, total[, what is next])."""


@dataclass(frozen=True)
class Tokens:
    """N tokens of one split that are predicted at the exits.

    Attributes:
        inputs: Readout inputs by layer, [N, D] each, in the model's number format.
        chosen: The full model's tokens, [N].
        written: The text's tokens, [N].
        positions: Of the tokens in their answers, as decoding counts them, [N].
        windows: A number per window of text, [N]: tokens of one are not independent.
    """

    inputs: Mapping[int, Tensor]
    chosen: Tensor
    written: Tensor
    positions: Tensor
    windows: Tensor

    def __len__(self) -> int:
        return len(self.chosen)


def split_documents(documents: Sequence[Document], seed: int) -> dict[str, list[Document]]:
    """Documents of each split, whole groups each: no two share a text; a ValueError for too few groups."""
    groups = list(dict.fromkeys(document.group for document in documents))
    if len(groups) < len(SPLITS):
        raise ValueError(
            f"there are {len(groups)} documents of their own, but fitting, tuning, calibration and test need one each; "
            "give more, such as a .jsonl file with a text per line"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    free = len(groups) - len(SPLITS)  # one is sure for each split
    edges = [round(sum(SHARES[:index]) * free) + index for index in range(len(SPLITS) + 1)]
    home = {
        groups[order[at]]: name for name, a, b in zip(SPLITS, edges[:-1], edges[1:], strict=True) for at in range(a, b)
    }
    return {name: [d for d in documents if home[d.group] == name] for name in SPLITS}


def cache_tokens(
    lm: LanguageModel,
    documents: Sequence[Document],
    folder: Path,
    *,
    layers: Sequence[int],
    window: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Tokens], dict[str, Any]]:
    """Split documents and read every exit at each of their tokens, or take from the folder what is there.

    The first token of a decoder-only model's answer is left out: it is read off the prompt's own pass, at full depth.

    Args:
        lm: The model, with the exits that are meant.
        documents: See `offramp.training.data`.
        folder: Where the files go.
        layers: Exits to read, ascending.
        window: Longest piece of a document, in tokens.
        seed: Of the splits.
        progress: Called with the windows done and asked for.

    Returns:
        Tokens by split, and a record of the splits as JSON values.

    Raises:
        ValueError: Too few or too short documents, or the folder holds something else.
    """
    bos = None if lm.tokenizer is None else lm.tokenizer.bos_token_id
    windows: dict[str, Windows] = {}
    record: dict[str, Any] = {}
    for name, chosen in split_documents(documents, seed).items():
        windows[name] = cut([_after_the_first(lm, document) for document in chosen], window, bos)
        if not len(windows[name]):
            raise ValueError(f"the documents to {name} on hold no token to predict; give more or longer ones")
        record[name] = {
            "documents": len({d.group for d in chosen}), "tokens": windows[name].positions,
            "digest": windows[name].digest(),
        }  # fmt: skip
        if windows[name].shortened:
            record[name]["shortened"] = windows[name].shortened
    header = {
        "schema": "offramp/features/1", "model": fingerprint(lm.model), "layers": list(layers),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "lenses": None if lm.exits is None else fingerprint(lm.exits.adapters),
        "splits": {name: entry["digest"] for name, entry in record.items()},
    }  # fmt: skip
    _require(folder / "features.json", header)
    total, done = sum(len(w) for w in windows.values()), 0
    tokens = {}
    for name, part in windows.items():
        files = []
        for at in range(0, len(part), _BATCH):
            if progress is not None:
                progress(done, total, f"reading exits to {name} on")
            files.append(folder / name / f"{at // _BATCH:05}.safetensors")
            batch = part[slice(at, at + _BATCH)]
            if not files[-1].exists():
                write_tensors(files[-1], _read(lm, batch, layers, at))
            done += len(batch)
        tokens[name] = _of_files(files, layers)
    if progress is not None:
        progress(total, total, "exits read")
    return tokens, record


def _after_the_first(lm: LanguageModel, document: Document) -> Document:
    asked = document.start > 0 and not lm.split.is_encoder_decoder
    return replace(document, start=document.start + 1) if asked else document


def _require(file: Path, header: dict[str, Any]) -> None:
    """Write what the features are of, or see that it is the same."""
    if not file.exists():
        write_json(file, header)
    else:
        have = read_object(file, AGAIN)
        require_same(have, header, file.parent, "readout inputs of something else ({})", REMOVE)


@torch.no_grad()
def _read(lm: LanguageModel, windows: Windows, layers: Sequence[int], first: int) -> dict[str, Tensor]:
    """One pass over a few windows."""
    split = lm.split
    states, written = states_of(split, windows, (*layers, split.num_layers))
    last = torch.split(states[-1], chunk_rows(split.shape.vocabulary))
    chosen = torch.cat([split.readout(part, split.num_layers).argmax(-1) for part in last])
    where = windows.counted[:, 1:]
    columns = torch.arange(1, windows.ids.shape[1]).expand(where.shape)
    positions = columns - windows.first[:, None] + (0 if split.is_encoder_decoder else 1)
    numbers = torch.arange(first, first + len(windows))[:, None].expand(where.shape)
    found = {str(layer): split.readout_input(h, layer) for layer, h in zip(layers, states[:-1], strict=True)}
    for layer, inputs in [*found.items(), (str(split.num_layers), states[-1])]:
        require_finite(inputs, name_of(split), f"after layer {layer} of {split.num_layers}")
    found |= {"chosen": chosen, "written": written, "positions": positions[where], "windows": numbers[where]}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _of_files(files: Sequence[Path], layers: Sequence[int]) -> Tokens:
    parts = [_whole(file, layers) for file in files]
    inputs = {layer: torch.cat([part[str(layer)] for part in parts]) for layer in layers}
    return Tokens(inputs, **{name: torch.cat([part[name] for part in parts]) for name in _OF_TOKENS})


def _whole(file: Path, layers: Sequence[int]) -> dict[str, Tensor]:
    """What a file holds of its windows."""
    tensors = read_tensors(file, AGAIN)[1]
    if set(tensors) != {*map(str, layers), *_OF_TOKENS} or len({len(tensor) for tensor in tensors.values()}) > 1:
        raise ValueError(f"{file} is damaged: readout inputs are missing, or of another number of tokens; {AGAIN}")
    return tensors


@dataclass(frozen=True)
class ExitView:
    """One exit's view of N tokens.

    Attributes:
        rows: Its own candidates, and where the true token stands.
        logits: Of the first exit's candidates, [N, k]; -inf where pruning dropped them.
        normaliser: ln of the sum of exp(logit) over all scored tokens, [N].
    """

    rows: TokenRows
    logits: Tensor
    normaliser: Tensor


@dataclass(frozen=True)
class TokenViews:
    """All exits' views of N tokens, and what the first exit's candidates are.

    Attributes:
        exits: By layer, ascending.
        ids: Candidates of the first exit, [N, k].
        place: Column of the true token among these, or k, [N].
        positions: Of the tokens in their texts, [N].
        windows: See `Tokens`.
        target: True tokens, [N].
    """

    exits: dict[int, ExitView]
    ids: Tensor
    place: Tensor
    positions: Tensor
    windows: Tensor
    target: Tensor

    @property
    def logits(self) -> dict[int, Tensor]:
        """Of the first exit's candidates, by layer."""
        return {layer: view.logits for layer, view in self.exits.items()}

    @property
    def normalisers(self) -> dict[int, Tensor]:
        """By layer."""
        return {layer: view.normaliser for layer, view in self.exits.items()}

    def surprise(self) -> dict[int, Tensor]:
        """-ln p of the true token by layer, infinite where it is no candidate or not scored, [N] each."""
        k = self.ids.shape[1]
        column = self.place.clamp(max=k - 1)[:, None]
        return {
            layer: torch.where(self.place < k, v.normaliser - v.logits.gather(1, column)[:, 0], torch.inf)
            for layer, v in self.exits.items()
        }


@torch.no_grad()
def factors_of(
    split: SplitModel, tokens: Tokens, layers: Sequence[int], progress: Progress | None = None
) -> dict[int, Factors]:
    """Sums of A and of the diagonal of G over tokens, by layer; the whole vocabulary is read out."""
    head = getattr(split.head, "bias", None) is not None
    vocabulary, step = split.shape.vocabulary, chunk_rows(split.shape.vocabulary)
    found = {layer: Factors.empty(split.shape.width, vocabulary, bias=head, diagonal=True) for layer in layers}
    for at in range(0, len(tokens), step):
        if progress is not None:
            progress(at, len(tokens))
        for layer, factors in found.items():
            x = tokens.inputs[layer][at : at + step].to(split.device)
            found[layer] = factors.update(x, split.project(x).float())
    return found


@torch.no_grad()
def views_of(
    split: SplitModel,
    tokens: Tokens,
    layers: Sequence[int],
    *,
    candidates: int,
    pruning: Pruning | None = None,
    protected: Sequence[int] = (),
    to_text: bool = False,
    progress: Progress | None = None,
) -> TokenViews:
    """Read cached tokens out at every exit.

    Args:
        split: The model.
        tokens: Of one split.
        layers: Exits, ascending.
        candidates: k.
        pruning: Of the vocabulary, "fixed" or "decaying"; None: all tokens are scored.
        protected: Ids that pruning never drops.
        to_text: The true token is the text's, not the full model's.
        progress: Called with the tokens done and asked for.

    Returns:
        Candidates, their logits and where the true token stands.
    """
    target = tokens.written if to_text else tokens.chosen
    parts: list[tuple[Shortlist, dict[int, ExitView]]] = []
    step = chunk_rows(split.shape.vocabulary)
    for at in range(0, len(tokens), step):
        if progress is not None:
            progress(at, len(tokens))
        rows = slice(at, at + step)
        inputs = {layer: tokens.inputs[layer][rows] for layer in layers}
        first: Shortlist | None = None
        views: dict[int, ExitView] = {}
        for layer, logits in _scored(split, inputs, pruning, protected):
            short = shortlist(logits, candidates)
            first = first or short
            rows_here = rows_of(inputs[layer], logits, short, target[rows])
            views[layer] = ExitView(rows_here, logits.gather(1, first.ids), logits.logsumexp(-1))
        assert first is not None
        parts.append((first, views))
    ids = torch.cat([first.ids for first, _ in parts])
    exits = {layer: _joined([views[layer] for _, views in parts]) for layer in layers}
    return TokenViews(exits, ids, place_of(ids, target), tokens.positions, tokens.windows, target)


def _scored(
    split: SplitModel, inputs: dict[int, Tensor], pruning: Pruning | None, protected: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Logits [N, V] of each exit on the CPU, -inf for tokens that pruning dropped before."""
    kept: Kept | None = None
    sizes = {} if pruning is None else pruning.sizes(list(inputs))
    following = dict(zip(list(inputs)[:-1], list(inputs)[1:], strict=True))
    guard = torch.tensor(sorted(set(protected)), dtype=torch.long)
    for layer, x in inputs.items():
        full = split.project(x.to(split.device)).float().cpu()
        scores = full if kept is None else full.gather(1, kept.ids)
        yield layer, full if kept is None else kept.scatter(kept.mask(scores), full.shape[1])
        if (size := sizes.get(following.get(layer, -1))) is not None:
            wanted = [size] * len(full)
            kept = Kept.best(full, wanted, guard) if kept is None else kept.shrunk(scores, wanted)


def _joined(parts: Sequence[ExitView]) -> ExitView:
    rows = [part.rows for part in parts]
    shorts = [row.short for row in rows]
    whole = Shortlist(*(torch.cat([getattr(short, name) for short in shorts]) for name in Shortlist._fields))
    joined = TokenRows(
        torch.cat([row.x for row in rows]), whole, torch.cat([row.place for row in rows]),
        torch.cat([row.beyond for row in rows]),
    )  # fmt: skip
    return ExitView(joined, torch.cat([p.logits for p in parts]), torch.cat([p.normaliser for p in parts]))
