"""Rows of a made-up early-exit classifier: exits get better with depth, and are too sure of themselves."""

import torch

from offramp.uncertainty.outputs import ExitOutputs


def make_rows(n=200, *, exits=3, classes=5, width=8, first=0, sharp=3.0, seed=0):
    """N rows; with another `first` they are others, of the same classifier."""
    network = torch.Generator().manual_seed(1)
    heads = torch.randn(exits, width, classes, generator=network)
    centres = torch.randn(classes, width, generator=network)
    random = torch.Generator().manual_seed(1000 * seed + first)
    labels = torch.randint(classes, (n,), generator=random)
    features, logits = [], []
    for e in range(exits):
        f = centres[labels] * (0.4 + 0.3 * e) + torch.randn(n, width, generator=random)
        features.append(f)
        logits.append(sharp * (f @ centres.T + 0.1 * f @ heads[e]) / width**0.5)
    costs = torch.tensor([2.0**e for e in range(exits)], dtype=torch.float64)
    return ExitOutputs(features, torch.stack(logits), labels, costs, tuple(f"row {first + i}" for i in range(n)))
