"""toy-gaussian: one coordinate that carries the label with noise, one that carries the attribute, and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from offramp.metrics.group_members import Groups
from offramp.tasks.group_sets import Grouped, GroupedSet
from offramp.tasks.labelled import Labelled
from offramp.tasks.stand_ins import agreeing

if TYPE_CHECKING:
    from offramp.tasks.labelled_inputs import Images

VALUES = ("0", "1")


def toy_gaussian(
    *,
    agreement: float = 0.97,
    seed: int = 0,
    train: int = 2000,
    val: int = 800,
    test: int = 4000,
    dimensions: int = 10,
    core: float = 3.0,
    spurious: float = 4.0,
) -> GroupedSet:
    """Vectors in which an attribute is easier to see than the label.

    Validation and test rows are balanced over the four groups.

    Args:
        agreement: Share of the training rows of each class whose attribute equals the label, in (0, 1).
        seed: Of everything.
        train: Training rows.
        val: Validation rows.
        test: Test rows.
        dimensions: Length of a vector, at least 2.
        core: Distance between the classes, in standard deviations of the noise.
        spurious: Distance between the values of the attribute, likewise.

    Returns:
        Vectors [dimensions], float32, an array [N, dimensions] where others have images.

    Raises:
        ValueError: Fewer than two dimensions, or the agreement leaves a group of training rows empty.
    """
    if dimensions < 2:
        raise ValueError(f"toy-gaussian: dimensions is {dimensions}; two are the least, label and attribute")
    draw = np.random.default_rng(seed)
    splits = {}
    for name, rows, share in (("train", train, agreement), ("val", val, 0.5), ("test", test, 0.5)):
        labels = draw.permutation(np.arange(rows) % 2)
        attribute = agreeing(labels, share, draw)
        vectors = draw.normal(0, 1, (rows, dimensions))
        vectors[:, 0] += core * (labels - 0.5)
        vectors[:, 1] += spurious * (attribute - 0.5)
        y, a = torch.from_numpy(labels), torch.from_numpy(attribute)
        ids = tuple(f"{name}-{row}" for row in range(rows))
        labelled = Labelled(ids, cast("Images", vectors.astype(np.float32)), y, VALUES, source=name)
        splits[name] = Grouped.of(labelled, {"spurious": a}, Groups.crossed(y, VALUES, a, VALUES))
    made = GroupedSet("toy-gaussian", splits, f"generated, agreement {agreement:g}, seed {seed}")
    made.require_groups("train")
    return made
