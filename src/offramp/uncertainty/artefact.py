"""A fitted state as a folder: a description in JSON and its tensors, which belong together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.files import replace_folder, write_json, write_tensors
from offramp.uncertainty import fingerprint

DESCRIPTION, TENSORS = "state.json", "state.safetensors"


def write(
    folder: str | os.PathLike[str], schema: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:  # fmt: skip
    """Write both files: the folder appears complete, or stays what it was.

    Args:
        folder: A new or empty folder, or one with nothing but a state, which is replaced.
        schema: What is in it, such as "offramp/posterior/1".
        values: The description, as JSON values.
        tensors: By name, contiguous.

    Raises:
        FileExistsError: There is something else of that name; it is left alone.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not (target.is_dir() and {p.name for p in target.iterdir()} <= {DESCRIPTION, TENSORS}):
        raise FileExistsError(
            f"{folder} exists and holds something else than a fitted state, which is not replaced; name a new folder"
        )
    digest = fingerprint.of(dict(values), [tensors[name] for name in sorted(tensors)])

    def put(temporary: Path) -> None:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / DESCRIPTION, {"schema": schema, "digest": digest, **values})

    replace_folder(target, put)


def read(
    folder: str | os.PathLike[str], schema: str, *, without_digest: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """What `write` wrote.

    Args:
        folder: The folder.
        schema: What must be in it.
        without_digest: Take also a description that has none, as those of some schemas had none once.

    Returns:
        The description without schema and digest, and the tensors.

    Raises:
        ValueError: There is no such state, it is of another kind, or it is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder).expanduser()
    again = "fit again, or copy the whole folder"
    if not (place / DESCRIPTION).is_file():
        raise ValueError(f"{place} holds no fitted state: there is no {DESCRIPTION}; name a folder that was saved")
    try:
        values = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(place / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{place} is damaged ({first}); {again}") from error
    found = values.pop("schema", None) if isinstance(values, dict) else None
    if found != schema:
        raise ValueError(f"{place / DESCRIPTION} has the schema {found!r}, not {schema!r}; name another folder")
    digest = values.pop("digest", None)
    unknown = without_digest and digest is None
    if not unknown and digest != fingerprint.of(values, [tensors[name] for name in sorted(tensors)]):
        raise ValueError(f"{place} is not what was saved: its files were changed, or are from two states; {again}")
    return values, tensors


def require_inputs(what: str, saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Refuse a state that was fitted on other things than those at hand.

    Args:
        what: The state, for the error.
        saved: Fingerprint of each input, as kept in the state.
        given: Those at hand, maybe of some inputs only.

    Raises:
        ValueError: One differs, or the state knows of no such input.
    """
    for name, value in given.items():
        if (have := saved.get(name, "")) != value:
            raise ValueError(
                f"{what} was fitted on another {name}: {have[:12] or 'unknown'}, and at hand is {value[:12]} "
                "(fingerprints); fit it again, and all that comes after it"
            )
