"""The folder that exits are saved in: a description, `exits.json`, and their weights, `exits.safetensors`.

Nothing here knows what exits are: `Exits.save` and `Exits.load` do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.files import replace_folder, write_json, write_tensors
from offramp.packaged import ModelError, first_line

SCHEMA = "offramp/exits/1"
CONFIG, WEIGHTS = "exits.json", "exits.safetensors"
AGAIN = "save the exits again, or copy their whole folder"


def write(folder: str | os.PathLike[str], values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files: the folder appears complete, or stays what it was.

    Args:
        folder: A new or empty folder, or one with nothing but exits, which are replaced.
        values: The description, as JSON values; the schema is added to it.
        tensors: The weights by name, contiguous and on the CPU.

    Raises:
        FileExistsError: There is something else of that name; it is left alone.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not _may_go(target):
        raise FileExistsError(
            f"{folder} exists and holds something else than exits, which is not replaced; name a new folder"
        )

    def put(temporary: Path) -> None:
        write_tensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, {"schema": SCHEMA, **values})

    replace_folder(target, put)


def description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `exits.json` says, as the arguments of `Exits`, of the right types.

    Returns:
        The arguments by name.

    Raises:
        ModelError: There is no such file, or it is damaged.
    """
    place = Path(folder).expanduser()
    file = place / CONFIG
    if not file.is_file():
        raise ModelError(f"{place} holds no exits: there is no {CONFIG}; name a folder that save_exits wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}); {AGAIN}") from error
    schema = values.pop("schema", None) if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ModelError(f"{file} has the schema {schema!r}, not {SCHEMA!r}: no exits, or those of another version")
    values.setdefault("classifier", False)  # younger than the schema, as the posterior is
    types = {
        "model": str, "fingerprint": str, "num_layers": int, "width": int, "layers": list, "settings": dict,
        "classifier": bool,
    }  # fmt: skip
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    wrong += [] if type(values.get("rank", "")) in (int, type(None)) else ["rank"]
    wrong += [] if wrong or all(type(layer) is int for layer in values["layers"]) else ["layers"]
    if wrong:
        raise ModelError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type; {AGAIN}")
    return {**{name: values[name] for name in (*types, "rank")}, "posterior": values.get("posterior")}


def weights(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor]]:
    """The file of the weights, and what is in it by name.

    Returns:
        Path and tensors.

    Raises:
        ModelError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder).expanduser() / WEIGHTS
    try:
        return file, load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is missing or damaged ({first_line(error)}); {AGAIN}") from error


def _may_go(folder: Path) -> bool:
    """Whether a folder is empty, or exits and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names <= {CONFIG, WEIGHTS}:
        return False
    try:
        return not names or str(json.loads((folder / CONFIG).read_text("utf-8"))["schema"]).startswith("offramp/exits/")
    except (OSError, ValueError, KeyError, TypeError):
        return False
