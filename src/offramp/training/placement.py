"""Which layers get exits: those that save most per generated token, by what was measured on text.

A token leaves at the first exit that agrees with the last layer. It saves the blocks behind, less their keys and
values, and the last readout; it pays for the tests of all exits that it came to. No rule of confidence knows where an
exit agrees, so a saving is what the exits allow for, not what a policy will reach; it compares layers.

Where the last layer's choice is known is seen through lenses in closed form, in one pass over some text: the best
affine map from the state after a layer to that after the last one, by least squares with a small ridge (Din et al.
2023, arXiv 2303.09435; the ridge is ours, and holds the map at the identity, where lenses begin). It is short of what
training a lens by its readouts reaches, and takes the time of a few passes; layers are compared on equal terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.core.exits import Exits
from offramp.families import SplitModel
from offramp.families.backbone import autocast, evaluating
from offramp.families.sizes import ModelShape
from offramp.runs.codec import decode
from offramp.runs.folder import RunFolder
from offramp.runs.tables import markdown
from offramp.training.config import TrainConfig
from offramp.training.data import Data, Windows
from offramp.training.loss_sums import chunk_rows
from offramp.training.objectives import choices
from offramp.training.passes import states_of

RIDGE = 1e-3
"""Share of each component's own second moment that is added to it."""
_PER_WEIGHT, _MOST_FITTED, _MEASURED, _TOGETHER = 16, 1 << 14, 1000, 4


@torch.no_grad()
def agreement(split: SplitModel, windows: Windows, seed: int, precision: str | None = None) -> Tensor:
    """Whether each layer would choose the last layer's token, through a lens fitted on other windows.

    Args:
        split: The model, which stays as it is.
        windows: At least two; half of them may be fitted on, of the others counted positions are measured.
        seed: Of the choice of windows.
        precision: "bf16": compute in bfloat16; None: as loaded.

    Returns:
        Bool [N, L-1], for about 1,000 positions if there are as many.

    Raises:
        ValueError: There is one window only.
    """
    if len(windows) < 2:
        raise ValueError("exits are placed by windows to fit on and others to measure on, but there is one; give more")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    fitted, measured = windows[order[::2]], windows[order[1::2]]
    layers = range(1, split.num_layers + 1)
    with evaluating(split.model), autocast(split.device, precision):
        lenses = _fit(split, fitted, layers)
        found: list[Tensor] = []
        for at in range(0, len(measured), _TOGETHER):
            hidden, _ = states_of(split, measured[at : at + _TOGETHER], layers)
            found += _agree(split, lenses, hidden)
            if sum(map(len, found)) >= _MEASURED:
                break
    return torch.cat(found).cpu()


def _fit(split: SplitModel, windows: Windows, layers: Sequence[int]) -> Exits:
    """Lenses after layers 1..L-1, fitted on all positions of some windows, prompts included."""
    width, enough = split.shape.width, min(_PER_WEIGHT * split.shape.width, _MOST_FITTED)
    lenses = Exits(split.num_layers, width, layers[:-1], device=split.device)
    sums = [torch.zeros(width + 1, 2 * width + 1, device=split.device) for _ in layers[:-1]]
    count = 0
    for at in range(0, len(windows), _TOGETHER):
        hidden, _ = states_of(split, _whole(windows[at : at + _TOGETHER]), layers)
        last = hidden[-1].float()
        for own, total in zip(hidden, sums, strict=False):
            x = torch.cat([own.float(), own.new_ones(len(own), 1).float()], 1)
            with torch.autocast(split.device.type, enabled=False):
                total += x.T @ torch.cat([x, last - own.float()], 1)
        count += len(last)
        if count >= enough:
            break
    for layer, total in zip(lenses.layers, sums, strict=True):
        weight, bias = solved(total.double().cpu())
        lens: Any = lenses.lenses[str(layer)]
        lens.up.weight.copy_(weight)
        lens.up.bias.copy_(bias)
    return lenses


