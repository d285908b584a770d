"""An exit test in two launches, three or four with a lens: whether it can be, and how the kernels are called.

`ExitTests.of` is the one place that chooses between `kernels` and torch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.families import SplitModel, acting
from offramp.families.readouts import Best

MOST = 32  # states that are tested on the whole vocabulary at once; beyond them torch's matrix products are ahead
_ROWS = 16  # states that share a read of the matrix: the least that tensor cores multiply
_CHUNK = 128
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """What a norm computes: (x - mean) / spread, with RMS no mean, times (weight + plus), with a bias.

    Attributes:
        kind: 1: RMS; 2: with a mean.
        plus: What is added to the weight.
        early: Whether it rounds to the model's number format before the weight.
        eps: What is added to the mean square.
    """

    kind: int
    plus: float
    early: bool
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, like: Tensor) -> Norm | None:
        """What a norm of the model's computes, found out by asking it.

        Args:
            module: The norm.
            like: Anything of the model's width and number format, [D].

        Returns:
            That; None: something else.
        """
        x = torch.randn(8, len(like), generator=torch.Generator().manual_seed(0)).to(like) * 3 + 1
        eps = next((v for name in ("variance_epsilon", "eps") if (v := getattr(module, name, None)) is not None), 1e-5)
        try:
            asked = module(x).float()
        except RuntimeError:  # of another width: it is not the model's last norm
            return None
        described = [cls(kind, plus, early, eps) for kind, plus, early in product((1, 2), (0.0, 1.0), (True, False))]
        errors = [float((norm(x, module) - asked).abs().max()) for norm in described]
        least = min(errors)
        far = 4 * torch.finfo(like.dtype).eps * float(asked.abs().max())
        return described[errors.index(least)] if least <= far else None

    def __call__(self, x: Tensor, module: Any) -> Tensor:
        """The same in torch, in float32, for states [A, D]."""
        kind, x = x.dtype, x.float()
        x = x - x.mean(-1, keepdim=True) if self.kind == 2 else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        x = x.to(kind).float() if self.early else x
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        x = x if weight is None else x * (weight.float() + self.plus)
        return (x if bias is None else x + bias.float()).to(kind).float()


class ExitTests:
    """The exit tests of a model in kernels; made by `of`.

    Args:
        split: The model.
        norm: What its last norm computes.
    """

    def __init__(self, split: SplitModel, norm: Norm) -> None:
        from offramp.cuda import kernels  # needs Triton

        self.split, self.norm, self.kernels = split, norm, kernels
        cap = getattr(split.config, "final_logit_softcapping", None)
        factor = 1.0 if cap else float(split.family.logits(split.config, torch.ones(())))
        self.cap, self.factor = cap, None if factor == 1.0 else factor

    @classmethod
    def of(cls, split: SplitModel) -> ExitTests | None:
        """Those of a model.

        Args:
            split: The model; with TRITON_INTERPRET=1 it may be on the CPU.

        Returns:
            They; None where torch has to make them, with the reason in the log, but on other devices.
        """
        if split.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return None
        reason = _lacking(split)
        norm = None if reason else Norm.of(split.norm, split.head.weight[0])
        reason = reason or f"{type(split.norm).__name__} is no norm that they know"
        if norm is not None:
            try:
                made = cls(split, norm)
                made(split.head.weight.new_zeros(1, split.shape.width), None)
                return made
            except Exception as error:  # Triton compiles on first use, with what it finds: a compiler, a driver
                reason = f"Triton failed, {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        logging.getLogger("offramp").warning("exit tests run on torch, not in fused kernels: %s", reason)
        return None

    @property
    def apply(self) -> bool:
        """Whether nobody wants to be called in place of the norm or the head."""
        return _plain(self.split)

    def __call__(
        self, hidden: Tensor, layer: int | None, ids: Tensor | None = None, *, logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Test residual states.

        Args:
            hidden: [A, D].
            layer: The layer they are after: its lens comes first, if it has one. None: no lens.
            ids: Which tokens are read, [A, K], or [K] for all states alike; -1 for none. None: all V.
            logits: Whether all logits are wanted, too.

        Returns:
            The two best tokens and the normaliser of each state, as `told` reads them, int32 [A, 5]; the logits,
            float32 [A, K or V], or None.
        """
        split = self.split
        with _on(hidden.device):
            hidden = hidden.contiguous()
            lens = None if layer is None or split.exits is None else split.exits.lens(layer)
            for matrix, added in _steps(lens, hidden):
                hidden = self._linear(hidden, matrix, added)
            return self._scores(hidden, ids, self.norm, logits)

    def project(self, x: Tensor, ids: Tensor) -> Tensor:
        """Logits of readout inputs [A, D] on tokens [A, K], or [K]; float32 [A, K]."""
        with _on(x.device):
            logits = self._scores(x.contiguous(), ids, None, True)[1]
        assert logits is not None
        return logits

    def _scores(
        self, hidden: Tensor, ids: Tensor | None, norm: Norm | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        head, (count, width) = self.split.head, hidden.shape
        kept = len(head.weight) if ids is None else ids.shape[-1]
        own = ids is not None and ids.ndim == 2
        rows, tokens = 1 if own or count == 1 else _ROWS, 16 if kept <= 8192 else 64
        blocks = -(-kept // tokens)
        new: Any = hidden.new_empty
        values, sums = (new(shape, dtype=torch.float32) for shape in ((count, blocks, 2), (count, blocks)))
        names, made = (new(shape, dtype=torch.int32) for shape in ((count, blocks, 2), (count, 5)))
        logits = new((count, kept), dtype=torch.float32) if wanted else None
        module = self.split.norm if norm is not None else None
        kind, plus, early, eps = norm or Norm(0, 0.0, False, 0.0)
        self.kernels.scores[-(-count // rows), blocks](
            hidden, getattr(module, "weight", None), getattr(module, "bias", None), head.weight, head.bias,
            None if ids is None else ids.contiguous(), values, names, sums, logits,
            count, width, kept, kept if own else 0, eps, self.split.scale if norm is not None else None,
            self.factor, self.cap, kind, plus, early, rows, tokens, _CHUNK,
        )  # fmt: skip
        self.kernels.merge[(count,)](values, names, sums, made, blocks, 1 << (blocks - 1).bit_length())
        return made, logits

    def _linear(self, hidden: Tensor, layer: nn.Linear, added: Tensor | None) -> Tensor:
        (count, width), outputs = hidden.shape, len(layer.weight)
        made, rows, tokens = hidden.new_empty(count, outputs), 1 if count == 1 else _ROWS, 16
        self.kernels.linear[-(-count // rows), -(-outputs // tokens)](
            hidden, layer.weight, layer.bias, added, made, count, width, outputs, rows, tokens, _CHUNK
        )
        return made


def packed(best: Best) -> Tensor:
    """What the kernels give, of torch's two best tokens and normaliser: int32 [A, 5]."""
    best = best if best.values.shape[1] == 2 else _second(best)
    numbers = torch.cat([best.values, best.normaliser[:, None]], dim=1).float()
    return torch.cat([numbers.view(torch.int32), best.tokens.int()], dim=1)


def told(made: Tensor) -> Best:
    """The two best tokens and the normaliser, of int32 [A, 5]."""
    numbers = made[:, :3].contiguous().view(torch.float32)
    return Best(numbers[:, :2], made[:, 3:].long(), numbers[:, 2])


def _second(best: Best) -> Best:
    """A vocabulary of one token has no second one."""
    return best._replace(
        values=F.pad(best.values, (0, 1), value=-torch.inf), tokens=F.pad(best.tokens, (0, 1), value=-1)
    )


def _steps(lens: Any, hidden: Tensor) -> Iterable[tuple[nn.Linear, Tensor | None]]:
    """The matrices of a lens in order, and what the product comes on top of."""
    if lens is None:
        return []
    return [(lens.up, hidden)] if lens.down is None else [(lens.down, None), (lens.up, hidden)]


def _on(device: torch.device) -> Any:
    """Launches go to this device's stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _lacking(split: SplitModel) -> str:
    """Why a model's tests cannot run in kernels; nothing if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing, which PyTorch's CUDA builds for Linux bring; pip install triton"
    if split.model.dtype not in _FORMATS or split.head.weight.dtype != split.model.dtype:
        return f"they are for float32, bfloat16 and float16, the model is in {split.model.dtype}"
    bare = isinstance(split.squeeze, nn.Identity) and split._logits_bias is None
    if not (bare and split.head_is_plain and split.head.weight.is_contiguous()):
        return "the head is no ordinary linear layer behind the last norm"
    return "" if _plain(split) else "the last norm or the head has a hook or a forward of somebody's own"


def _plain(split: SplitModel) -> bool:
    return not any(any(acting(part)) for part in (split.norm, split.head))
