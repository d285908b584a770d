"""Which exits are trained when, where the model is trained with them (LayerSkip, arXiv 2404.16710, section 4.1.2).

Losses weigh ẽ(t, l) = C(t, l) e(l) / Σ_i C(t, i) e(i): C is 0 or 1, e are the weights without a curriculum. An exit
that is off is not read out, so a step costs less. The paper's C counts all L layers; here it counts the exits there
are, and the last layer is on at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


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
