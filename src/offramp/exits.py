"""Exits that were trained for a model: a tuned lens after some of its layers, before the shared final norm and head.

A lens is affine, h + W h + b on the residual state [..., D] (Belrose et al. 2023, arXiv 2303.08112), and begins as
nothing: W = 0 and b = 0. The model itself is untouched, so its full output stays what it is, bit for bit. Beside the
lens there may be a consistency classifier, which says from the readout input alone whether to leave there, and for all
exits a posterior that was fitted on text (`offramp.exit_posterior`). All are kept and saved in float32, with the name
and the fingerprint of the weights they were made for.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp import exit_files
from offramp.exit_files import AGAIN, CONFIG
from offramp.exit_posterior import Posterior
from offramp.packaged import ModelError, first_line

if TYPE_CHECKING:
    from offramp.families import SplitModel

_POSTERIOR = "posterior."  # what its tensors' names begin with
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
        layers: The exit layers, ascending in 1..L-1.
        rank: Rank of the lenses; None: full matrices; 0: no lenses, such as for a model that was itself trained to be
            read out after these layers.
        classifier: Whether there is a consistency classifier after each of the layers.
        model: Name of the model they are for.
        fingerprint: Of its weights.
        settings: How they were trained, as JSON values.
        device: Where they are.

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
        classifier: bool = False,
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
        if rank is not None and not 0 <= rank <= width:
            raise ValueError(
                f"rank is {rank}; allowed are 1..{width}, the model's width, 0 for exits without lenses, or None for "
                "full matrices"
            )
        self.num_layers, self.width, self.rank = num_layers, width, rank
        self.model, self.fingerprint, self.settings = model, fingerprint, dict(settings or {})
        lensed = () if rank == 0 else self.layers
        self.lenses = nn.ModuleDict({str(layer): Lens(width, rank, device=device) for layer in lensed})
        self.classifiers: nn.ModuleDict | None = self._untrained(device) if classifier else None
        self.posterior: Posterior | None = None

    def _untrained(self, device: torch.device | None) -> nn.ModuleDict:
        """A classifier per exit whose logit is 0 for every state."""
        made = nn.ModuleDict({str(layer): nn.Linear(self.width, 1, device=device) for layer in self.layers})
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
        return made

    @classmethod
    def fresh(cls, split: SplitModel, layers: Sequence[int] | None = None, rank: int | None = None) -> Exits:
        """Exits that change nothing yet.

        The first factor of low-rank lenses is drawn at random: seed torch for the same ones.

        Args:
            split: The model they are for.
            layers: The exit layers; None: `default_layers`.
            rank: Rank of the lenses; None: full matrices; 0: no lenses.

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
        if str(layer) not in self.lenses:
            return hidden
        adapted: Tensor = self.lenses[str(layer)](hidden)
        return adapted

    def with_classifiers(self) -> Exits:
        """A copy with untrained classifiers, by which every state has the confidence 1/2; it replaces any there are."""
        made = copy.deepcopy(self)
        made.classifiers = made._untrained(next((p.device for p in self.parameters()), None))
        return made

    def only(self, layers: Sequence[int]) -> Exits:
        """A copy with some of the exits, without a posterior."""
        made = self.with_posterior(None)
        made.layers = tuple(layers)
        for parts in filter(None, (made.lenses, made.classifiers)):
            for name in set(parts) - {str(layer) for layer in layers}:
                del parts[name]
        return made

    def with_posterior(self, posterior: Posterior | None) -> Exits:
        """A copy with a posterior that was fitted for these exits, or with none."""
        made = copy.deepcopy(self)
        made.posterior = posterior
        return made

    def classify(self, layer: int, x: Tensor) -> Tensor:
        """Logit that what is chosen after `layer` is what the last layer would choose: w_l · x + b_l, in float32.

        The classifier of CALM (Schuster et al. 2022, arXiv 2207.07061, section 3.3) and FREE (arXiv 2310.05424). Theirs
        have two classes; the softmax of two logits is the logistic function of their difference, so that one logit is
        the same model.

        Args:
            layer: An exit layer; the classifiers must be there (see `require_classifiers`).
            x: Readout inputs after it, [..., D], as `SplitModel.readout_input` gives them.

        Returns:
            Logits, [...]; their logistic function is the confidence.
        """
        assert self.classifiers is not None
        linear: Any = self.classifiers[str(layer)]
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())[..., 0]

    def weights(self, layer: int) -> int:
        """Weights that one state after `layer` is multiplied with; 0 without a lens."""
        lens: Any = self.lenses[str(layer)] if str(layer) in self.lenses else None
        return 0 if lens is None else int(lens.weights)

    def flops(self, layer: int) -> int:
        """FLOPs that the lens after `layer` adds to reading one state; 0 without a lens."""
        return 2 * self.weights(layer)

    def placed(self, dtype: torch.dtype, device: torch.device) -> Exits:
        """These exits in a model's number format and place: themselves if they are, else a copy not for training."""
        there = all(b.device == device for b in self.buffers())
        if there and all(p.dtype == dtype and p.device == device for p in self.parameters()):
            return self
        made = self.with_posterior(None).to(dtype=dtype, device=device).requires_grad_(False)
        if self.posterior is not None:  # stays in float32
            made.posterior = copy.deepcopy(self.posterior).to(device)
        return made

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
        values = {
            "model": self.model if model is None else model, "num_layers": self.num_layers, "width": self.width,
            "layers": list(self.layers), "rank": self.rank, "classifier": self.classifiers is not None,
            "fingerprint": self.fingerprint if fingerprint is None else fingerprint,
            "settings": self.settings if settings is None else dict(settings),
            **({} if self.posterior is None else {"posterior": self.posterior.settings}),
        }  # fmt: skip
        tensors = {
            name: (t.float() if t.is_floating_point() else t).detach().cpu().contiguous()
            for name, t in self.state_dict().items()
        }
        exit_files.write(folder, values, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Exits:
        """Read exits that `save` wrote; `offramp.load(name, exits=folder)` also sees to it that they fit.

        Returns:
            Exits in float32 on the CPU.

        Raises:
            ModelError: There are none, or a file is missing or damaged.
        """
        values, tensors = exit_files.read(folder)
        file, posterior = Path(folder) / exit_files.WEIGHTS, values.pop("posterior")
        try:
            with torch.device("meta"):
                exits = cls(**values)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the latter from impossible sizes
            raise ModelError(f"{Path(folder) / CONFIG} is damaged ({first_line(error)}); {AGAIN}") from error
        fitted = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_POSTERIOR)}
        expected = {name: t.shape for name, t in exits.state_dict().items()}
        if {name: t.shape for name, t in tensors.items()} != expected:
            raise ModelError(f"{file} does not hold the lenses (or classifiers) {CONFIG} speaks of; {AGAIN}")
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ModelError(f"{file} holds numbers that are not finite: their training diverged; train them again")
        exits.load_state_dict({n: t.to(torch.float32, copy=True) for n, t in tensors.items()}, assign=True)
        if posterior is not None or fitted:
            exits.posterior = exits._fitted(folder, posterior, fitted)
        return exits

    def _fitted(self, folder: str | os.PathLike[str], values: Any, tensors: dict[str, Tensor]) -> Posterior:
        """The posterior of what was read, if it was fitted for these exits."""
        tensors = {name.removeprefix(_POSTERIOR): t.clone() for name, t in tensors.items()}
        try:
            if not isinstance(values, dict) or not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise ValueError("its settings are missing, or numbers are not finite")
            posterior = Posterior(values, tensors)
            if not set(posterior.layers) <= set(self.layers):
                raise ValueError(f"it is for layers {posterior.layers}")
        except (ValueError, TypeError) as error:
            raise ModelError(f"the posterior in {folder} is damaged ({first_line(error)}); {AGAIN}") from error
        if posterior.settings.get("lenses") != fingerprint(self.lenses):
            raise ModelError(
                f"the posterior in {folder} was fitted for other lenses than those beside it; fit it again with: "
                "offramp calibrate --posterior"
            )
        return posterior

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


def require_classifiers(exits: Exits | None, layers: Iterable[int]) -> Exits:
    """The exits, for the confidence "classifier" after some layers.

    Returns:
        The exits themselves.

    Raises:
        ValueError: They have no classifiers, or none after one of the layers.
    """
    if exits is None or exits.classifiers is None:
        what = "the model has no trained exits" if exits is None else "the model's exits have no classifiers"
        raise ValueError(
            f"confidence 'classifier' needs trained classifiers, but {what}; train some with: "
            "offramp train --objective consistency"
        )
    if lacking := [layer for layer in layers if layer not in exits.layers]:
        raise ValueError(
            f"confidence 'classifier' is asked for after layer {lacking[0]}, but the exits have classifiers after "
            f"layers {', '.join(map(str, exits.layers))} only; name some of these as exit_layers, or leave min_layer "
            "and exit_layers away"
        )
    return exits
