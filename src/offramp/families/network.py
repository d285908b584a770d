"""A model taken apart: its blocks, norm and head, blocks called from outside, and those of exits beside them.

Masks, positions, rotations and biases are as the model itself makes them; what all blocks of a kind share is computed
once per frame and kept in its memo. A block of an exit's own is like one of the model's last blocks, with the exit's
weights in it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_bidirectional_mask

from offramp.families.state import Context, Frame
from offramp.families.table import FAMILIES, UnsupportedModelError, layers_of, strange_types, without_a_family

Edit = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, states before its block, states after it) -> states after it, [B, T, D] each."""

_CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # since transformers 5.24, until then, in GPT-NeoX
_LAST = {"o_proj", "out_proj", "dense", "c_proj", "o", "down_proj", "fc2", "dense_4h_to_h", "wo"}
"""What families call the matrices whose products are added to the state."""


def cache_name(*functions: Callable[..., Any]) -> str:
    """What the first of the functions that has one calls the argument for the cache: releases and models differ."""
    for function in functions:  # not version numbers: a deprecated name is accepted for a while, with a warning
        parameters = inspect.signature(function).parameters
        for name in _CACHE_NAMES:
            if name in parameters:
                return name
    return _CACHE_NAMES[0]


class Network:
    """The parts of a Hugging Face model of a supported family, which is left as it is: see `SplitModel`."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        name = config.model_type
        if name not in FAMILIES:
            raise without_a_family(model)
        self.model, self.family, self.name = model, FAMILIES[name], name
        try:
            self.decoder: Any = model.get_submodule(self.family.decoder)
            self.head: Any = model.get_submodule(self.family.head)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language-modelling head to read out with; load the model of type "
                f"{name!r} with its ...ForCausalLM or ...ForConditionalGeneration class"
            ) from error
        self.blocks: list[Any] = list(getattr(self.decoder, self.family.layers))  # behind them, those of branches
        self.num_layers = len(self.blocks)
        self.branches: dict[int, range] = {}  # the numbers of the blocks that an exit has of its own, by its layer
        self.cache_name = cache_name(self.blocks[0].forward, self.decoder.forward)
        self.is_encoder_decoder = self.family.cross is not None
        places = {p.device for p in model.parameters()}
        if len(places) > 1 or torch.device("meta") in places:
            raise UnsupportedModelError(
                f"the model lies on {', '.join(sorted(map(str, places)))}; load it whole on one device, not offloaded"
            )
        self.config: Any = self.decoder.config
        self.types, self.windows = self._layer_types()
        self.norm = self._part(self.family.norm)
        self.dropout = self._part(self.family.dropout)  # acts in training only
        self.squeeze = self._part(self.family.squeeze)
        self.scale = self.family.scale(config)
        rotary = getattr(self.decoder, "rotary_emb", None)
        self.rotary: Any = rotary
        self.rotary_by_type = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    def _part(self, name: str | None) -> Any:
        """A module of the decoder; one that does nothing where there is none of that name."""
        return (getattr(self.decoder, name) if name else None) or nn.Identity()

    def _layer_types(self) -> tuple[list[str], list[int | None]]:
        """Attention type and sliding window of every block."""
        if self.is_encoder_decoder:
            return ["full_attention"] * self.num_layers, [None] * self.num_layers
        if strange := strange_types(self.config):
            raise UnsupportedModelError(f"{type(self.model).__name__} is not supported: {layers_of(strange)}")
        types, options = get_layer_types_and_kwargs(self.config)
        return list(types), [option.get("sliding_window") for option in options]

    @property
    def rotary_changes(self) -> bool:
        """Whether the rotary frequencies change with the length of the text."""
        ropes = str(getattr(self.config, "rope_parameters", ""))
        return "dynamic" in ropes or "longrope" in ropes

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def head_is_plain(self) -> bool:
        """Whether the head is an ordinary linear layer, so that single rows of it can be read out."""
        return type(self.head) is nn.Linear

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the decoder has positions for, in tokens; None if unlimited (T5)."""
        names = ("max_target_positions", "max_position_embeddings")
        return next((int(v) for name in names if (v := getattr(self.config, name, None))), None)


def states_after(
    split: Network,
    ids: Tensor,
    layers: Sequence[int],
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    edit: Edit | None = None,
) -> list[Tensor]:
    """Residual states after some layers, by one pass of the model's own code; arguments as for `SplitModel.states`."""
    found: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., Any]:
        def after(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if edit is not None:
                hidden = edit(layer, inputs[0] if inputs else keywords["hidden_states"], hidden)
            found[layer] = hidden
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return after

    own = split.blocks[: split.num_layers]
    hooks = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(own, 1)]
    try:
        cross = {}
        if split.is_encoder_decoder:
            mask = None if split.family.listens else {"encoder_attention_mask": memory_mask}
            cross = {"encoder_hidden_states": memory, **(mask or {})}
        split.decoder(input_ids=ids, use_cache=False, **cross)
    finally:
        for each in hooks:
            each.remove()
    return [found[layer] for layer in layers]


