"""What a run does when: learning rate, end, judgements and checkpoints; weights over exits, and which learn.

Where the model is trained with its exits, a curriculum may leave some of them out (LayerSkip, arXiv 2404.16710, section
4.1.2). Losses weigh ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i): C is 0 or 1, e are the weights without a curriculum. An
exit that is off is not read out, so a step costs less. The paper's C counts all L layers; here it counts the exits that
there are, and the last layer is on at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.runs.folder import TrainState

FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "step": lambda done: 0.1 ** sum(done >= edge for edge in (0.5, 0.75)),
}
"""Schedules: share of the way done, in [0, 1] -> share of the learning rate. "step" divides by 10 at half and at three
quarters of the way (ResNet, MSDNet)."""
SCHEDULES = ("cosine", "linear", "constant")
"""Those for language models."""
PRECISIONS = (None, "bf16")


def _layerskip(layers: Sequence[int], scale: float = 0.2) -> list[float]:
    """Triangular in the layer; every layer but the last one scaled (LayerSkip, arXiv 2404.16710, section 4.1.2)."""
    *early, last = (layer * (layer - 1) / 2 for layer in layers)  # the sum over layers before, counted from 0
    values = [*(scale * value for value in early), layers[-1] - 1 + scale * (last - (layers[-1] - 1))]
    return [1 / len(layers)] * len(layers) if not sum(values) else [value / sum(values) for value in values]


WEIGHTS: dict[str, Callable[[Sequence[int]], list[float]]] = {
    "uniform": lambda layers: [1 / len(layers) for _ in layers],
    "layer": lambda layers: [layer / sum(layers) for layer in layers],
    "layerskip": _layerskip,
    "last": lambda layers: [float(at == len(layers)) for at, _ in enumerate(layers, 1)],
}
"""Weights over the readouts that are trained, which sum to 1: equal, proportional to the layer (CALM, Schuster et al.
2022, section 3.2, and FREE), LayerSkip's, normalised over these alone, or all on the last: the same training without
exits, to compare with. Where the backbone is trained, the last layer is one of them; else the deepest exit has its
place in LayerSkip's formula."""


@dataclass(frozen=True)
class Schedule:
    """What the steps of a run do besides learning.

    Attributes:
        total: Steps to do; with `by_tokens` trained positions, and the run ends at the first step that reaches them.
        learning_rate: After the warm-up.
        fall: One of `FALLS`.
        warmup: Steps over which the learning rate rises.
        clip: Largest norm of the gradient; None: any.
        seed: Of all draws.
        validate_every: Steps between judgements; None: only before and after.
        save_every: Steps between checkpoints; there is one at the end of every epoch, too.
        log_every: Steps between lines of metrics; likewise.
        epoch: Steps of an epoch; None: the run has none, or needs nothing at their ends.
        by_tokens: Whether `total` counts positions.
    """

    total: int
    learning_rate: float
    fall: str
    warmup: int
    clip: float | None
    seed: int
    validate_every: int | None
    save_every: int
    log_every: int = 1
    epoch: int | None = None
    by_tokens: bool = False

    def done(self, state: TrainState) -> int:
        """Steps or positions done, whichever `total` counts."""
        return state.tokens if self.by_tokens else state.step

    def share(self, state: TrainState) -> float:
        """How much of the way is done, in [0, 1]."""
        return min(1.0, self.done(state) / self.total)

    def ended(self, state: TrainState) -> bool:
        """Whether nothing is left to do."""
        return self.done(state) >= self.total

    def rate(self, state: TrainState) -> float:
        """Learning rate of the step that comes next."""
        rise = min(1.0, (state.step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rise * FALLS[self.fall](self.share(state))

    def validates(self, state: TrainState) -> bool:
        """Whether there is a judgement after a step."""
        return self.ended(state) or (self.validate_every is not None and state.step % self.validate_every == 0)

    def saves(self, state: TrainState) -> bool:
        """Whether there is a checkpoint after a step."""
        return self.ended(state) or self._at(state, self.save_every)

    def logs(self, state: TrainState) -> bool:
        """Whether a step is written down."""
        return self._at(state, self.log_every)

    def _at(self, state: TrainState, every: int) -> bool:
        return state.step % every == 0 or (self.epoch is not None and state.step % self.epoch == 0)


# ---------------------------------------------------------------- which exits are trained when


def rotational(exits: int, step: int, share: float) -> list[bool]:
    """C_rot: one exit at a step, in turn; each is on once in E steps, as each of R layers is in R steps there."""
    return [at == step % exits for at in range(exits)]


def gradual(exits: int, step: int, share: float) -> list[bool]:
    """C_grad: from the deepest to the first, one more every T / 2 (E + 1) steps: all are on before half of T."""
    return [share * 2 * (exits + 1) >= exits - at for at in range(exits)]


CURRICULA: dict[str, Callable[[int, int, float], list[bool]]] = {"rotational": rotational, "gradual": gradual}
"""(E, step counted from 0, share of the training that is done, in [0, 1]) -> which exits are on, E of them."""


def weights_at(name: str | None, weights: Sequence[float], step: int, share: float) -> list[float | None]:
    """Weights of the readouts at a step.

    Args:
        name: One of `CURRICULA`; None: all exits are on.
        weights: Of the exits and of the last layer, E + 1; without a curriculum perhaps of the exits only.
        step: Counted from 0.
        share: Of the training that is done, in [0, 1].

    Returns:
        As many, with the same sum; None for an exit that is off.
    """
    if name is None:
        return list(weights)
    on = [*CURRICULA[name](len(weights) - 1, step, share), True]
    total = sum(weight for weight, each in zip(weights, on, strict=True) if each) / sum(weights)
    return [weight / total if each else None for weight, each in zip(weights, on, strict=True)]
