"""One pass over a split that keeps what all exits say; every fit, grid, threshold and metric reads this, not the model.

The file is safetensors with the tensors `features.0` .. `features.E-1`, `logits`, `labels`, `costs`, and maybe `cut`
and `groups`; ids and a description stand in its header. Rows are written as they come, so a split may be larger than
memory, and loading maps the file instead of reading it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.families.backbone import Inputs, evaluating
from offramp.hub.messages import first_line
from offramp.runs.bounded import parsed
from offramp.runs.tensor_files import Part, claimed_header, read_tensors, write_parts
from offramp.uncertainty.outputs import ExitOutputs

SCHEMA = "offramp/exit-outputs/1"
AGAIN = "remove it to collect the outputs again"


@torch.no_grad()
def collect(
    classifier: Any,
    batches: Iterable[tuple[Inputs, Tensor]],
    *,
    ids: Sequence[str] = (),
    groups: Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    description: Mapping[str, str] | None = None,
    precision: str | None = None,
) -> ExitOutputs:
    """Run all exits once over a split.

    Args:
        classifier: An `EarlyExitClassifier`; evaluated as it is, without dropout.
        batches: Inputs and labels [B] of the rows, in order; read one at a time.
        ids: Ids of all rows, in order; empty: unknown.
        groups: A number per row, [N].
        path: A file to write the rows to as they come; None: they stay in memory.
        description: What they were made of, such as a fingerprint of the weights, kept in that file.
        precision: "bf16": compute in bfloat16 under autocast; None: as the classifier is.

    Returns:
        Features and logits in float32, memory-mapped if there is a path. The costs are those of a row on average where
        batches differ in length.

    Raises:
        ValueError: There are no rows, features or logits that are not finite, labels outside the classes, or labels,
            ids or groups of another number.
    """
    costs: dict[tuple[tuple[int, ...], ...], Tensor] = {}
    total, rows = torch.zeros((2, len(classifier.layers)), dtype=torch.float64), 0
    # Beside its target, so that a large split goes to the disk it was meant for.
    target = None if path is None else Path(path).expanduser().resolve()
    with evaluating(classifier, precision), _Spool(target) as spool:
        for inputs, labels in batches:
            for exit_, (features, logits) in enumerate(classifier(inputs)):
                for name, tensor in ((f"features.{exit_}", features), (f"logits.{exit_}", logits)):
                    spool.add(name, _finite(tensor.float().cpu(), name, rows))
            spool.add("labels", _possible(labels.long().cpu(), len(logits), classifier.num_classes, rows))
            shape = _shape(inputs)
            if shape not in costs:
                costs[shape] = torch.stack([classifier.costs(inputs), classifier.costs(inputs, cut=True)])
            total, rows = total + costs[shape] * len(labels), rows + len(labels)
        if not rows:
            raise ValueError("there are no rows; a pass over a split needs at least one")
        for name, given in (("ids", ids or None), ("groups", groups)):
            if given is not None and len(given) != rows:
                raise ValueError(f"there are {len(given)} {name} for {rows} rows; give one per row, or none")
        rest = {"costs": total[0] / rows, "cut": total[1] / rows}
        rest |= {} if groups is None else {"groups": groups.long().cpu()}
        if target is None:
            return _assembled({**spool.tensors(), **rest}, tuple(ids))
        about = {"ids": json.dumps(list(ids)), "description": json.dumps(dict(description or {}))}
        spool.write(target, rest, {"schema": SCHEMA, **about})
    return load_outputs(target)


def load_outputs(path: str | os.PathLike[str]) -> ExitOutputs:
    """What `collect` wrote, memory-mapped; a ValueError for no such file, or one that is damaged or something else."""
    header, tensors = read_tensors(Path(path).expanduser(), AGAIN)
    if header.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has the schema {header.get('schema')!r}, not {SCHEMA!r}: no outputs of exits, or those of another "
            "version"
        )
    try:
        return _assembled(tensors, tuple(parsed(header["ids"], "its header")))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


def load_description(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the outputs in a file were made of, as `collect` was told."""
    try:
        found: dict[str, str] = parsed(claimed_header(Path(path).expanduser(), AGAIN)["description"], "its header")
    except (LookupError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error
    return found


# ---------------------------------------------------------------- rows as they come


class _Spool:
    """Tensors that grow by rows: lists in memory, or files in a hidden folder that goes when the block ends.

    Args:
        target: The file they are to become, which the folder is beside; None: memory.
    """

    def __init__(self, target: Path | None) -> None:
        self.target = target
        self.folder: Path | None = None
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.parts: dict[str, list[Tensor]] = {}

    def __enter__(self) -> _Spool:
        if self.target is not None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.stem}-"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, rows: Tensor) -> None:
        """Rows [B, ...] behind those that are there."""
        shape = self.shapes.setdefault(name, [0, *rows.shape[1:]])
        shape[0] += len(rows)
        self.dtypes[name] = rows.dtype
        if self.folder is None:
            self.parts.setdefault(name, []).append(rows)
        else:
            with (self.folder / name).open("ab") as file:
                file.write(_bytes(rows))

    @property
    def exits(self) -> list[str]:
        """Names of the logits of each exit, which become one tensor."""
        return [name for name in self.shapes if name.startswith("logits.")]

    def tensors(self) -> dict[str, Tensor]:
        """All rows, from memory."""
        made = {name: torch.cat(parts) for name, parts in self.parts.items()}
        return {**made, "logits": torch.stack([made.pop(name) for name in self.exits])}

    def write(self, path: Path, rest: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Join `rest` and the files to one."""
        assert self.folder is not None
        folder, exits = self.folder, self.exits
        sources: dict[str, list[str]] = {name: [name] for name in self.shapes if name not in exits}
        sources["logits"] = exits
        shapes = {**self.shapes, "logits": [len(exits), *self.shapes[exits[0]]]}
        dtypes = {**self.dtypes, "logits": self.dtypes[exits[0]]}

        def pieces(name: str) -> Iterator[bytes]:
            for source in sources[name]:
                with (folder / source).open("rb") as file:
                    while piece := file.read(1 << 22):
                        yield piece

        parts = {name: Part(dtypes[name], tuple(shapes[name]), pieces(name)) for name in sources}
        parts |= {name: Part(t.dtype, tuple(t.shape), [_bytes(t)]) for name, t in rest.items()}
        write_parts(path, parts, metadata)


def _assembled(tensors: Mapping[str, Tensor], ids: tuple[str, ...]) -> ExitOutputs:
    features = [tensors[f"features.{i}"] for i in range(len(tensors["logits"]))]
    more = tensors.get("groups"), tensors.get("cut")  # which older files do not have
    return ExitOutputs(features, tensors["logits"], tensors["labels"], tensors["costs"], ids, *more)


def _shape(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """What the cost of a row depends on."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _possible(labels: Tensor, rows: int, classes: int, before: int) -> Tensor:
    if labels.shape != (rows,):
        raise ValueError(f"a batch of {rows} rows came with labels of shape {list(labels.shape)}; give one per row")
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"the label of row {before + place} is {int(labels[place])}; allowed are 0..{classes - 1} with {classes} "
            "classes"
        )
    return labels


def _finite(tensor: Tensor, name: str, before: int) -> Tensor:
    wrong = (~tensor.isfinite()).any(-1)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} of row {before + int(wrong.nonzero()[0])} is not finite; look at its input, or at the training"
        )
    return tensor
