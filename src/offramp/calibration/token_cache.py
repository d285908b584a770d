"""Readout inputs of exits at the tokens of real texts, from one teacher-forced pass, kept on disk.

features.json                 what they are of; another model, exits or text is refused
SPLIT/00000.safetensors       windows of one split, a few per file, from which an interrupted pass goes on

Logits are never kept (N · V numbers): whoever needs them computes them from the readout inputs, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.families.finite import name_of, require_finite
from offramp.runs.asked import require_same
from offramp.runs.bounded import read_object
from offramp.runs.digests import fingerprint
from offramp.runs.files import write_json
from offramp.runs.lines import REMOVE
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.training.data import Document, Windows, cut
from offramp.training.loss_sums import chunk_rows
from offramp.training.passes import states_of

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

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
        tokens[name] = _joined(files, layers)
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


def _joined(files: Sequence[Path], layers: Sequence[int]) -> Tokens:
    parts = [_whole(file, layers) for file in files]
    inputs = {layer: torch.cat([part[str(layer)] for part in parts]) for layer in layers}
    return Tokens(inputs, **{name: torch.cat([part[name] for part in parts]) for name in _OF_TOKENS})


def _whole(file: Path, layers: Sequence[int]) -> dict[str, Tensor]:
    """What a file holds of its windows."""
    tensors = read_tensors(file, AGAIN)[1]
    if set(tensors) != {*map(str, layers), *_OF_TOKENS} or len({len(tensor) for tensor in tensors.values()}) > 1:
        raise ValueError(f"{file} is damaged: readout inputs are missing, or of another number of tokens; {AGAIN}")
    return tensors
