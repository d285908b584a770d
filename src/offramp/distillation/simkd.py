"""A student that ends in its teacher's classifier: SimKD (Chen et al. 2022, arXiv 2203.14001) and DeTT.

A projector takes the student's last states to the shape of the teacher's, and the teacher's own last exit, frozen,
reads them; see `offramp.classifiers.projected`.
"""

from __future__ import annotations

from typing import Any

import torch

from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.projected import ProjectedConfig, ProjectedHead
from offramp.distillation.networks import require_same_classes
from offramp.distillation.states import States


def features_of(teacher: EarlyExitClassifier, rows: Rows, precision: str | None = None) -> States:
    """What a student is to match: the teacher's last maps [N, D, H, W], of texts its pooled states [N, D]."""
    head: Any = teacher.heads[-1]
    return States(teacher, rows, teacher.backbone.num_layers, head.body, precision)


def with_teachers_classifier(
    student: EarlyExitClassifier, teacher: EarlyExitClassifier, shape: torch.Size, seed: int = 0
) -> EarlyExitClassifier:
    """Replace the student's last exit by a projector and its teacher's classifier.

    Returns:
        The student, changed, for rows of `features_of` of this shape; the projector begins by the seed.

    Raises:
        ValueError: They have different classes, or states of different kinds.
    """
    require_same_classes(student.labels, teacher.labels)
    last: Any = teacher.heads[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ProjectedConfig.of(last, tuple(shape))
        head = ProjectedHead(student.backbone, student.head_config.pooling, student.num_classes, config)
    head.take_over(last)
    student.heads[-1] = head
    return student
