"""Cholesky factors of matrices that are positive definite but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)


def cholesky(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """The lower factor R of M = R Rᵀ, with as little added to the diagonal as needed.

    Args:
        matrix: [m, m], symmetric but for rounding; worked on in float64.
        name: What it is, for errors, such as "the feature factor of exit 2 (N = 100, D = 64, C = 10)".

    Returns:
        R [m, m], float64, and the jitter: how many times the mean of the diagonal was added to it; 0 if nothing was.

    Raises:
        ValueError: The matrix is not finite, or is singular even with the largest jitter.
    """
    matrix = matrix.double()
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite; look at the features and logits it was made of")
    matrix = (matrix + matrix.mT) / 2
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * matrix.diagonal().mean()
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * unit)
        if not int(failed):
            return factor, jitter
    smallest = float(torch.linalg.eigvalsh(matrix)[0])
    raise ValueError(
        f"{name} is singular: its smallest eigenvalue is {smallest:.3g}, and adding {JITTERS[-1]:g} of the mean "
        "diagonal did not help; fit on more rows or with a smaller prior variance"
    )
