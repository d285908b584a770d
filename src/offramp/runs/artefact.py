"""What was fitted or trained, as a folder: a description in JSON, its tensors, and perhaps files of others beside them.

The description holds a digest of itself and of each file beside it, and the tensors one of their own
(`offramp.runs.tensor_files`), so that a file that was changed, cut off, left out or taken from elsewhere is refused.
There is never pickle in it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from torch import Tensor

from offramp.runs import digests
from offramp.runs.bounded import read_object
from offramp.runs.codec import decode, encode
from offramp.runs.files import recover_folder, replace_folder, write_json
from offramp.runs.tensor_files import claimed_header, read_tensors, write_tensors


@dataclass(frozen=True)
class Kind:
    """How the folders of one kind are named and spoken of.

    Attributes:
        what: Is in them, such as "exits".
        description: File name.
        tensors: File name.
        others: Names of what else may be there.
        family: What the schema of one that may be replaced begins with; empty: the names suffice.
        again: What to do if one is damaged.
        saved: What wrote it, for whoever names a folder without one.
    """

    what: str
    description: str
    tensors: str
    others: frozenset[str] = frozenset()
    family: str = ""
    again: str = "fit again, or copy the whole folder"
    saved: str = "name a folder that was saved"

    @property
    def names(self) -> frozenset[str]:
        """All that may be in such a folder."""
        return self.others | {self.description, self.tensors}


STATE = Kind("a fitted state", "state.json", "state.safetensors")
SCHEMA = "offramp/uncertainty/1"
"""Of fitted states."""

State = TypeVar("State")


def save(state: Any, folder: str | os.PathLike[str]) -> None:
    """Write a state of a `fit` of `offramp.uncertainty`, over an older one; over anything else a FileExistsError."""
    tensors: dict[str, Tensor] = {}
    write(folder, SCHEMA, {"kind": type(state).__name__, "state": encode(state, tensors, "state")}, tensors)


def load(kind: type[State], folder: str | os.PathLike[str]) -> State:
    """The same state; a ValueError if there is none, it is not what was written, or it is of another kind."""
    values, tensors = read(folder, SCHEMA, without_digest=True)  # the first states had none
    if (name := values.get("kind")) != kind.__name__:
        raise ValueError(f"{folder} holds {name!r}, but {kind.__name__!r} was asked for; name another folder")
    try:
        return decode(kind, values["state"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the fitted state in {folder} is damaged ({error!r}); fit it again") from error


def write(
    folder: str | os.PathLike[str],
    schema: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: Kind = STATE,
    others: Callable[[Path], None] | None = None,
) -> None:
    """Write all files, and what `others` writes into a folder: it appears complete, or stays what it was."""
    target = Path(folder).expanduser().resolve()
    if target.exists() and not _may_go(target, kind):
        raise FileExistsError(
            f"{folder} exists and holds something else than {kind.what}, which is not replaced; name a new folder"
        )

    def put(temporary: Path) -> None:
        write_tensors(temporary / kind.tensors, tensors)
        if others is not None:
            others(temporary)
        names = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
        files = {name: _digest_of(temporary, name, kind) for name in sorted(names)}
        sealed = digests.sealed({"schema": schema, **values, "files": files})
        write_json(temporary / kind.description, {"schema": schema, "digest": sealed.pop("digest"), **sealed})

    replace_folder(target, put)


def description(folder: str | os.PathLike[str], kind: Kind = STATE) -> dict[str, Any]:
    """The description as it stands in its file, digest and all; a ValueError if there is none or it is damaged."""
    place = Path(folder).expanduser()
    recover_folder(place)
    if not (place / kind.description).is_file():
        inside = sorted(place.glob(f"*/{kind.description}"))  # as in the folder of a training run
        advice = f"did you mean {inside[0].parent}?" if inside else kind.saved
        raise ValueError(f"{place} holds no {kind.what.removeprefix('a ')}: there is no {kind.description}; {advice}")
    return read_object(place / kind.description, kind.again)


def read(
    folder: str | os.PathLike[str], schema: str, kind: Kind = STATE, *, without_digest: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """What `write` wrote, but schema, digest and files; `without_digest`: also, with a warning, what never had one."""
    place = Path(folder).expanduser()
    values = description(place, kind)
    file = place / kind.description
    if (found := values.pop("schema", None)) != schema:
        raise ValueError(
            f"{file} has the schema {found!r}, not {schema!r}: no {kind.what.removeprefix('a ')}, or one of another "
            f"version; {kind.saved}"
        )
    tensors_file = place / kind.tensors
    inner = claimed_header(tensors_file, kind.again).get("digest")
    digest, files = values.pop("digest", None), values.pop("files", None)
    changed = f"{place} is not what was saved: a file was changed or is damaged, or they are from two; {kind.again}"
    if digest is None and files is None and inner is None and without_digest:  # an earlier version
        digests.warn_of_none(place)
        return values, _tensors(tensors_file, kind)
    if files is None:  # an earlier version, whose one digest was of description and tensors
        tensors = _tensors(tensors_file, kind)
        if inner is not None or digest != digests.of(values, [tensors[name] for name in sorted(tensors)]):
            raise ValueError(changed)
        return values, tensors
    if digest != digests.of({"schema": schema, **values, "files": files}):
        raise ValueError(changed)
    if not isinstance(files, dict) or kind.tensors not in files or any(PurePath(name).is_absolute() for name in files):
        raise ValueError(f"{file} is damaged: it does not say what stands beside it; {kind.again}")
    if any(digest != _digest_of(place, name, kind) for name, digest in files.items()):
        raise ValueError(changed)
    return values, _tensors(tensors_file, kind)


def require_inputs(what: str, saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raise a ValueError if a state was fitted on inputs of other fingerprints, by name, than those at hand."""
    for name, value in given.items():
        if (have := saved.get(name, "")) != value:
            raise ValueError(
                f"{what} was fitted on another {name}: {have[:12] or 'unknown'}, and at hand is {value[:12]} "
                "(fingerprints); fit it again, and all that comes after it"
            )


def _tensors(file: Path, kind: Kind) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether there is a digest was seen to
        return read_tensors(file, kind.again)[1]


def _digest_of(folder: Path, name: str, kind: Kind) -> str:
    """Of a file in the folder; what tensors' files say of themselves is compared when they are read."""
    if name.endswith(".safetensors"):
        return claimed_header(folder / name, kind.again).get("digest", "")
    try:
        return digests.of_file(folder / name)
    except OSError as error:
        raise ValueError(f"{folder / name} is missing or damaged ({error.strerror}); {kind.again}") from error


def _may_go(folder: Path, kind: Kind) -> bool:
    """Whether a folder is empty, or such an artefact and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names <= kind.names:
        return False
    try:
        return not names or not kind.family or str(description(folder, kind).get("schema")).startswith(kind.family)
    except ValueError:
        return False
