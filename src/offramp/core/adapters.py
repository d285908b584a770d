"""What is trained for an exit: an affine lens, blocks of its own, and the drafter, an exit before the first block.

A drafter proposes tokens for `skipped="verify"` to check. It reads the embedding of a token and what the last readout
read one position before: x = M [norm(e_t); norm(r_t-1)], goes through transformer blocks of its own, with keys and
values of their own, and through a lens, and is read out like any exit. Where the full model has not been yet, what its
own readout reads stands in for r: so it runs on by itself, a block and a readout per token (EAGLE, Li et al. 2024,
arXiv 2401.15077; that both parts are normed before they are mixed is of DeepSeek-V3's multi-token prediction, arXiv
2412.19437, equation 21). r here is behind the final norm. Unlike the exits after a layer it is never believed: a token
it proposes stands once the full model has confirmed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Lens(nn.Module):
    """h + W h + b on states [..., D]; as made, it changes nothing.

    Args:
        width: D.
        rank: Rank of W, which then is a product [D, r] · [r, D]; None: a full matrix.
        device: Where the weights are.
    """

    def __init__(self, width: int, rank: int | None = None, *, device: torch.device | None = None) -> None:
        super().__init__()
        made: Any = {"dtype": torch.float32, "device": device}  # states of another format are worked on in theirs
        self.down = None if rank is None else nn.Linear(width, rank, bias=False, **made)
        self.up = nn.Linear(width if rank is None else rank, width, **made)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [..., D] as the final norm should see them."""
        x = hidden if self.down is None else F.linear(hidden, self.down.weight.to(hidden))
        return hidden + F.linear(x, self.up.weight.to(hidden), self.up.bias.to(hidden))

    @property
    def weights(self) -> int:
        """Weights that a state is multiplied with; the bias is none."""
        return self.up.weight.numel() + (0 if self.down is None else self.down.weight.numel())


class Branch(nn.Module):
    """Transformer blocks of an exit's own, as named tensors; `SplitModel` makes modules of them.

    Args:
        blocks: Parameters of each block, by the names they have in the model's block that it is like.
    """

    def __init__(self, blocks: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        for number, tensors in enumerate(blocks):
            for name, tensor in tensors.items():
                self.register_parameter(f"{number}/{name.replace('.', '/')}", nn.Parameter(tensor))

    def blocks(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of each block, by their names there."""
        found: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            number, _, rest = name.partition("/")
            found.setdefault(int(number), {})[rest.replace("/", ".")] = parameter
        return [found[number] for number in sorted(found)]


class Drafter(nn.Module):
    """What it learns; as made, it says what the readout of the position before said.

    Args:
        width: D.
        branch: Its blocks.
        device: Where the weights are.
    """

    def __init__(self, width: int, branch: Branch, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width, bias=False, device=device)
        self.branch, self.lens = branch, Lens(width, device=device)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(width, 2 * width).roll(width, 1))

    def forward(self, embedded: Tensor, before: Tensor) -> Tensor:
        """What goes into its blocks.

        Args:
            embedded: What enters the model's first block, [..., D].
            before: Readout inputs one position before, or its own there; 0 where there is none, [..., D].

        Returns:
            States, [..., D].
        """
        both = side_by_side(embedded, before)
        return F.linear(both, self.mix.weight.to(both))


def side_by_side(embedded: Tensor, before: Tensor) -> Tensor:
    """What is mixed, [..., 2 D]."""
    return torch.cat([_normed(embedded), _normed(before.to(embedded))], dim=-1)


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)  # a third of the time of `rms_norm` for one state
