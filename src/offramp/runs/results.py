"""What a command found: data that goes to JSON and comes back, rows for pandas, and text for a terminal."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from offramp.runs.codec import decode, encode
from offramp.runs.files import write_json, write_text
from offramp.runs.tables import as_html

if TYPE_CHECKING:
    import pandas

RESULTS, TABLE = "results.json", "table.md"


def frame(rows: Iterable[Any]) -> pandas.DataFrame:
    """Dataclasses or mappings as a `pandas.DataFrame`, a row each.

    Args:
        rows: Such as the records of an evaluation (`offramp.evaluation.records_of`).

    Returns:
        A column per field; of an interval and of whatever else has fields itself one per field, as
        "flops_ratio.value". What is not known, and numbers that are not finite, are missing values.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("frames need pandas; install it with: pip install pandas") from error
    return pandas.json_normalize([encode(row) for row in rows])


class Rows:
    """What has rows, and hands them to pandas."""

    def _rows(self) -> Iterable[Any]:
        """Dataclasses or mappings; where a class does not say otherwise, a single one of its own fields."""
        return (self,)

    def to_pandas(self) -> pandas.DataFrame:
        """The arms, layers, settings, exits or tokens it is about as a `pandas.DataFrame`, a row each: see `frame`."""
        return frame(self._rows())


class Shown(Rows):
    """What has tables: a terminal prints them, and a notebook shows them as HTML."""

    def table(self) -> str:
        """Tables for a terminal, and what follows from them."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return as_html(self.table())


class Result(Shown):
    """A frozen dataclass that is a result.

    Attributes:
        schema: Of its JSON.
        earlier: Schemas of earlier versions that are read as well.
        noun: For messages.
        files: That `save` writes: JSON, and text.
    """

    schema: ClassVar[str]
    earlier: ClassVar[tuple[str, ...]] = ()
    noun: ClassVar[str] = "result"
    files: ClassVar[tuple[str, str]] = (RESULTS, TABLE)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not finite are null."""
        return {"schema": self.schema, **encode(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a ValueError if the schema is another one."""
        if (found := values.get("schema")) not in (cls.schema, *cls.earlier):
            raise ValueError(f"the schema is {found!r}, not {cls.schema!r}: this is no {cls.noun}")
        kind: Any = cls
        own = {field.name for field in dataclasses.fields(kind)}
        return decode(cls, {name: value for name, value in values.items() if name in own})

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write both files into a folder, made if missing, over those of an earlier result; `offramp.report` draws."""
        data, text = (Path(folder, name) for name in self.files)
        write_json(data, self.to_dict())
        write_text(text, self.table() + "\n")
        return [data, text]
