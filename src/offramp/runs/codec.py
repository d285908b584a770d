"""Dataclasses as JSON values, and back by the annotations of their fields; no class needs code of its own for it.

A field that is added later needs a default that means what was done before there was one: earlier files lack it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Kind = TypeVar("Kind")


def encode(value: Any, tensors: dict[str, Tensor] | None = None, name: str = "") -> Any:
    """JSON values; tensors go to `tensors`, which their names are for, or become lists, with null where not finite."""
    if isinstance(value, Tensor):
        if tensors is None:
            return encode(value.tolist())
        tensors[name] = value.detach().cpu().clone().contiguous()  # tensors that share memory cannot be saved
        return name
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item, tensors, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, tensors, f"{name}.{place}") for place, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return None if tensors is None and isinstance(value, float) and not math.isfinite(value) else value
    raise TypeError(f"{name or 'this'} is a {type(value).__name__}, which is not saved")


def decode(kind: type[Kind], value: Any, tensors: Mapping[str, Tensor] | None = None) -> Kind:
    """What `encode` was given; where `tensors` is None, tensors are read in float64, with NaN for null."""
    found: Kind = _decode(kind, value, tensors)
    return found


def _decode(kind: Any, value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        options = [option for option in arguments if option is not type(None)]
        fitting = [option for option in options if isinstance(value, _written_as(option))]
        return _decode((fitting or options)[0], value, tensors)
    if kind is Tensor:
        return torch.from_numpy(np.array(value, dtype=np.float64)) if tensors is None else tensors[value]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        optional = {f.name for f in fields if (f.default, f.default_factory) != (dataclasses.MISSING,) * 2}
        if set(value) - set(hints) or {field.name for field in fields} - set(value) - optional:
            raise TypeError(f"fields are {sorted(value)}, not {sorted(field.name for field in fields)}")
        return typing.cast(Any, kind)(**{name: _decode(hints[name], value[name], tensors) for name in value})
    if origin is tuple and arguments[-1] is not ...:
        return tuple(_decode(each, item, tensors) for each, item in zip(arguments, value, strict=True))
    if origin in (tuple, list, Sequence, Iterable):
        return (list if origin is list else tuple)(_decode(arguments[0], item, tensors) for item in value)
    if origin in (dict, Mapping):
        named = int if arguments[0] is int else str  # JSON has no other keys than texts
        return {named(key): _decode(arguments[1], item, tensors) for key, item in value.items()}
    return Path(value) if kind is Path else value


def _written_as(kind: Any) -> type | tuple[type, ...]:
    """The types that JSON has for one of the types of a union."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) or origin in (dict, Mapping):
        return dict
    return list if origin in (tuple, list, Sequence) else (str, int, float)
