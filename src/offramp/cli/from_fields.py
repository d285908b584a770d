"""Options of a command that are the fields of a dataclass: name, type and default are the field's, help is its docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Command = TypeVar("Command", bound=Callable[..., None])


def options_of(
    kind: type, only: Collection[str] = (), *, but: Collection[str] = (), before: str
) -> Callable[[Command], Command]:
    """Give a command, which takes them as its last, `**fields`, an option for each field of a dataclass.

    Args:
        kind: The dataclass; its docstring has `Attributes:`.
        only: Fields; empty: all.
        but: Fields that are left out, since the command has options of its own for them.
        before: The command's parameter that they stand before in its help.

    Returns:
        A decorator, which changes what the command's signature says.
    """
    hints, told = get_type_hints(kind), field_docs(kind)
    made = [
        Parameter(
            field.name, Parameter.POSITIONAL_OR_KEYWORD, default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(*_names(field), help=told[field.name])],
        )
        for field in dataclasses.fields(kind) if field.name in (only or hints) and field.name not in but
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        place = [parameter.name for parameter in own].index(before)
        parameters = [*own[:place], *made, *own[place:]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _names(field: dataclasses.Field[Any]) -> list[str]:
    """What is off by default is a flag without an opposite; all else is called as the field."""
    return [f"--{field.name.replace('_', '-')}"] if field.default is False else []


def field_docs(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field, in words of the command line: None is a default there."""
    section = inspect.getdoc(kind).partition("Attributes:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    found: dict[str, str] = {}
    for name, words in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
        plain = re.sub(r'["`]', "", " ".join(words.split()))
        found[name] = plain.replace(". None: ", ". Default: ").replace("None: ", "default: ")
    return found