def acting(module: nn.Module) -> Iterator[object]:
    """What is called beside a module's code, but for the hooks by which transformers collects outputs."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    yield from (hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers."))
    if "forward" in vars(module):
        yield vars(module)["forward"]


_builders_cache_name = cache(cache_name)  # only ever asked of transformers' own functions, so nothing is kept alive


def run_block(split: Network, index: int, hidden: Tensor, frame: Frame, context: Context) -> Tensor:
    """States [A, n, D] after block `index`, counted from 0; its keys and values go into the context's cache."""
    layer_cache: Any = context.cache.layers[index]
    layer_cache.rows, layer_cache.length = frame.rows, frame.start
    kind = split.types[index]
    block, mask = split.blocks[index], _mask(split, kind, index, hidden, frame, context)
    if split.family.cross is None:
        return block(  # type: ignore[no-any-return]
            hidden,
            attention_mask=mask,
            position_ids=_positions(frame, context),
            position_embeddings=_rope(split, kind, hidden, frame, context),
            **{split.cache_name: context.past},
        )
    _prepare_cross(split, index, frame, context)
    arguments = {
        "attention_mask": mask,
        "encoder_hidden_states": context.memory,
        "encoder_attention_mask": _cross_mask(split, hidden, frame, context),
        split.cache_name: context.past,
    }
    if split.family.position_bias is not None:
        return block(hidden, position_bias=_bias(split, frame), **arguments)[0]  # type: ignore[no-any-return]
    return block(hidden, **arguments)  # type: ignore[no-any-return]


def _prepare_cross(split: Network, index: int, frame: Frame, context: Context) -> None:
    """Cross-attention keys and values, for all rows, at the first visit of a block."""
    past: Any = context.past
    layer_cache = past.cross_attention_cache.layers[index]
    if index not in context.crossed:
        assert split.family.cross is not None
        assert context.memory is not None
        layer_cache.update(*split.family.cross(split.blocks[index], context.memory))
        past.is_updated[index] = True
        context.crossed.append(index)
    layer_cache.rows = frame.rows


def _mask(split: Network, kind: str, index: int, hidden: Tensor, frame: Frame, context: Context) -> Any:
    if ("mask", kind) not in frame.memo:
        padding = context.padding
        if padding is not None:
            padding = padding[frame.rows, : frame.start + frame.queries]
        build: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        frame.memo["mask", kind] = build(
            config=split.config,
            inputs_embeds=hidden,
            attention_mask=padding,
            position_ids=_positions(frame, context),
            layer_idx=index,
            **{_builders_cache_name(build): context.cache},
        )
    return frame.memo["mask", kind]


def _cross_mask(split: Network, hidden: Tensor, frame: Frame, context: Context) -> Any:
    if context.memory_mask is None or split.family.listens:  # to all of its padded input
        return None
    if ("mask", "cross") not in frame.memo:
        frame.memo["mask", "cross"] = create_bidirectional_mask(
            config=split.config,
            inputs_embeds=hidden,
            attention_mask=context.memory_mask[frame.rows],
            encoder_hidden_states=context.memory[: len(hidden)],  # type: ignore[index] # only its shape is used
        )
    return frame.memo["mask", "cross"]


def _rope(split: Network, kind: str, hidden: Tensor, frame: Frame, context: Context) -> Any:
    key = ("rope", kind if split.rotary_by_type else "")
    if key not in frame.memo:
        frame.memo[key] = rotation(split, kind, hidden, _positions(frame, context))
    return frame.memo[key]


def rotation(split: Network, kind: str, hidden: Tensor, positions: Tensor) -> Any:
    """Cosines and sines for blocks of a kind; None for models without rotary positions."""
    if split.rotary is None:
        return None
    return split.rotary(hidden, positions, *([kind] if split.rotary_by_type else []))


def _bias(split: Network, frame: Frame) -> Tensor:
    """T5's relative position bias, which the first block owns and all blocks share, [1, H, n, T]."""
    if ("bias", "") not in frame.memo:
        attention = split.blocks[0].get_submodule(split.family.position_bias)
        frame.memo["bias", ""] = attention.compute_bias(
            frame.queries, frame.start + frame.queries, device=split.device, past_seen_tokens=frame.start
        )
    return frame.memo["bias", ""]  # type: ignore[no-any-return]


def _positions(frame: Frame, context: Context) -> Tensor:
    """Positions of a frame's tokens, [A, n]."""
    if ("positions", "") not in frame.memo:
        frame.memo["positions", ""] = context.positions[frame.rows, frame.start : frame.start + frame.queries]
    positions: Tensor = frame.memo["positions", ""]
    return positions


def blocks_of(split: Network, exits: Any) -> tuple[list[tuple[int, Any]], dict[int, range]]:
    """Modules of all branches, with the model's block each is like; by exit layer (0: the drafter) their numbers."""
    made: list[tuple[int, Any]] = []
    found: dict[int, range] = {}
    branches: dict[int, Any] = {int(name): branch for name, branch in exits.branches.items()}
    if exits.drafter is not None:
        branches[0] = exits.drafter.branch
    for layer, branch in branches.items():
        tensors: list[dict[str, nn.Parameter]] = branch.blocks()
        first = split.num_layers + len(made)
        found[layer] = range(first, first + len(tensors))
        for like, weights in enumerate(tensors, split.num_layers - len(tensors)):
            block = _with(split.blocks[like], weights, split, layer)
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = split.num_layers + len(made)
            made.append((like, block))
    return made, found


def first_weights(split: Network, count: int) -> list[dict[str, Tensor]]:
    """Weights of the last `count` blocks, float32, zeros where a sublayer adds to the state: they leave it alone."""
    blocks = split.blocks[split.num_layers - count : split.num_layers]
    return [{name: _quiet(name, p.detach().float()) for name, p in block.named_parameters()} for block in blocks]


def _quiet(name: str, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if _LAST.intersection(name.split(".")) else weight.clone()


def _with(block: Any, weights: Mapping[str, nn.Parameter], split: Network, layer: int) -> Any:
    """A copy of a block with other weights; nothing that hangs on the block is called by it."""
    own = dict(block.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in weights.items()}:
        raise ValueError(
            f"the blocks of the exit after layer {layer} have other weights than block {split.num_layers} of the "
            "model; attach exits that were made for it"
        )
    instead = {id(p): weights[n] for n, p in own.items()}
    made = copy.deepcopy(block, {**instead, id(split.config): split.config})
    for module in made.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return made
