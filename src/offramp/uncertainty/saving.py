"""Fitted states on disk: a description, `state.json`, and its tensors, `state.safetensors`. Never pickle.

Any frozen dataclass can be saved whose fields are tensors, numbers, texts, None, tuples of those, or such dataclasses.
A field that is added later needs a default that means what was done before there was one: earlier states lack it.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from typing import Any, TypeVar

from torch import Tensor

from offramp.runs import artefact

SCHEMA = "offramp/uncertainty/1"

State = TypeVar("State")


def save(state: Any, folder: str | os.PathLike[str]) -> None:
    """Write a state: the folder appears complete, or stays what it was.

    Args:
        state: Of a `fit` of this package.
        folder: A new or empty folder, or one with a state, which is replaced.

    Raises:
        FileExistsError: There is something else of that name.
    """
    tensors: dict[str, Tensor] = {}
    values = {"kind": type(state).__name__, "state": _encode(state, "state", tensors)}
    artefact.write(folder, SCHEMA, values, tensors)


def load(kind: type[State], folder: str | os.PathLike[str]) -> State:
    """Read a state.

    Args:
        kind: Its class, such as `NestedConformal`.
        folder: Where `save` wrote it.

    Returns:
        The same state.

    Raises:
        ValueError: There is none, it is not what was written, or it is of another kind.
    """
    values, tensors = artefact.read(folder, SCHEMA, without_digest=True)  # the first states had none
    if (name := values.get("kind")) != kind.__name__:
        raise ValueError(f"{folder} holds {name!r}, but {kind.__name__!r} was asked for; name another folder")
    try:
        return typing.cast(State, _decode(values["state"], kind, tensors))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the fitted state in {folder} is damaged ({error!r}); fit it again") from error


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON value; tensors are replaced by their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()  # tensors that share memory cannot be saved
        return name
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_encode(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which states do not hold")


def _decode(value: Any, kind: Any, tensors: dict[str, Tensor]) -> Any:
    """What a JSON value stands for, by the annotation of its field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(value, kind, tensors)
    if kind is Tensor:
        return tensors[value]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
        if not needed <= set(value) <= names:
            raise ValueError(f"fields are {sorted(value)}, not {sorted(names)}")
        return typing.cast(Any, kind)(**{name: _decode(value[name], hints[name], tensors) for name in value})
    if origin is not None and origin is not typing.Literal:  # tuples and other sequences
        return tuple(_decode(item, arguments[0], tensors) for item in value)
    return value