def solved(sums: Tensor) -> tuple[Tensor, Tensor]:
    """W [D, D] and b [D] whose W x + b is closest to targets y; sums of [x, 1] [x, 1, y]^T, [D + 1, 2 D + 1]."""
    width = len(sums) - 1
    moments, targets = sums[:, : width + 1].clone(), sums[:, width + 1 :]
    moments.diagonal()[:width].mul_(1 + RIDGE).add_(1e-12)
    both = torch.linalg.solve(moments, targets)
    return both[:width].T, both[width]


def _whole(windows: Windows) -> Windows:
    """With all positions counted that are not padding."""
    last = windows.counted.shape[1] - windows.counted.int().flip(1).argmax(1)  # behind the last that counts
    columns = torch.arange(windows.counted.shape[1])
    return replace(windows, counted=(columns > 0) & (columns < last[:, None]))


def _agree(split: SplitModel, lenses: Exits, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Whether the choices after layers 1..L-1 are the last one's, bool [n, L-1] per chunk of positions."""
    found = []
    for parts in zip(*(torch.split(h, chunk_rows(split.shape.vocabulary)) for h in hidden), strict=True):
        best = choices(split.readout(parts[-1]).float())
        own = [
            choices(split.readout(lenses.adapt(layer, part.float()).to(part.dtype)).float())
            for layer, part in zip(lenses.layers, parts, strict=False)
        ]
        found.append(torch.stack(own, 1) == best[:, None])
    return found


@dataclass(frozen=True)
class Placement:
    """Where exits go, and what that rests on; shares are of the full model's FLOPs per token, without attention.

    Attributes:
        layers: Chosen ones, ascending.
        saving: Mean share that they save together.
        agreement: Share of positions at which each of layers 1..L-1 agrees with the last layer.
        alone: Mean share that an exit after each of them saves with no other.
        positions: How many were measured.
        most: How many exits there may be.
        kept: Tokens that a test scores; None: all V.
    """

    layers: tuple[int, ...]
    saving: float
    agreement: tuple[float, ...]
    alone: tuple[float, ...]
    positions: int
    most: int
    kept: int | None = None

    def table(self) -> str:
        """Layers, and what was chosen."""
        rows = [
            [str(layer), f"{agreed:.3f}", f"{alone:+.3f}", "exit" if layer in self.layers else ""]
            for layer, (agreed, alone) in enumerate(zip(self.agreement, self.alone, strict=True), 1)
        ]
        named = ", ".join(map(str, self.layers))
        return "\n".join([
            markdown(["layer", "agreement", "saving alone", ""], rows),
            f"exits after {named} save {self.saving:.3f} of the full model's FLOPs per token, if each token left at "
            f"the first one that agrees with the last layer ({self.positions} positions, lenses in closed form)",
        ])  # fmt: skip


def placed(
    split: SplitModel,
    data: Data,
    config: TrainConfig,
    most: int,
    *,
    kept: int | None = None,
    folder: Path | None = None,
) -> Placement:
    """Measure where a model as it is can leave, and place exits there.

    Args:
        split: The model.
        data: Its windows to train on are measured on; those held out are not looked at.
        config: Rank of the lenses, number format and seed.
        most: How many exits there may be.
        kept: See `place`.
        folder: Of the run: one that began with exits placed likewise goes on with them.

    Returns:
        The placement.

    Raises:
        ValueError: See `place`; or there is one window only.
    """
    before = None if folder is None else chosen_before(RunFolder(folder).begun(), most, kept)
    if before is not None:
        return before
    agrees = agreement(split, data.train, config.seed, config.precision)
    own = config.blocks * split.shape.blocks[-1].weights or lens_weights(split.shape.width, config.rank)
    return place(split.shape, agrees, own, most, kept)


def place(shape: ModelShape, agrees: Tensor, lenses: int, most: int, kept: int | None = None) -> Placement:
    """The exits that save most.

    Args:
        shape: The model.
        agrees: Whether each of layers 1..L-1 chooses the last layer's token, bool [N, L-1].
        lenses: Weights that an exit's lens, or its own blocks, multiply a state with.
        most: How many exits there may be, 1..L-1; fewer are chosen where more save less.
        kept: Tokens that a test scores, as if every agreed one was among them; None: all V.

    Returns:
        The placement.

    Raises:
        ValueError: `most` is out of range, or no exit saves anything.
    """
    check_most(most, len(shape.blocks))
    gains, price = gains_of(shape), 2 * lenses + shape.readout_flops(kept)
    full = sum(2 * block.weights for block in shape.blocks) + shape.readout_flops()
    counts = agrees.sum(0, dtype=torch.float64)
    alone = (counts * gains - len(agrees) * price) / len(agrees) / full
    chosen, total = best_exits(agrees, gains, price, most)
    if not chosen:
        best = int(alone.argmax())
        raise ValueError(
            f"no exit pays: even one after layer {best + 1}, which agrees with the last layer at {counts[best]:.0f} of "
            f"{len(agrees)} positions, costs more in tests than it saves; test fewer tokens, or name layers yourself"
        )
    return Placement(
        layers=tuple(at + 1 for at in chosen),
        saving=total / len(agrees) / full,
        agreement=tuple((counts / len(agrees)).tolist()),
        alone=tuple(alone.tolist()),
        positions=len(agrees),
        most=most,
        kept=kept,
    )


def check_most(most: int, depth: int) -> None:
    """Raise a ValueError unless a model of so many layers can have so many exits."""
    if not 1 <= most < depth:
        raise ValueError(f"{most} exits are to be placed; a model of {depth} layers can have 1..{depth - 1}")


def gains_of(shape: ModelShape) -> Tensor:
    """FLOPs that leaving after layers 1..L-1 saves, tests aside, [L-1]."""
    skipped = [2 * block.weights - shape.fill_flops(index) for index, block in enumerate(shape.blocks)]
    behind = [sum(skipped[layer:]) + shape.readout_flops() for layer in range(1, len(skipped))]
    return torch.tensor(behind, dtype=torch.float64)


def best_exits(agrees: Tensor, gains: Tensor, price: float, most: int) -> tuple[list[int], float]:
    """The subset of exits with the largest sum of gains less tests, by branch and bound: exact.

    Args:
        agrees: Whether an exit agrees, bool [N, E], exits in the order in which tokens come to them.
        gains: Of a token that leaves there, [E].
        price: Of a test, for every token that comes to it.
        most: Size of the subset.

    Returns:
        Places in 0..E-1, ascending, and the sum over the tokens; none and 0 where nothing is above 0.
    """
    count = agrees.shape[1]
    worth = (gains - price).clamp(min=0)
    found: tuple[list[int], float] = ([], 0.0)

    def search(taken: list[int], left: Tensor, total: float) -> None:
        """Add exits behind those taken, for tokens that have not left, bool [M, E]."""
        nonlocal found
        first = taken[-1] + 1 if taken else 0
        room = most - len(taken)
        if first == count or not room or not len(left):
            return
        counts = left.sum(0, dtype=torch.float64)
        sums = total + counts * gains - len(left) * price
        sums[:first] = -torch.inf
        if float(sums.max()) > found[1]:
            found = ([*taken, int(sums.argmax())], float(sums.max()))
        if room == 1:
            return
        reached = (counts * worth)[first:]  # no exit adds more than all that agree there, who pay one test
        once = (left[:, first:] * worth[first:]).amax(1).sum()  # nor a token more than at its best one
        if total + min(float(reached.topk(min(room, len(reached))).values.sum()), float(once)) <= found[1]:
            return
        for at in sorted(range(first, count), key=lambda at: -float(sums[at])):
            search([*taken, at], left[~left[:, at]], float(sums[at]))

    search([], agrees, 0.0)
    return found


def lens_weights(width: int, rank: int | None) -> int:
    """Weights of a lens of that rank (None: a full matrix) on states of that width."""
    return width * (width if rank is None else 2 * rank)


def chosen_before(record: Mapping[str, Any] | None, most: int, kept: int | None) -> Placement | None:
    """The placement that a run began with, so that it goes on; None where it has none of that kind.

    Returns:
        The placement.
    """
    values = (record or {}).get("about", {}).get("placement")
    found = None if values is None else decode(Placement, values)
    return found if found is not None and (found.most, found.kept) == (most, kept) else None
