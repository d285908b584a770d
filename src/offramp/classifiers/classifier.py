"""A classifier with exits at several depths, and inference that leaves by the first that is sure."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from offramp.classifiers.exits import exit_costs, measure_of
from offramp.families.backbone import Backbone, ExitHead, ExitOutput, HeadConfig, Inputs, SplitEncoder, evaluating
from offramp.families.finite import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offramp.uncertainty.outputs import ExitOutputs


class Posterior(Protocol):
    """Calibrated probabilities, exit by exit; see `offramp.uncertainty`."""

    def at(self, exit: int, features: Tensor, logits: Tensor, carried: Any, /) -> tuple[Tensor, Any]:
        """Probabilities [A, C] at an exit (from 0), and what later exits need of this one.

        `carried` is None at the first exit; else it is what came back from the one before, for the rows still in: a
        tensor [A, ...], or a tuple of such and None.
        """
        ...


@dataclass(frozen=True)
class Classification:
    """What B rows were classified as, each at the exit it left by.

    Attributes:
        classes: The most probable class, [B], int64.
        probabilities: At the exit taken, [B, C], of the posterior's number format; float32 without one.
        confidence: The same exit's, [B].
        exits: Which exit was taken, 0..E-1, [B], int64.
    """

    classes: Tensor
    probabilities: Tensor
    confidence: Tensor
    exits: Tensor


# ---------------------------------------------------------------- the classifier


class EarlyExitClassifier(nn.Module):
    """A backbone with a classifier behind some of its blocks, always also behind the last.

    Args:
        backbone: The blocks.
        exits: Layers after which there is an exit besides the last, ascending in 1..L-1.
        num_classes: C; may be left out if there are labels.
        labels: Names of the classes; None: "0", "1", ..
        head: How the exits are built.
        tokenizer: Tokenizer of texts, kept and saved with the model.
        preprocessing: Settings that images are prepared with, under the names of `preprocessor_config.json`
            (`image_mean`, `image_std`, `size`, ..), kept and saved with the model.

    Attributes:
        trained_on: How its data was read and divided, as `offramp.classifiers.splits` records it, kept and saved with
            the model; empty: unknown.
        training_rows: Its training rows as `offramp.tasks.labelled.row_hashes` knows them, [N], kept and saved
            likewise; None: unknown.

    Raises:
        ValueError: The exits, the classes or the labels are not possible.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[int],
        num_classes: int | None = None,
        *,
        labels: Sequence[str] | None = None,
        head: HeadConfig | None = None,
        tokenizer: Any = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layers = (*check_exits(exits, backbone.num_layers), backbone.num_layers)
        self.labels = check_labels(num_classes, labels)
        self.head_config = head or HeadConfig()
        self.tokenizer, self.preprocessing = tokenizer, dict(preprocessing or {})
        self.trained_on: dict[str, Any] = {}
        self.training_rows: Tensor | None = None
        self.backbone = backbone
        self.heads = nn.ModuleList(
            ExitHead(backbone, layer, self.num_classes, self.head_config) for layer in self.layers
        )
        # weights of convolutions: 1.3 to 1.7 times as fast on CPUs
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_encoder(
        cls,
        source: str | os.PathLike[str] | PreTrainedModel,
        exits: Sequence[int],
        num_classes: int | None = None,
        *,
        labels: Sequence[str] | None = None,
        head: HeadConfig | None = None,
        tokenizer: Any = None,
    ) -> EarlyExitClassifier:
        """Untrained exits on a Hugging Face encoder: BERT, DistilBERT, RoBERTa, ModernBERT, MiniLM, ViT or ResNet.

        The exits' last linear layers are drawn at random: seed torch for the same ones.

        Args:
            source: Packaged name ("minilm"), local folder or hub id; or a model, whose blocks become those of the
                classifier, so that training changes it.
            exits: Layers after which there is an exit besides the last, ascending in 1..L-1; for a ResNet stages.
            num_classes: C; may be left out if there are labels.
            labels: Names of the classes.
            head: How the exits are built.
            tokenizer: For a model; one in a folder or on the hub is loaded with the encoder.

        Returns:
            The classifier in float32, in training mode as new modules are.

        Raises:
            ValueError: The exits, the classes or the labels are not possible.
            ModelError: There is no such encoder, or it is damaged.
            UnsupportedModelError: There is no family for it.
        """
        check_labels(num_classes, labels)  # before the encoder, which takes longer
        preprocessing: dict[str, Any] = {}
        if isinstance(source, str | os.PathLike):
            from offramp.classifiers.saving import load_encoder

            source, found, preprocessing = load_encoder(source)
            tokenizer = tokenizer or found
        options = {"labels": labels, "head": head, "tokenizer": tokenizer, "preprocessing": preprocessing}
        return cls(SplitEncoder(source), exits, num_classes, **options)

    @classmethod
    def msdnet(
        cls,
        size: str,
        num_classes: int | None = None,
        *,
        labels: Sequence[str] | None = None,
        image_size: int = 32,
        in_channels: int = 3,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> EarlyExitClassifier:
        """An untrained MSDNet of a published size with an exit behind every block; see `MSDNetConfig.published`.

        Args:
            size: "small", "medium" or "large".
            num_classes: C; may be left out if there are labels.
            labels: Names of the classes.
            image_size: 32 or 224.
            in_channels: 1 (grey) or 3 (colour).
            preprocessing: Settings that images are prepared with.

        Returns:
            The classifier in float32; its weights are drawn at random: seed torch for the same ones.
        """
        from offramp.classifiers.convolutional import MSDNet, MSDNetConfig

        backbone = MSDNet(MSDNetConfig.published(size, image_size, in_channels))
        return cls(backbone, range(1, backbone.num_layers), num_classes, labels=labels, preprocessing=preprocessing)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and inputs are moved to."""
        return self.backbone.device

    # ------------------------------------------------------------ all exits

    def forward(self, inputs: Inputs) -> list[ExitOutput]:
        """Features and logits of all E exits, for training them jointly.

        Args:
            inputs: B rows.

        Returns:
            One pair per exit, features [B, D_e] and logits [B, C], in the weights' number format.
        """
        state, done, outputs = self.backbone.start(self._named(inputs)), 0, []
        for layer, head in zip(self.layers, self.heads, strict=True):
            state, done = self.backbone.run(state, done, layer), layer
            outputs.append(head(state))
        return outputs

    def costs(self, inputs: Inputs | None = None, *, cut: bool = False) -> Tensor:
        """FLOPs of one row up to and including each exit, all heads on the way counted.

        Args:
            inputs: A batch of the length or image size asked for; None: images of the size the backbone is made for.
            cut: Whether to give those of networks cut after each exit, static exits, without the heads before it. The
                last of these is the plain full network, which savings and budgets are relative to.

        Returns:
            [E], float64, ascending.

        Raises:
            ValueError: None was given for texts, whose cost depends on their length.
        """
        found = exit_costs(self, self._example() if inputs is None else self._named(inputs))
        return found.cut if cut else found.heads

    def outputs(
        self,
        batches: Iterable[tuple[Inputs, Tensor]],
        *,
        ids: Sequence[str] = (),
        groups: Tensor | None = None,
        path: str | os.PathLike[str] | None = None,
        description: Mapping[str, str] | None = None,
    ) -> ExitOutputs:
        """What all exits say about a split, from one pass over it; see `offramp.classifiers.outputs.collect`."""
        from offramp.classifiers.outputs import collect

        return collect(self, batches, ids=ids, groups=groups, path=path, description=description)

    # ------------------------------------------------------------ leaving early

    @torch.no_grad()
    def classify(
        self,
        inputs: Inputs,
        posterior: Posterior | None = None,
        thresholds: float | Sequence[float] | Tensor | None = None,
        confidence: str | Callable[[Tensor], Tensor] = "max",
    ) -> Classification:
        """Classify each row at the first exit whose confidence is above its threshold.

        Blocks behind an exit run only for the rows that did not leave there, and not at all when none is left. The
        same exits as choosing afterwards from all of them. There is one synchronisation with the device per exit.

        Args:
            inputs: B rows.
            posterior: What makes probabilities of features and logits, given in float32; None: softmax.
            thresholds: One for all exits, or one per exit, E or E-1 of them: a row leaves where its confidence is
                strictly above; the last exit takes all that are left. None: no row leaves before it.
            confidence: A name in `CONFIDENCES`, or a function [A, C] -> [A]; NaN does not leave.

        Returns:
            The answers, in the order of the rows.

        Raises:
            ValueError: The thresholds or the confidence are not possible.
            not_finite: The logits of an exit that rows came to hold NaN or infinity.
        """
        measure = measure_of(confidence)
        limits = _limits(thresholds, len(self.layers))
        with evaluating(self):
            state, done = self.backbone.start(self._named(inputs)), 0
            left = torch.arange(len(state.hidden), device=state.hidden.device)  # [A], the rows still in
            exits, carried = torch.zeros_like(left), None
            probabilities, sure = torch.empty(0), torch.empty(0)
            sound = torch.ones((), dtype=torch.bool, device=left.device)
            for exit_, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
                state, done = self.backbone.run(state, done, layer), layer
                features, logits = (x.float() for x in head(state))
                sound = sound & logits.isfinite().all()
                if posterior is None:
                    p = logits.softmax(-1)
                else:
                    p, carried = posterior.at(exit_, features, logits, carried)
                c = measure(p)
                if exit_ == 0:
                    probabilities, sure = p.clone(), c.clone()
                else:  # over what these rows wrote at the exit before
                    exits[left], probabilities[left], sure[left] = exit_, p, c
                if exit_ == len(limits):
                    break
                stay = (~(c > limits[exit_])).nonzero()[:, 0]  # the one synchronisation
                if len(stay) == 0:
                    break
                if len(stay) < len(left):
                    left, state, carried = left[stay], state.take(stay), take(carried, stay)
        if not bool(sound):
            raise not_finite("the classifier", "in the logits of an exit", self.backbone.dtype)
        return Classification(probabilities.argmax(-1), probabilities, sure, exits)

    # ------------------------------------------------------------ files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the classifier to a new folder, or over an older classifier; see `offramp.classifiers.saving`."""
        from offramp.classifiers.saving import save

        save(self, folder)

    # ------------------------------------------------------------ inputs

    def _named(self, inputs: Inputs) -> Mapping[str, Tensor]:
        main = self.backbone.main_input
        named = {main: inputs} if isinstance(inputs, Tensor) else inputs
        if main not in named:
            raise ValueError(f"inputs have {', '.join(named) or 'nothing'}; this classifier needs {main}")
        if not len(named[main]):
            raise ValueError("there are no rows; give at least one")
        return named

    def _example(self) -> dict[str, Tensor]:
        """One row of images, of which only the shape is looked at."""
        config: Any = getattr(self.backbone, "config", None)
        if self.backbone.main_input != "pixel_values" or not hasattr(config, "image_size"):
            raise ValueError("what a row costs depends on its size; give inputs of the size asked for")
        channels = config.in_channels if hasattr(config, "in_channels") else config.num_channels
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.empty((1, channels, *sides), device="meta")}


