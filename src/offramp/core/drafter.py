"""A drafter: an exit before the first block, which proposes tokens for `skipped="verify"` to check.

It reads the embedding of a token and what the last readout read one position before: x = M [norm(e_t); norm(r_t-1)],
goes through transformer blocks of its own, with keys and values of their own, and through a lens, and is read out like
any exit. Where the full model has not been yet, what its own readout reads stands in for r: so it runs on by itself, a
block and a readout per token (EAGLE, Li et al. 2024, arXiv 2401.15077; that both parts are normed before they are mixed
is of DeepSeek-V3's multi-token prediction, arXiv 2412.19437, equation 21). r here is behind the final norm.

Unlike the exits after a layer it is never believed: a token it proposes stands once the full model has confirmed it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.adapters import Branch, Lens


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
