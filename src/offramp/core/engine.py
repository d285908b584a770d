"""What generates: the model's own blocks on torch, kernels of our own on a CPU, or segments on a CUDA device."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from offramp.values import choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offramp.core.exits import Exits
    from offramp.families import SplitModel
    from offramp.hub.pretrained import Rounded

Engines = Literal["auto", "native", "cuda", "torch"]
"""auto: native on a CPU where it can run the model, else torch, with the reason in the log; cuda is taken by name."""

_AUTO = {"cpu": "native"}
"""What "auto" tries first on a kind of device; on CUDA not ours, as long as it has never run on a GPU."""


class Engine:
    """Finds out what generates instead of torch, when that is first asked for, and keeps it up to date.

    Args:
        model: The model.
        name: What the log calls it.
        asked: One of `Engines`.
        rounded: "int8" or "int4": matrices in so many bits per weight, which only the kernels read.

    Raises:
        ValueError: There is no such engine, or nothing rounded with it.
        NativeError: The kernels are asked for, by name or by `rounded`, and cannot run the model, or cannot be had.
        CudaError: The CUDA engine is asked for, and cannot run the model, or the model is not on a CUDA device.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, asked: str = "auto", *, rounded: Rounded | None = None
    ) -> None:
        choice("engine", asked, get_args(Engines))
        if rounded and asked == "cuda":
            raise ValueError(
                f"{rounded} is not available with engine='cuda'; give dtype='bfloat16', or engine='native'"
            )
        self.rounded = rounded
        self._model, self._name = model, name
        self._made: SplitModel | None = None
        self._exits: Exits | None = None
        self._asked = "native" if rounded else asked
        self._refused = False
        if self._asked in ("native", "cuda"):
            self.own()  # what they cannot run is said here

    def own(self) -> SplitModel | None:
        """The kernels, or segments, told of the model anew if it has changed.

        With "auto", a model that the kernels refuse once is left to torch from then on.

        Returns:
            They; None where torch generates.

        Raises:
            NativeError: The kernels must generate, and the model has become one that they cannot run.
            CudaError: Segments must generate, likewise.
        """
        kind = _AUTO.get(self._model.device.type) if self._asked == "auto" else self._asked
        if kind in (None, "torch") or self._refused:
            return None
        if self._made is None or not self._made.is_current:
            self._made = None  # the old one's copies are gone before there are new ones
            self._made = self._native() if kind == "native" else self._cuda()
            if self._made is not None:
                self._made.exits = self._exits
        return self._made

    def _native(self) -> SplitModel | None:
        from offramp.native.kernels import NativeError
        from offramp.native.model import NativeModel

        try:
            made = NativeModel(self._model, rounded=self.rounded)
            if self.rounded == "int4":
                share = f"{made.share_in_four_bits:.0%}"
                _explain(
                    f"of the weights in matrices of {self._name}, {share} are read in four bits, the rest in eight"
                )
            return made
        except NativeError as reason:
            if self._asked == "native":
                raise
            self._refused = True
            _explain(f"{self._name} generates on torch, not with the native engine: {reason}")
            return None

    def _cuda(self) -> SplitModel:
        from offramp.cuda.model import CudaError, CudaModel

        if self._model.device.type != "cuda":
            raise CudaError(
                f"engine is 'cuda', but the model is on {self._model.device}; load it with device='cuda' on a machine "
                "with a CUDA GPU, or use engine='auto'"
            )
        return CudaModel(self._model)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_made": None}  # pointers and graphs cannot be copied; they are made again

    def attach(self, exits: Exits | None) -> None:
        """Read out through trained exits from now on; None: without any."""
        self._exits = exits
        if self._made is not None:
            self._made.exits = exits


@cache
def _explain(line: str) -> None:
    """Say it once."""
    logging.getLogger("offramp").warning(line)
