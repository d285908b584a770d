"""Rows of results as frames of pandas, which nothing else here needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from offramp.runs.codec import encode

if TYPE_CHECKING:
    import pandas


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
        """The arms, layers, settings, exits or tokens it is about as a `pandas.DataFrame`, a row each: see `frame`.

        Returns:
            The frame.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return frame(self._rows())
