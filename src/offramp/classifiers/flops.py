"""What each exit of a classifier costs, in FLOPs: counted from shapes, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.families.backbone import evaluating


class ExitCosts(NamedTuple):
    """FLOPs of one row up to and including each exit, [E] each, float64, ascending.

    Attributes:
        heads: With the heads of all exits before it, as a row pays that is tested at each.
        cut: Without them, in the plain network cut there; the last is the plain full network's.
    """

    heads: Tensor
    cut: Tensor


def exit_costs(classifier: Any, inputs: Mapping[str, Tensor]) -> ExitCosts:
    """FLOPs of one row up to and including each exit.

    Linear layers, convolutions and attention, a multiply-add counted as 2; no biases, norms, poolings and activation
    functions, as by `torch.utils.flop_counter`. Padding is computed and therefore counted: the cost of a row is that of
    the batch's length.

    Args:
        classifier: An `EarlyExitClassifier`; its weights are not touched.
        inputs: A batch; only the shapes count.

    Returns:
        The costs, with and without earlier heads.
    """
    counted, before, costs = 0, [], []

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal counted
        weights = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        counted += 2 * output.numel() * weights

    def open_head(*_: Any) -> None:
        before.append(counted)

    def close(*_: Any) -> None:
        costs.append(counted)

    heads = [head.register_forward_pre_hook(open_head) for head in classifier.heads]
    heads += [head.register_forward_hook(close) for head in classifier.heads]
    hooks = [m.register_forward_hook(count) for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        _run_on_shapes(classifier, inputs)
    finally:
        for hook in heads + hooks:
            hook.remove()
    mixing = classifier.backbone.mixing_flops(inputs)
    whole = torch.tensor([c + mixing * at for c, at in zip(costs, classifier.layers, strict=True)], dtype=torch.float64)
    heads_of = torch.tensor([after - b for after, b in zip(costs, before, strict=True)], dtype=torch.float64)
    return ExitCosts(whole, whole - (heads_of.cumsum(0) - heads_of))


def _run_on_shapes(classifier: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """All exits for one row, on torch's "meta" device, where tensors have a shape and nothing in it."""
    state = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    empty = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    row = {n: torch.empty((1, *t.shape[1:]), dtype=t.dtype, device="meta") for n, t in inputs.items()}
    row.pop("attention_mask", None)
    with evaluating(classifier), torch.no_grad():
        torch.func.functional_call(classifier, empty, (row,))
