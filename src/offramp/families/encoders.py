"""Transformers' encoders as start / run(lo, hi), for classifiers.

Blocks are those that `output_hidden_states` counts: layers of a transformer, stages of a ResNet. After block l stands
`hidden_states[l]`, before any final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from offramp.families.backbone import Activations, Backbone, PooledBody
from offramp.families.table import UnsupportedModelError

_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_bidirectional_mask,
    "sliding_attention": create_bidirectional_sliding_window_mask,
}


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
FAMILIES: dict[str, EncoderFamily] = {
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
        if self.name not in FAMILIES:
            raise UnsupportedModelError(
                f"{type(model).__name__} (model type {self.name!r}) is no supported encoder; supported are "
                f"{', '.join(FAMILIES)}"
            )
        if getattr(config, "is_decoder", False) or config._attn_implementation == "flex_attention":
            raise UnsupportedModelError(
                f"{type(model).__name__} attends as a decoder or by flex_attention, which cannot be run in parts; load "
                "it with is_decoder=False and attn_implementation='sdpa'"
            )
        family = self.family = FAMILIES[self.name]
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
