"""What generates: the model's own blocks on torch, or kernels of our own where they can run the model."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from offramp.values import choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offramp.core.exits import Exits
    from offramp.native.model import NativeModel

Engines = Literal["auto", "native", "torch"]
"""auto: native on a CPU where it can run the model and be compiled, else torch, with the reason in the log."""


class Engine:
    """Finds out whether the kernels generate, when that is first asked for, and keeps them up to date.

    Args:
        model: The model.
        name: What the log calls it.
        asked: One of `Engines`.
        int8: Matrices in eight bits per weight, which only the kernels read.

    Raises:
        ValueError: There is no such engine.
        NativeError: The kernels are asked for, by name or by `int8`, and cannot run the model, or cannot be had here.
    """

    def __init__(self, model: PreTrainedModel, name: str, asked: str = "auto", *, int8: bool = False) -> None:
        choice("engine", asked, get_args(Engines))
        self.int8 = int8
        self._model, self._name = model, name
        self._native: NativeModel | None = None
        self._exits: Exits | None = None
        self._must, self._may = asked == "native" or int8, asked != "torch"
        if self._must:
            self.native()  # what they cannot run is said here

    def native(self) -> NativeModel | None:
        """The kernels, told of the model anew if it has changed.

        With "auto", a model that they refuse once is left to torch from then on; on a GPU they are not asked.

        Returns:
            They; None where torch generates.

        Raises:
            NativeError: They must generate, and the model has become one that they cannot run.
        """
        if not self._may or (not self._must and self._model.device.type != "cpu"):
            return None
        if self._native is None or not self._native.is_current:
            from offramp.native.build import NativeError
            from offramp.native.model import NativeModel

            self._native = None
            try:
                self._native = NativeModel(self._model, int8=self.int8)
            except NativeError as reason:
                if self._must:
                    raise
                self._may = False
                _explain(f"{self._name} generates on torch, not with the native engine: {reason}")
                return None
            self._native.exits = self._exits
        return self._native

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_native": None}  # pointers cannot be copied; they are made again

    def attach(self, exits: Exits | None) -> None:
        """Read out through trained exits from now on; None: without any."""
        self._exits = exits
        if self._native is not None:
            self._native.exits = exits


@cache
def _explain(line: str) -> None:
    """Say it once."""
    logging.getLogger("offramp").warning(line)
