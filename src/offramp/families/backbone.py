"""Networks as classifiers take them: blocks that a batch passes one by one, exits on them, and transformers' encoders.

An exit makes features of activations and has a last linear layer on them. Blocks of encoders are those that
`output_hidden_states` counts: layers of a transformer, stages of a ResNet. After block l stands `hidden_states[l]`,
before any final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from offramp.families.sizes import LINEAR
from offramp.families.table import UnsupportedModelError
from offramp.values import choice

Inputs = Tensor | Mapping[str, Tensor]
"""A batch: what a tokenizer or an image processor makes, or the main one of these tensors alone."""
POOLINGS = ("mean", "first")
"""How states [B, T, D] become one vector: the mean over tokens that are not padding, or the first token (CLS)."""
_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_bidirectional_mask,
    "sliding_attention": create_bidirectional_sliding_window_mask,
}


@dataclass(frozen=True)
class Activations:
    """What the rows of a batch carry from block to block.

    Attributes:
        maps: States [B, T, D] of a transformer, feature maps [B, D, H, W] of a convolutional network; several where it
            works at several scales, coarsest last.
        depth: How many blocks made them.
        tokens: True for tokens, False for padding, [B, T]; None: nothing is padded, or these are images.
        masks: What attention is told about padding and windows, by kind of block, each [B, ...], [1, ...] or None.
        rotations: Rotary position embeddings by kind of block, the same for all rows.
    """

    maps: tuple[Tensor, ...]
    depth: int = 0
    tokens: Tensor | None = None
    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    rotations: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hidden(self) -> Tensor:
        """The map that exits read, [B, ...]."""
        return self.maps[-1]

    def take(self, rows: Tensor) -> Activations:
        """Only these rows, [A], int64: the others leave the batch."""
        return replace(
            self,
            maps=tuple(map_[rows] for map_ in self.maps),
            tokens=None if self.tokens is None else self.tokens[rows],
            masks={kind: m if m is None or len(m) == 1 else m[rows] for kind, m in self.masks.items()},
        )


class Backbone(nn.Module):
    """What an early-exit classifier needs of a network; abstract.

    Attributes:
        num_layers: L, how many blocks there are.
        main_input: Name of the input that a bare tensor is.
    """

    num_layers: int
    main_input: str

    def start(self, inputs: Mapping[str, Tensor]) -> Activations:
        """The activations that enter the first block, on the backbone's device."""
        raise NotImplementedError

    def run(self, state: Activations, lo: int, hi: int) -> Activations:
        """Take activations after `lo` blocks to those after `hi`."""
        raise NotImplementedError

    def body(self, layer: int, pooling: str | None) -> tuple[nn.Module, int]:
        """A new module from activations after `layer` blocks, 1..L, to features [B, D], and D; None: usual pooling."""
        raise NotImplementedError

    def mixing_flops(self, inputs: Mapping[str, Tensor]) -> int:
        """FLOPs per row and block outside of linear layers and convolutions: those of attention."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.parameters()).dtype


def autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    """Within, computing is done in bfloat16 for precision "bf16", as outside for None; weights stay as they are."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def rounded(module: nn.Module, precision: str | None) -> Iterator[None]:
    """Inside the block, for "bf16", frozen float32 matrices of linear layers in bfloat16; then the same ones again."""
    # Autocast alone keeps only what learns: a frozen head would be rounded anew for every few hundred positions.
    frozen: list[tuple[Any, Any]] = [] if precision != "bf16" else [
        (part, part.weight) for part in module.modules()
        if isinstance(part, LINEAR) and part.weight.dtype == torch.float32 and not part.weight.requires_grad
    ]  # fmt: skip
    for part, weight in frozen:
        part.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    try:
        yield
    finally:
        for part, weight in frozen:
            part.weight = weight