def take(carried: Any, rows: Tensor) -> Any:
    """Only these rows of what a posterior carries: a tensor [A, ...], None, or a tuple of such."""
    if isinstance(carried, tuple):
        return tuple(take(part, rows) for part in carried)
    return None if carried is None else carried[rows]


def check_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Ascending exit layers in 1..L-1; a ValueError for anything else."""
    layers = tuple(exits)
    if any(type(layer) is not int for layer in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(f"exits are {layers}; give ascending layers, each once")
    if layers and not 1 <= layers[0] <= layers[-1] < num_layers:
        raise ValueError(
            f"exits are {layers}; a network of {num_layers} layers can have exits after layers 1..{num_layers - 1} "
            f"(layer {num_layers} is always an exit, leave it out)"
        )
    return layers


def check_labels(num_classes: int | None, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Names of two classes or more, or their numbers; a ValueError if they repeat or are not `num_classes`."""
    if labels is None:
        if num_classes is None:
            raise ValueError("neither num_classes nor labels are given; give one of them")
        labels = [str(i) for i in range(num_classes)]
    names = tuple(labels)
    if num_classes is not None and len(names) != max(num_classes, 0):
        raise ValueError(f"there are {len(names)} labels for {num_classes} classes; give one name per class")
    if len(names) < 2:
        raise ValueError(f"there are {num_classes or len(names)} classes; a classifier needs at least 2")
    if len(set(names)) < len(names):
        raise ValueError(f"labels repeat: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    return names


def _limits(thresholds: float | Sequence[float] | Tensor | None, exits: int) -> list[float]:
    """A threshold for each exit but the last."""
    if thresholds is None:
        return [math.inf] * (exits - 1)
    if isinstance(thresholds, Tensor):
        thresholds = thresholds.tolist()
    if isinstance(thresholds, int | float):
        return [float(thresholds)] * (exits - 1)
    if len(thresholds) not in (exits - 1, exits):
        raise ValueError(
            f"there are {len(thresholds)} thresholds for {exits} exits; give one per exit, or leave out the last"
        )
    return [float(threshold) for threshold in thresholds[: exits - 1]]
