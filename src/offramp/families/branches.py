"""Blocks of the exits' own as modules: each is like one of the model's last blocks, with the exits' weights in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from offramp.families.network import Network

_LAST = {"o_proj", "out_proj", "dense", "c_proj", "o", "down_proj", "fc2", "dense_4h_to_h", "wo"}
"""What families call the matrices whose products are added to the state."""


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
