"""A student that ends in its teacher's classifier: SimKD (Chen et al. 2022, arXiv 2203.14001) and DeTT.

A projector takes the student's last states to the shape of the teacher's, and the teacher's own last exit, frozen,
reads them. The projector is part of the deployed model, so costs count it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.backbone import Activations, evaluating
from offramp.classifiers.batches import Rows
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.heads import ExitHead, ExitOutput


class Projected(ExitOutput):
    """What the exit says, and what is to be like the teacher's.

    Attributes:
        matched: Projected maps [B, D, H, W], of texts vectors [B, D].
    """

    matched: Tensor


class ProjectedHead(nn.Module):
    """The student's new last exit. It is trained but for the teacher's part, which stays in evaluation mode.

    Images: 1 x 1, 3 x 3 and 1 x 1 convolutions with batch norm and ReLU, a bottleneck in between. Texts (ours): linear,
    GELU, linear on the pooled state.

    Args:
        body: Of the student's own last exit, which pools texts.
        width: Of the student's last states.
        teacher: Whose classifier it is.
        shape: Of a row of the teacher's `features_of`.
        factor: By which the bottleneck is narrower than the teacher's states.
    """

    def __init__(self, body: nn.Module, width: int, teacher: ExitHead, shape: torch.Size, *, factor: int = 2) -> None:
        super().__init__()
        outs = shape[0]
        inner = max(outs // factor, 1)
        self.images = len(shape) == 3
        self.side = tuple(shape[1:])
        self.body: Any = nn.Identity() if self.images else body
        if self.images:
            layers: list[nn.Module] = []
            for a, b, kernel in ((width, inner, 1), (inner, inner, 3), (inner, outs, 1)):
                layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            self.projector = nn.Sequential(*layers)
        else:
            self.projector = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outs))
        self.classifier = copy.deepcopy(teacher).requires_grad_(False)

    @property
    def linear(self) -> nn.Linear:
        """The teacher's last layer."""
        return self.classifier.linear

    @property
    def width(self) -> int:
        """Length of the features."""
        return self.linear.in_features

    def train(self, mode: bool = True) -> ProjectedHead:
        """Training mode, but for the teacher's part."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, state: Activations) -> ExitOutput:
        """Features, logits and what is matched."""
        if self.images:
            hidden = state.hidden
            if hidden.shape[2] > self.side[0]:
                hidden = F.adaptive_avg_pool2d(hidden, self.side)  # type: ignore[arg-type]
            matched = self.projector(hidden)
            features = self.classifier.dense(self.classifier.body(Activations((matched,), state.depth)))
        else:
            matched = self.projector(self.body(state))
            features = self.classifier.dense(matched)
        found = Projected(features, self.linear(features))
        found.matched = matched
        return found


@torch.no_grad()
def features_of(teacher: EarlyExitClassifier, rows: Rows, chunk: int = 256) -> Tensor:
    """What a student is to match: the teacher's last maps [N, D, H, W], of texts its pooled states [N, D]."""
    found: list[Tensor] = []
    head: Any = teacher.heads[-1]
    main, depth = teacher.backbone.main_input, teacher.backbone.num_layers
    with evaluating(teacher):
        for places in torch.split(torch.arange(len(rows.data)), chunk):
            given = rows.inputs(places)
            named = {main: given} if isinstance(given, Tensor) else given
            state = teacher.backbone.run(teacher.backbone.start(named), 0, depth)
            found.append(state.hidden if state.hidden.ndim == 4 else head.body(state))
    return torch.cat(found)


def with_teachers_classifier(
    student: EarlyExitClassifier, teacher: EarlyExitClassifier, shape: torch.Size
) -> EarlyExitClassifier:
    """Replace the student's last exit by a projector and its teacher's classifier.

    Args:
        student: Changed.
        teacher: Copied from.
        shape: Of a row of `features_of`.

    Returns:
        The student.

    Raises:
        ValueError: They have different classes.
    """
    require_same_classes(student.labels, teacher.labels)
    last: Any = student.heads[-1]
    width = last.body(_probe(student)).shape[1] if len(shape) == 1 else _channels(student)
    head = ProjectedHead(last.body, width, teacher.heads[-1], shape)  # type: ignore[arg-type]
    student.heads[-1] = head.to(device=student.device, dtype=student.backbone.dtype)
    return student


def require_same_classes(student: tuple[str, ...], teacher: tuple[str, ...]) -> None:
    """Raise a ValueError that names the first class in which teacher and student differ."""
    for number in range(max(len(student), len(teacher))):
        own, other = (names[number] if number < len(names) else None for names in (student, teacher))
        if own != other:
            raise ValueError(
                f"class {number} is {own!r} for the student and {other!r} for the teacher; both need the same classes "
                "in the same order"
            )


def _channels(student: EarlyExitClassifier) -> int:
    backbone: Any = student.backbone
    return int(backbone.widths[-1] if hasattr(backbone, "widths") else backbone.config.hidden_sizes[-1])


def _probe(student: EarlyExitClassifier) -> Activations:
    """A state of one token, for its width."""
    width = int(student.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return Activations((torch.zeros(1, 1, width, device=student.device, dtype=student.backbone.dtype),))
