"""A model taken apart: its blocks, norm, head and what calling them from outside needs to know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from offramp.families.refusal import UnsupportedModelError, layers_of, strange_types, without_a_family
from offramp.families.table import FAMILIES

Edit = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, states before its block, states after it) -> states after it, [B, T, D] each."""

_CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # since transformers 5.24, until then, in GPT-NeoX


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
