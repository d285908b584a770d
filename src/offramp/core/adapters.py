"""What stands between a model's states and the readout of an exit: an affine lens, and blocks of the exit's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Lens(nn.Module):
    """h + W h + b on states [..., D]; as made, it changes nothing.

    Args:
        width: D.
        rank: Rank of W, which then is a product [D, r] · [r, D]; None: a full matrix.
        dtype: Number format of the weights. States of another one are worked on in theirs.
        device: Where the weights are.
    """

    def __init__(
        self,
        width: int,
        rank: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(width if rank is None else rank, width, dtype=dtype, device=device)
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
