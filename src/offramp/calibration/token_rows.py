"""What each exit says about cached tokens, as decoding would see it: the same candidates, after the same pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.calibration.token_cache import Tokens
from offramp.core.vocabulary import Kept, Pruning
from offramp.training.loss_sums import chunk_rows
from offramp.uncertainty.candidates import Shortlist, TokenRows, place_of, rows_of, shortlist
from offramp.uncertainty.laplace import Factors

if TYPE_CHECKING:
    from offramp.families import SplitModel

Progress = Callable[[int, int], None]
"""(readouts done, asked for)."""


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
