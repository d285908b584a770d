"""What the exits of a classifier go by: how sure probabilities are, and what each exit costs, in FLOPs.

FLOPs are counted from shapes, without computing anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.families.backbone import evaluating


def max_probability(probabilities: Tensor) -> Tensor:
    """The largest, [A, C] -> [A]."""
    return probabilities.amax(-1)


def gap(probabilities: Tensor) -> Tensor:
    """The largest minus the second, [A, C] -> [A]."""
    top = probabilities.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def certainty(probabilities: Tensor) -> Tensor:
    """1 - H / ln C with the entropy H in nats, [A, C] -> [A]."""
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return 1 - entropy / math.log(probabilities.shape[-1])


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {"max": max_probability, "gap": gap, "entropy": certainty}
"""How sure probabilities [A, C] are, [A], at most 1: the larger, the surer."""


def measure_of(confidence: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A measure by its name in `CONFIDENCES`, or the function [A, C] -> [A] given; a ValueError for another name."""
    if callable(confidence):
        return confidence
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence is {confidence!r}; choose one of {', '.join(CONFIDENCES)}, or give a function")
    return CONFIDENCES[confidence]


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
