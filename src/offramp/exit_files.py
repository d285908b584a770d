"""The folder that exits are saved in: a description, `exits.json`, and their weights, `exits.safetensors`.

Nothing here knows what exits are: `Exits.save` and `Exits.load` do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp import artefact
from offramp.packaged import ModelError

SCHEMA = "offramp/exits/1"
CONFIG, WEIGHTS = "exits.json", "exits.safetensors"
AGAIN = "save the exits again, or copy their whole folder"
MOST_LAYERS = 10_000
"""A description that speaks of more is damaged."""
KIND = artefact.Kind(
    "exits", CONFIG, WEIGHTS, family="offramp/exits/", again=AGAIN, saved="name a folder that save_exits wrote"
)


def write(folder: str | os.PathLike[str], values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files: the folder appears complete, or stays what it was.

    Args:
        folder: A new or empty folder, or one with nothing but exits, which are replaced.
        values: The description, as JSON values; schema and digests are added to it.
        tensors: The weights by name.

    Raises:
        FileExistsError: There is something else of that name; it is left alone.
    """
    artefact.write(folder, SCHEMA, values, tensors, KIND)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote: the description as the arguments of `Exits`, of the right types, and the weights.

    Returns:
        The arguments and "posterior", and tensors, by name.

    Raises:
        ModelError: There are no exits, or they are damaged.
    """
    try:
        values, tensors = artefact.read(folder, SCHEMA, KIND, without_digest=True)
    except ValueError as error:
        raise ModelError(str(error)) from error
    file = Path(folder).expanduser() / CONFIG
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
    if len(values["layers"]) > MOST_LAYERS:
        raise ModelError(f"{file} is damaged: it speaks of {len(values['layers']):,} exits; {AGAIN}")
    return {**{name: values[name] for name in (*types, "rank")}, "posterior": values.get("posterior")}, tensors
