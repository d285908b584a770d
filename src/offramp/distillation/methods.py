"""Ways to train a student, every switch explicit: the published ones by name, with their papers' values.

Where a paper leaves something open, the value is our reading and says so here. What depends on the data (α, β, d, the
learning rate) is in the files of `offramp/data/distill`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from offramp.distillation.instance_weights import InstanceWeights
from offramp.values import choice

LOSSES = ("labels", "kd", "features", "group_dro", "lff")
OF_LOSSES = {"temperature": "kd", "fraction": "kd", "step": "group_dro", "adjustment": "group_dro", "power": "lff"}
"""What only one of them looks at."""


@dataclass(frozen=True)
class ErrorSet:
    """Rows that a first student, trained plainly for a few epochs, gets wrong; the second one sees more of them.

    Attributes:
        epochs: Epochs of the first student.
        factor: How much more.
        by: "sampling": they are drawn so much more often (JTT repeats them; an epoch of ours still has N rows);
            "weights": their loss is multiplied (DeTT).
    """

    epochs: int = 1
    factor: float = 50.0
    by: str = "sampling"

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.factor > 0 or self.by not in ("sampling", "weights"):
            raise ValueError(
                f"the error set has epochs {self.epochs}, factor {self.factor}, by {self.by!r}; epochs count from 1, "
                "the factor is above 0, and by is sampling or weights"
            )


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        loss: "labels", "kd", "features" (SimKD), "group_dro" or "lff".
        temperature: T of "kd".
        fraction: λ of "kd"; 1: no cross-entropy.
        weights: How rows are weighted by an early readout.
        errors: Rows that a first student gets wrong.
        balanced: Whether groups are drawn equally often; uses group labels of training rows.
        step: η of GroupDRO.
        adjustment: K of GroupDRO.
        power: q of LfF.
        refit: Whether the last layer is fitted anew on validation rows, balanced over groups (DFR).
        learning_rate: Instead of the one that all students have; None: that one.
        weight_decay: Likewise, such as a strong one for GroupDRO.

    Raises:
        ValueError: A value out of range, or parts that do not go together.
    """

    loss: str = "kd"
    temperature: float = 4.0
    fraction: float = 0.9
    weights: InstanceWeights | None = None
    errors: ErrorSet | None = None
    balanced: bool = False
    step: float = 0.01
    adjustment: float = 0.0
    power: float = 0.7
    refit: bool = False
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        choice("loss", self.loss, LOSSES)
        if not self.temperature > 0 or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and fraction {self.fraction}; they are above 0, and in [0, 1]"
            )
        if self.weights is not None and self.loss not in ("labels", "kd", "features"):
            raise ValueError(f"weights of rows go with labels, kd and features, not with {self.loss}")
        if self.weights is not None and self.errors is not None and self.errors.by == "weights":
            raise ValueError("rows can have weights of a readout or of an error set, not of both")
        if self.refit and (self.loss != "labels" or self.weights or self.errors or self.balanced):
            raise ValueError("refit is of a plainly trained student's last layer (dfr); it goes with nothing else")
        if not self.step > 0 or self.adjustment < 0 or not 0 < self.power <= 1:
            raise ValueError(
                f"step is {self.step}, adjustment {self.adjustment}, power {self.power}; they are above 0, at least 0, "
                "and in (0, 1]"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.loss in ("kd", "features")

    @property
    def needs_groups(self) -> bool:
        """Whether groups of training rows are used."""
        oracle = self.weights is not None and self.weights.control == "oracle"
        return self.balanced or self.loss == "group_dro" or oracle

    @property
    def needs_tuning(self) -> bool:
        """Whether rows outside training are needed by the weights."""
        return self.weights is not None and self.weights.needs_tuning


def _dedier(fraction: float = 1.0, **weights: Any) -> Method:
    """T = 3 and λ = 1 are the reference code's."""
    return Method(temperature=3.0, fraction=fraction, weights=InstanceWeights(**weights))


_BOTH: Mapping[str, Any] = {"weight_on": "both"}
METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        # without a teacher
        "erm": Method("labels"),
        "jtt": Method("labels", errors=ErrorSet()),
        "group_balanced": Method("labels", balanced=True),
        "group_dro": Method("group_dro", balanced=True),
        "lff": Method("lff"),
        "dfr": Method("labels", refit=True),
        # distilled
        "kd": Method("kd"),
        "simkd": Method("features"),
        "dett": Method("features", errors=ErrorSet(by="weights")),
        "dedier": _dedier(),
        "dedier_code": _dedier(**_BOTH),
        # our readings of arXiv 2505.01070 and of nested sets as signals
        "laplace": _dedier(signal="laplace_margin", **_BOTH),
        "laplace_entropy": _dedier(signal="laplace_entropy", gate="all", **_BOTH),
        "laplace_variance": _dedier(signal="laplace_variance", gate="all", **_BOTH),
        "avcs": _dedier(signal="set_sharpness", gate="excluded", sets="avcs", **_BOTH),
        "avcs_size": _dedier(signal="set_size", gate="all", sets="avcs", **_BOTH),
        "nested": _dedier(signal="set_sharpness", gate="excluded", sets="nested", **_BOTH),
        "nested_size": _dedier(signal="set_size", gate="all", sets="nested", **_BOTH),
        # controls of dedier
        "dedier_permuted": _dedier(control="permuted"),
        "dedier_mean": _dedier(control="mean-matched"),
        "dedier_gate": _dedier(alpha=0.0),
        "dedier_oracle": _dedier(control="oracle"),
    }
)
"""By name. All names, also with "+key=value" behind them, such as "laplace+alpha=1+fraction=0.5", make a method."""