@contextmanager
def evaluating(module: nn.Module, precision: str | None = None) -> Iterator[None]:
    """No dropout and stored statistics inside the block, precision as for `autocast`; then training as before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with autocast(next(module.parameters()).device, precision):
            yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True)
class HeadConfig:
    """How every exit is built.

    Attributes:
        pooling: One of `POOLINGS`; None: what is usual for the backbone ("first" for ViT, "mean" for texts). Feature
            maps of images are always averaged over their places.
        hidden: Width of a dense layer with tanh between pooling and the last linear layer, as in BERT's own pooler;
            None: none.
        dropout: Of the features in training, in [0, 1).
    """

    pooling: str | None = None
    hidden: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choice("pooling", self.pooling, (None, *POOLINGS))
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; it is a width from 1, or None for no dense layer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it is in [0, 1)")


class ExitOutput(NamedTuple):
    """What one exit says about B rows: what its last linear layer reads, [B, D_e], and logits [B, C]."""

    features: Tensor
    logits: Tensor


class PooledBody(nn.Module):
    """Pooling of states [B, T, D], behind a norm where they have none, or of maps [B, D, H, W], to features [B, D]."""

    def __init__(self, pooling: str, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm: Any = norm if norm is not None else nn.Identity()

    def forward(self, state: Activations) -> Tensor:
        """Features [B, D] of activations."""
        hidden: Tensor = state.hidden
        if hidden.ndim == 4:
            return hidden.mean((2, 3))  # [B, D, H, W] -> [B, D]
        if self.pooling == "first":
            first: Tensor = self.norm(hidden[:, 0])  # [B, T, D] -> [B, D]; the norm looks at one token at a time
            return first
        hidden = self.norm(hidden)
        if state.tokens is None:
            return hidden.mean(1)
        weight = state.tokens[..., None].to(hidden.dtype)  # [B, T, 1]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class ExitHead(nn.Module):
    """One exit of a backbone after `layer` blocks, 1..L, for C classes, built as the config says."""

    def __init__(self, backbone: Backbone, layer: int, classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.body, width = backbone.body(layer, config.pooling)
        dense: list[nn.Module] = []
        if config.hidden is not None:
            dense, width = [nn.Linear(width, config.hidden), nn.Tanh()], config.hidden
        self.dense = nn.Sequential(*dense, nn.Dropout(config.dropout))
        self.linear = nn.Linear(width, classes)
        self.to(device=backbone.device, dtype=backbone.dtype)

    @property
    def width(self) -> int:
        """D_e, the features' length."""
        return self.linear.in_features

    def forward(self, state: Activations) -> ExitOutput:
        """Features [B, D_e] and logits [B, C] of activations at this exit's layer."""
        features: Tensor = self.dense(self.body(state))
        return ExitOutput(features, self.linear(features))


@dataclass(frozen=True)
class EncoderFamily:
    """What differs between encoders, by attribute paths.

    Attributes:
        embeddings: What makes the first states of the inputs.
        blocks: Path to the list of blocks.
        norm: The norm after the last block; None where blocks end with one.
        inputs: Inputs that the embeddings take by name, the main one first.
        pooling: How states become one vector unless told otherwise.
    """

    embeddings: str
    blocks: str
    norm: str | None
    inputs: tuple[str, ...]
    pooling: str


_BERT = EncoderFamily("embeddings", "encoder.layer", None, ("input_ids", "token_type_ids"), "mean")
ENCODERS: dict[str, EncoderFamily] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": EncoderFamily("embeddings", "transformer.layer", None, ("input_ids",), "mean"),
    "modernbert": EncoderFamily("embeddings", "layers", "final_norm", ("input_ids",), "mean"),
    "vit": EncoderFamily("embeddings", "layers", "layernorm", ("pixel_values",), "first"),
    "resnet": EncoderFamily("embedder", "encoder.stages", None, ("pixel_values",), "mean"),
}
"""Supported values of `config.model_type`; MiniLM is a "bert"."""


