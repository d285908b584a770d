"""Exits that were trained for a model: a tuned lens after some of its layers, before the shared final norm and head.

A lens is affine, h + W h + b on the residual state [..., D] (Belrose et al. 2023, arXiv 2303.08112), and begins as
nothing: W = 0 and b = 0. The model itself is untouched, so its full output stays what it is, bit for bit. Lenses are
kept and saved in float32, beside the name and the fingerprint of the weights they were made for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.files import replace_folder
from offramp.packaged import ModelError, first_line

if TYPE_CHECKING:
    from offramp.families import SplitModel

SCHEMA = "offramp/exits/1"
CONFIG, WEIGHTS = "exits.json", "exits.safetensors"
_CHUNK = 1 << 22  # elements hashed at a time


# ---------------------------------------------------------------- which layers, which model


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Layers that get an exit unless they are named: from a third of the depth on, evenly, at most eight.

    Early ones are worth having: a lens agrees with the last layer almost as often at a third of the depth as at half of
    it (SmolLM2-135M: .58 after layer 10 of 30, .60 after 15, .68 after 22). More of them would test more than they
    save, since each test of all tokens costs a readout (8 blocks there). L - 1 is not forced in for the same reason: to
    leave there saves one block.

    Args:
        num_layers: L.

    Returns:
        Ascending layers in 1..L-1; none for a single layer. 10, 13, .. 28 of 30; 8, 10, .. 22 of 24; 4, 5, .. 11 of 12.
    """
    first = max(1, num_layers // 3)
    return tuple(range(first, num_layers, max(1, -(-(num_layers - first) // 8))))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's weights, rounded to bfloat16.

    Rounding makes it the same for weights loaded in float32 and in bfloat16; a change below that precision is not seen.
    Every value counts: 135 million take about 0.4 s on one core. Weights shared by two names count once.

    Returns:
        64 hexadecimal digits.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.detach().reshape(-1).split(_CHUNK):
            rounded = piece.to(torch.bfloat16) if piece.is_floating_point() else piece
            digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- lenses


class Lens(nn.Module):
    """h + W h + b on states [..., D]; as made, it changes nothing.

    Args:
        width: D.
        rank: Rank of W, which then is a product [D, r] · [r, D]; None: a full matrix.
        dtype: Number format of the weights. States of another one are worked on in theirs.
        device: Where the weights are.
    """

    def __init__(
        self,
        width: int,
        rank: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(width if rank is None else rank, width, dtype=dtype, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [..., D] as the final norm should see them."""
        x = hidden if self.down is None else F.linear(hidden, self.down.weight.to(hidden))
        return hidden + F.linear(x, self.up.weight.to(hidden), self.up.bias.to(hidden))

    @property
    def weights(self) -> int:
        """Weights that a state is multiplied with; the bias is none."""
        return self.up.weight.numel() + (0 if self.down is None else self.down.weight.numel())


class Exits(nn.Module):
    """The trained exits of one model; made by `fresh`, then trained, or by `load`.

    Args:
        num_layers: L of the model.
        width: D of the model.
        layers: Layers with a lens, ascending in 1..L-1.
        rank: Rank of the lenses; None: full matrices.
        model: Name of the model they are for.
        fingerprint: Of its weights.
        settings: How they were trained, as JSON values.
        device: Where the lenses are.

    Raises:
        ValueError: The layers or the rank do not fit the model.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        layers: Sequence[int],
        rank: int | None = None,
        *,
        model: str = "",
        fingerprint: str = "",
        settings: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the exit layers are {self.layers}; give ascending layers, each once, and at least one")
        if not 1 <= self.layers[0] <= self.layers[-1] < num_layers:
            raise ValueError(
                f"the exit layers are {self.layers}; a model of {num_layers} layers can have exits after layers "
                f"1..{num_layers - 1} (layer {num_layers} is always an exit, leave it out)"
            )
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank is {rank}; allowed are 1..{width}, the model's width, or None for full matrices")
        self.num_layers, self.width, self.rank = num_layers, width, rank
        self.model, self.fingerprint, self.settings = model, fingerprint, dict(settings or {})
        self.lenses = nn.ModuleDict({str(layer): Lens(width, rank, device=device) for layer in self.layers})

    @classmethod
    def fresh(cls, split: SplitModel, layers: Sequence[int] | None = None, rank: int | None = None) -> Exits:
        """Exits that change nothing yet.

        The first factor of low-rank lenses is drawn at random: seed torch for the same ones.

        Args:
            split: The model they are for.
            layers: Layers with a lens; None: `default_layers`.
            rank: Rank of the lenses; None: full matrices.

        Returns:
            Exits in float32 on the model's device.

        Raises:
            ValueError: The layers or the rank do not fit the model.
        """
        layers = default_layers(split.num_layers) if layers is None else layers
        made = cls(split.num_layers, split.shape.width, layers, rank, device=split.device)
        made.model, made.fingerprint = type(split.model).__name__, fingerprint(split.model)
        return made

    def adapt(self, layer: int, hidden: Tensor) -> Tensor:
        """States [..., D] after `layer`, through its lens; unchanged where there is none."""
        if layer not in self.layers:
            return hidden
        adapted: Tensor = self.lenses[str(layer)](hidden)
        return adapted

    def weights(self, layer: int) -> int:
        """Weights that one state after `layer` is multiplied with; 0 without a lens."""
        lens: Any = self.lenses[str(layer)] if layer in self.layers else None
        return 0 if lens is None else int(lens.weights)

    def flops(self, layer: int) -> int:
        """FLOPs that the lens after `layer` adds to reading one state; 0 without a lens."""
        return 2 * self.weights(layer)

    def placed(self, dtype: torch.dtype, device: torch.device) -> Exits:
        """These exits in a model's number format and place: themselves if they are, else a copy not for training."""
        if all(p.dtype == dtype and p.device == device for p in self.parameters()):
            return self
        return copy.deepcopy(self).to(dtype=dtype, device=device).requires_grad_(False)

    # ------------------------------------------------------------ files

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any] | None = None,
        model: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Write `exits.json` and `exits.safetensors`: the folder appears complete, or stays what it was.

        Args:
            folder: A new or empty folder, or one with nothing but exits, which are replaced.
            settings: How they were trained, as JSON values; None: `self.settings`.
            model: Name of the model they are for; None: `self.model`.
            fingerprint: Of its weights; None: `self.fingerprint`.

        Raises:
            FileExistsError: There is something else of that name; it is left alone.
        """
        from safetensors.torch import save_file

        target = Path(folder).expanduser().resolve()
        if target.exists() and not _may_go(target):
            raise FileExistsError(
                f"{folder} exists and holds something else than exits, which is not replaced; name a new folder"
            )
        values = {
            "schema": SCHEMA, "model": self.model if model is None else model, "num_layers": self.num_layers,
            "width": self.width, "layers": list(self.layers), "rank": self.rank,
            "fingerprint": self.fingerprint if fingerprint is None else fingerprint,
            "settings": self.settings if settings is None else dict(settings),
        }  # fmt: skip
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}

        def write(temporary: Path) -> None:
            save_file(tensors, temporary / WEIGHTS)
            (temporary / WEIGHTS).chmod(0o644)  # it is written for its owner's eyes only
            (temporary / CONFIG).write_text(text, encoding="utf-8")

        replace_folder(target, write)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Exits:
        """Read exits that `save` wrote; `offramp.load(name, exits=folder)` also sees to it that they fit.

        Returns:
            Exits in float32 on the CPU.

        Raises:
            ModelError: There are none, or a file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = Path(folder).expanduser()
        values = _described(place)
        file = place / WEIGHTS
        try:
            with torch.device("meta"):
                exits = cls(**values)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the latter from impossible sizes
            raise ModelError(f"{place / CONFIG} is damaged ({first_line(error)}); {_AGAIN}") from error
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is missing or damaged ({first_line(error)}); {_AGAIN}") from error
        expected = {name: t.shape for name, t in exits.state_dict().items()}
        if {name: t.shape for name, t in tensors.items()} != expected:
            raise ModelError(f"{file} does not hold the lenses that {CONFIG} speaks of; {_AGAIN}")
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ModelError(f"{file} holds numbers that are not finite: their training diverged; train them again")
        exits.load_state_dict({n: t.to(torch.float32, copy=True) for n, t in tensors.items()}, assign=True)
        return exits

    def require(self, split: SplitModel, name: str, folder: str | os.PathLike[str]) -> None:
        """Raise a ModelError unless these exits, from `folder`, were made for the model called `name`."""
        advice = "load the model they were made for, or train exits for this one"
        if (self.num_layers, self.width) != (split.num_layers, split.shape.width):
            raise ModelError(
                f"the exits in {folder} were made for {self.model} ({self.num_layers} layers of width {self.width}), "
                f"but {name} has {split.num_layers} of width {split.shape.width}; {advice}"
            )
        if (found := fingerprint(split.model)) != self.fingerprint:
            raise ModelError(
                f"the exits in {folder} were made for {self.model} with weights {self.fingerprint[:12]}, but those of "
                f"{name} are {found[:12]} (fingerprints); {advice}"
            )


_AGAIN = "save the exits again, or copy their whole folder"


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


def _described(folder: Path) -> dict[str, Any]:
    """What `exits.json` says, as the arguments of `Exits`, of the right types."""
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} holds no exits: there is no {CONFIG}; name a folder that save_exits wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged ({first_line(error)}); {_AGAIN}") from error
    schema = values.pop("schema", None) if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ModelError(f"{file} has the schema {schema!r}, not {SCHEMA!r}: no exits, or those of another version")
    types = {"model": str, "fingerprint": str, "num_layers": int, "width": int, "layers": list, "settings": dict}
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    wrong += [] if type(values.get("rank", "")) in (int, type(None)) else ["rank"]
    wrong += [] if wrong or all(type(layer) is int for layer in values["layers"]) else ["layers"]
    if wrong:
        raise ModelError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type; {_AGAIN}")
    return {name: values[name] for name in (*types, "rank")}
