"""One pass of a model's own code over whole texts, looked at after some layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from offramp.families.network import Network

Edit = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, states before its block, states after it) -> states after it, [B, T, D] each."""


def states_after(
    split: Network,
    ids: Tensor,
    layers: Sequence[int],
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    edit: Edit | None = None,
) -> list[Tensor]:
    """Residual states after some layers; arguments as for `SplitModel.states`."""
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
