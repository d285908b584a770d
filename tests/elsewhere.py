"""A second device without hardware, for processes of their own: importing this adds the device "elsewhere" to torch.

Its tensors compute on the CPU, but say they are elsewhere and refuse to meet the CPU's own, as those of CUDA do: what
makes a tensor on the wrong device, or mixes two, fails here as it would there. A process cannot lose it again, so that
tests that use it run in one of their own, see `device_contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_setup_privateuseone_for_python_backend(NAME)
aten = torch.ops.aten
MAY_MIX = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip
"""Copies, and indices that lie on the CPU: CUDA takes them, too."""


class Elsewhere(torch.Tensor):
    """A tensor of that device, around the one that holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        """Around a tensor of the CPU; it is not copied."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Every operation that one of these takes part in."""
        return run(func, *args, **(kwargs or {}))

    def __getitem__(self, index):
        """With lists as tensors: PyTorch would make those in C++ there, which needs a device of C++."""
        return super().__getitem__(_listless(index))

    def __setitem__(self, index, value):
        """As above."""
        super().__setitem__(_listless(index), value)

    def new_tensor(self, data, **options):
        """Made by torch.tensor, see below."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def untyped_storage(self):
        """Where its numbers are, by which tensors that share it are told when a model is saved."""
        return self.inner.untyped_storage()

    def storage(self):
        """As above."""
        return self.inner.storage()

    def data_ptr(self):
        """As above."""
        return self.inner.data_ptr()

    def tolist(self):
        """Its numbers."""
        return self.inner.tolist()

    def __repr__(self, **options):
        return f"elsewhere: {self.inner!r}"


def _listless(index):
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(_listless(part) for part in index) if isinstance(index, tuple) else index


def run(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An operation on the CPU, its result elsewhere if it would be there.

    Raises:
        RuntimeError: Tensors of both devices meet.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    strangers = [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, Elsewhere)]
    if ours and strangers and func not in MAY_MIX:
        raise RuntimeError(f"{func} has tensors {[tuple(t.shape) for t in ours]} elsewhere, {strangers} on the CPU")
    device = kwargs.get("device")
    there = bool(ours) if device is None else torch.device(device).type == NAME
    if func is aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if there and device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    if func is aten.histc.default and not args[0].is_floating_point():  # CUDA's counts those, too
        return run(func, args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    known = {id(_inner(tensor)): tensor for tensor in tensors}  # what is changed in place stays what it is
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    return tree_map(lambda leaf: _outer(leaf, known, there), result)


def _inner(leaf):
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf


def _outer(leaf, known, there):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else Elsewhere(leaf) if there else leaf


_library = torch.library.Library("_", "IMPL")
_library.fallback(run, "PrivateUse1")  # operations without a tensor, by their device


def _through_the_cpu(make):
    """torch.tensor and its like, which ask a device's own C++ for memory."""

    def made(data, *args, device=None, **kwargs):
        if device is None and isinstance(data, Elsewhere):
            device = data.device
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **kwargs)
        return (data if isinstance(data, torch.Tensor) else make(data, *args, **kwargs)).to(device, **kwargs)

    return made


torch.tensor, torch.as_tensor = _through_the_cpu(torch.tensor), _through_the_cpu(torch.as_tensor)


def moved(module: nn.Module) -> nn.Module:
    """The module, with all parameters and buffers elsewhere; shared ones stay shared."""
    there: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                parameter = nn.Parameter(Elsewhere(value.detach()), value.requires_grad)
                part._parameters[name] = there.setdefault(id(value), parameter)
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = there.setdefault(id(value), Elsewhere(value))
    return module
