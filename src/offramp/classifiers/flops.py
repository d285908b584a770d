"""What each exit of a classifier costs, in FLOPs: counted from shapes, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.backbone import evaluating

if TYPE_CHECKING:
    from offramp.classifiers.classifier import EarlyExitClassifier


def exit_costs(classifier: EarlyExitClassifier, inputs: Mapping[str, Tensor]) -> Tensor:
    """FLOPs of one row up to and including each exit, with the heads of all exits before it.

    Linear layers, convolutions and attention, a multiply-add counted as 2; no biases, norms, poolings and activation
    functions, as by `torch.utils.flop_counter`. Padding is computed and therefore counted: the cost of a row is that of
    the batch's length.

    Args:
        classifier: The classifier; its weights are not touched.
        inputs: A batch; only the shapes count.

    Returns:
        [E], float64, ascending.
    """
    _, ends = _counted(classifier, inputs)
    mixing = classifier.backbone.mixing_flops(inputs)
    return torch.tensor(
        [cost + mixing * layer for cost, layer in zip(ends, classifier.layers, strict=True)], dtype=torch.float64
    )


def head_costs(classifier: EarlyExitClassifier, inputs: Mapping[str, Tensor]) -> Tensor:
    """FLOPs of one row in each exit's head alone, which a network cut after a later exit need not run.

    Args:
        classifier: The classifier; its weights are not touched.
        inputs: A batch; only the shapes count.

    Returns:
        [E], float64.
    """
    starts, ends = _counted(classifier, inputs)
    return torch.tensor(ends, dtype=torch.float64) - torch.tensor(starts, dtype=torch.float64)


def _counted(classifier: EarlyExitClassifier, inputs: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """FLOPs of linear layers and convolutions before and after each head."""
    counted, starts, ends = 0, list[int](), list[int]()

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal counted
        weights = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        counted += 2 * output.numel() * weights

    hooks = [m.register_forward_hook(count) for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for head in classifier.heads:
        hooks.append(head.register_forward_pre_hook(lambda *_: starts.append(counted)))
        hooks.append(head.register_forward_hook(lambda *_: ends.append(counted)))
    try:
        _run_on_shapes(classifier, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return starts, ends


def _run_on_shapes(classifier: EarlyExitClassifier, inputs: Mapping[str, Tensor]) -> None:
    """All exits for one row, on torch's "meta" device, where tensors have a shape and nothing in it."""
    state = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    empty = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    row = {n: torch.empty((1, *t.shape[1:]), dtype=t.dtype, device="meta") for n, t in inputs.items()}
    row.pop("attention_mask", None)
    with evaluating(classifier), torch.no_grad():
        torch.func.functional_call(classifier, empty, (row,))
