"""What calibrated probabilities cost per row and exit, in FLOPs: as published, and counted.

Counted is every addition, subtraction, multiplication, division, root and exponential from the logits to the
probabilities, one FLOP each (so two per multiply-add); comparisons are free. What is worked out once per exit for all
rows (Cholesky factors, directions of draws) is not in it. The softmax that any exit needs is: "vanilla" has that alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Overhead(NamedTuple):
    """FLOPs per row at an exit.

    Attributes:
        formula: Of Meronen et al. (2023); 0 where there is no Laplace approximation by sampling.
        counted: Of what is done here.
    """

    formula: int
    counted: int


def published(features: int, classes: int, n_mc: int) -> int:
    """2 c n + 2 p² + 5 p + 2: a quadratic form of p + 1 numbers, one scale and one addition per class and draw.

    It leaves out the root, the division by T, the n softmaxes and their mean. p is without the bias's one.

    Returns:
        FLOPs per row.
    """
    return 2 * classes * n_mc + 2 * features**2 + 5 * features + 2


def softmax(classes: int) -> int:
    """Less the maximum, exponentials, their sum, quotients."""
    return 4 * classes - 1


def spread(inputs: int, classes: int, damping: str) -> int:
    """Of `Damped.spread`, for m inputs of the head."""
    if damping == "factored":
        return inputs**2 + 2 * inputs - 1  # a triangular solve and a squared norm
    # a turn, squares, and their products with the variances
    return inputs * (2 * inputs - 1) + inputs + classes * (2 * inputs - 1)


def sampled(classes: int, n_mc: int, damping: str) -> int:
    """Of the mean over draws, once the spread is known."""
    roots = 1 if damping == "factored" else classes
    turn = 0 if damping == "factored" else classes * (2 * classes - 1)
    draw = classes + turn + classes + softmax(classes)  # scale, turn, add, softmax
    return roots + classes + n_mc * draw + (n_mc - 1) * classes + classes  # roots, z / T, draws, their sum, / n


def probit(classes: int, damping: str) -> int:
    """Of the probit, once the spread is known."""
    variance = classes if damping == "factored" else classes * (2 * classes - 1)
    return variance + 5 * classes + softmax(classes)  # + 1, root, less the maximum, / root, / T


def ensemble(classes: int, exit: int) -> int:
    """Of one exit's part in the ensemble, exits counted from 0: a weight, a sum but at the first, a quotient."""
    return (2 if exit == 0 else 3) * classes