class SplitEncoder(Backbone):
    """The embeddings and blocks of an encoder, which can stop after any block and go on for some of the rows.

    The modules are the model's own, so training one trains the other; its pooler and heads are left out.

    Args:
        model: An encoder as `AutoModel` loads it, or a model with one inside, such as a `...ForSequenceClassification`.

    Raises:
        UnsupportedModelError: There is no family of that name, or it attends in a way that cannot be run in parts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        model = model.base_model
        config: Any = model.config
        self.config, self.name = config, config.model_type
        if self.name not in ENCODERS:
            raise UnsupportedModelError(
                f"{type(model).__name__} (model type {self.name!r}) is no supported encoder; supported are "
                f"{', '.join(ENCODERS)}"
            )
        if getattr(config, "is_decoder", False) or config._attn_implementation == "flex_attention":
            raise UnsupportedModelError(
                f"{type(model).__name__} attends as a decoder or by flex_attention, which cannot be run in parts; load "
                "it with is_decoder=False and attn_implementation='sdpa'"
            )
        family = self.family = ENCODERS[self.name]
        self.main_input = family.inputs[0]
        self.embeddings: Any = model.get_submodule(family.embeddings)
        self.blocks = nn.ModuleList(model.get_submodule(family.blocks))
        self.rotary: Any = getattr(model, "rotary_emb", None)
        self.num_layers = len(self.blocks)
        self._norm: list[Any] = [model.get_submodule(family.norm)] if family.norm else []  # a list: not our weights
        windowed = self.name == "modernbert"  # a ResNet's `layer_types` are something else
        self.kinds: list[str] = list(config.layer_types) if windowed else ["full_attention"] * self.num_layers

    @property
    def is_text(self) -> bool:
        """Whether the inputs are token ids, not images."""
        return self.main_input == "input_ids"

    def start(self, inputs: Mapping[str, Tensor]) -> Activations:
        """Activations of depth 0 of what the tokenizer or image processor makes; other inputs are not looked at."""
        given = {name: self._placed(inputs[name]) for name in self.family.inputs if inputs.get(name) is not None}
        hidden = self.embeddings(**given)  # [B, T, D], or [B, D, H, W] of a ResNet
        if not self.is_text:
            return Activations((hidden,), masks=dict.fromkeys(self.kinds))
        tokens = inputs.get("attention_mask")
        tokens = None if tokens is None else tokens.to(self.device, non_blocking=True).bool()
        build = {"config": self.config, "inputs_embeds": hidden, "attention_mask": tokens}
        masks = {kind: _MASKS[kind](**build) for kind in set(self.kinds)}
        rotations = {}
        if self.rotary is not None:
            places = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rotations = {kind: self.rotary(hidden, places, kind) for kind in masks}
        return Activations((hidden,), tokens=tokens, masks=masks, rotations=rotations)

    def _placed(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype, non_blocking=True)

    def run(self, state: Activations, lo: int, hi: int) -> Activations:
        """Take states after `lo` blocks to those after `hi`."""
        hidden = state.hidden
        for index in range(lo, hi):
            hidden = self._block(index, hidden, state)
        return replace(state, maps=(hidden,), depth=hi)

    def _block(self, index: int, hidden: Tensor, state: Activations) -> Tensor:
        block, kind = self.blocks[index], self.kinds[index]
        if self.name == "resnet":
            output = block(hidden)
        elif self.rotary is not None:
            output = block(
                hidden, attention_mask=state.masks[kind], position_embeddings=state.rotations[kind]
            )  # by keyword: their order differs between versions
        else:
            output = block(hidden, state.masks[kind])
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def body(self, layer: int, pooling: str | None) -> tuple[nn.Module, int]:
        """Pooling, behind a copy of the final norm where the network has one; it is trained with the exit."""
        norm = copy.deepcopy(self._norm[0]) if self._norm else None
        width = self.config.hidden_sizes[layer - 1] if self.name == "resnet" else self.config.hidden_size
        return PooledBody(pooling or self.family.pooling, norm), int(width)

    def mixing_flops(self, inputs: Mapping[str, Tensor]) -> int:
        """Scores and weighted sums of attention, 4 T^2 D; windows are counted in full, as they are computed."""
        if self.name == "resnet":
            return 0
        if self.is_text:
            length = inputs[self.main_input].shape[1]
        else:
            length = self.embeddings.patch_embeddings.num_patches + 1
        return 4 * int(length) ** 2 * int(self.config.hidden_size)