SHORT: Mapping[str, tuple[str, ...]] = {
    **{f.name: ("weights",) for f in fields(InstanceWeights) if f.name != "readout"},
    **dict.fromkeys(("depth", "width"), ("weights", "readout")),
    **dict.fromkeys(("factor", "by"), ("errors",)),
}
"""Switches of a method's parts that need no dots, and where they are. Others could be taken for a student's."""


def method(text: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method by its name, with changes.

    Args:
        text: A name in `METHODS`, maybe followed by changes: "dedier+alpha=1", "dedier+readout.epochs=2",
            "jtt+errors.epochs=3".
        settings: Changes for it from a file, as nested JSON values; those in the name come later.

    Returns:
        The method.

    Raises:
        ValueError: There is no such method or switch.
    """
    name, *changes = text.split("+")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose of {', '.join(METHODS)}")
    found: Method = updated(METHODS[name], settings or {}, name)
    asked: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        *way, last = key.split(".")
        place = asked
        for part in SHORT.get(key) or (("weights", *way) if way[:1] == ["readout"] else way):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{text} sets {part} and something of it; set the latter alone")
        place[last] = _value(value)
    made: Method = updated(found, asked, text)  # at once: some switches go together
    for key, loss in OF_LOSSES.items():
        if made.loss != loss and getattr(made, key) != getattr(found, key):
            raise ValueError(f"{text}: {key} is of the loss {loss}, and {name} learns by {made.loss}; leave it out")
    return made


def updated(value: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass with values replaced, also inside of it; a ValueError says where one does not fit."""
    known = {f.name: f for f in fields(value)}
    kinds, made = typing.get_type_hints(type(value)), {}
    for key, change in changes.items():
        if key not in known:
            raise ValueError(f"{where} has no {key!r}; it has {', '.join(known)}")
        own = getattr(value, key)
        if isinstance(change, Mapping) and own is None:
            raise ValueError(f"{where} has no {key}, so nothing of it can be changed")
        if isinstance(change, Mapping) and is_dataclass(own):
            made[key] = updated(own, change, f"{where}.{key}")
            continue
        union = typing.get_origin(kinds[key]) in (typing.Union, types.UnionType)
        allowed = typing.get_args(kinds[key]) if union else (kinds[key],)
        if not any(_fits(change, kind) for kind in allowed):
            raise ValueError(f"{where}: {key} is {change!r}; {' or '.join(map(_words, allowed))} is needed")
        made[key] = tuple(change) if isinstance(change, list) else change
    return replace(value, **made)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type: lists stand for tuples, whole numbers also for floats."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(part, typing.get_args(kind)[0]) for part in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    """A type, as a user of JSON calls it."""
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    names = {type(None): "null", int: "an int"}
    return names.get(kind) or f"a {getattr(typing.get_origin(kind) or kind, '__name__', 'value')}"


def _value(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
