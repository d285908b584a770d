"""A small network trained plainly or balanced over groups, to see how hard a set is."""

import numpy as np
import torch
from torch import nn


def cnn(classes=2, width=8):
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, classes),
    )  # fmt: skip


def tensor_of(rows):
    """Vectors as they are, images [N, H, W, 3] as [N, 3, H, W] in [0, 1]."""
    array = torch.from_numpy(np.asarray(rows.inputs))
    return array if array.ndim == 2 else array.permute(0, 3, 1, 2).float() / 255


def trained(data, balanced, seed, *, network, epochs, batch=64):
    """Accuracy of each test group after training with Adam at a constant rate."""
    torch.manual_seed(seed)
    x, y, groups = tensor_of(data.train.rows), data.train.rows.labels, data.train.rows.groups
    model = network()
    model(x[:2])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    weights = 1 / torch.bincount(groups).double()[groups]
    for _ in range(epochs):
        order = torch.multinomial(weights, len(x), replacement=True) if balanced else torch.randperm(len(x))
        for rows in order.split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    with torch.no_grad():
        right = (model(tensor_of(data.test.rows)).argmax(1) == data.test.rows.labels).double()
    return (right @ data.test.groups.members.double() / data.test.groups.counts).numpy()
