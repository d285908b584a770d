"""Functions at the top of the package as methods: the core need not know who does the work."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any


class Verb:
    """The function of `offramp` that has the attribute's name; its room is imported when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, one: Any, owner: type) -> Callable[..., Any]:
        import offramp

        function = getattr(offramp, self._name)
        return function if one is None else MethodType(function, one)
