"""The folder that exits are saved in: a description, `exits.json`, and their weights, `exits.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.core.adapters import Branch
from offramp.core.drafter import Drafter
from offramp.core.exits import Exits, listed_once
from offramp.families import SplitModel
from offramp.hub.exit_posterior import Posterior
from offramp.hub.messages import ModelError, first_line
from offramp.runs import artefact
from offramp.runs.digests import fingerprint
from offramp.runs.tensor_files import not_finite_in

SCHEMA = "offramp/exits/1"
CONFIG, WEIGHTS = "exits.json", "exits.safetensors"
AGAIN = "save the exits again, or copy their whole folder"
MOST_LAYERS = 10_000
"""A description that speaks of more is damaged."""
_BRANCHES = "branches."
_DRAFTER = "drafter."
_POSTERIOR = "posterior."  # what its tensors' names begin with
KIND = artefact.Kind(
    "exits", CONFIG, WEIGHTS, family="offramp/exits/", again=AGAIN, saved="name a folder that save_exits wrote"
)


def save_exits(
    exits: Exits,
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write exits with all that belongs to them, as a whole or not at all; None: what the exits say of themselves."""
    values = {
        "model": exits.model if model is None else model, "num_layers": exits.num_layers, "width": exits.width,
        "layers": list(exits.layers), "rank": exits.rank, "classifier": exits.classifiers is not None,
        "fingerprint": exits.fingerprint if fingerprint is None else fingerprint,
        "settings": exits.settings if settings is None else dict(settings),
        **({"blocks": exits.blocks} if exits.blocks else {}),
        **({} if exits.drafter is None else {"drafter": len(exits.drafter.branch.blocks())}),
        **({} if exits.posterior is None else {"posterior": exits.posterior.settings}),
        **({} if exits.frequent is None else {"frequent": len(exits.frequent)}),
    }  # fmt: skip
    tensors = {name: t.detach().to(_kept_in(name, t)).cpu().contiguous() for name, t in exits.state_dict().items()}
    artefact.write(folder, SCHEMA, values, tensors, KIND)


def _kept_in(name: str, tensor: Tensor) -> torch.dtype:
    """The number format of a tensor in the file: branches and drafters, which are large, take half of the room."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.bfloat16 if name.startswith((_BRANCHES, _DRAFTER)) else torch.float32


def load_exits(folder: str | os.PathLike[str]) -> Exits:
    """Exits that `save_exits` wrote, in float32 on the CPU; a ModelError if there are none or they are damaged."""
    values, tensors = _read(folder)
    file, posterior, count = Path(folder) / WEIGHTS, values.pop("posterior"), values.pop("frequent")
    try:
        with torch.device("meta"):
            exits = Exits(**values)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the latter from impossible sizes
        raise ModelError(f"{Path(folder) / CONFIG} is damaged ({first_line(error)}); {AGAIN}") from error
    fitted = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_POSTERIOR)}
    frequent = tensors.pop("frequent", None)
    if exits.blocks:
        for layer in exits.layers:
            lacks = f"{file} lacks blocks of the exit after layer {layer}; {AGAIN}"
            exits.branches[str(layer)] = _branch(tensors, f"{_BRANCHES}{layer}.", exits.blocks, lacks)
    if values["drafter"]:
        with torch.device("meta"):
            lacks = f"{file} lacks blocks of the drafter; {AGAIN}"
            exits.drafter = Drafter(exits.width, _branch(tensors, f"{_DRAFTER}branch.", values["drafter"], lacks))
    expected = {name: t.shape for name, t in exits.state_dict().items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise ModelError(f"{file} does not hold the lenses (or classifiers) {CONFIG} speaks of; {AGAIN}")
    if not_finite_in(tensors) is not None:
        raise ModelError(f"{file} holds numbers that are not finite: their training diverged; train them again")
    exits.load_state_dict({n: t.to(torch.float32, copy=True) for n, t in tensors.items()}, assign=True)
    if posterior is not None or fitted:
        exits.posterior = _posterior(exits, folder, posterior, fitted)
    if frequent is not None or count is not None:
        exits.frequent = _frequent(folder, count, frequent)
    return exits


def _branch(tensors: Mapping[str, Tensor], begin: str, blocks: int, lacks: str) -> Branch:
    """A branch with the tensors that are there for it; whether these fit a model is for the model to see."""
    found: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(begin).partition("/")
        if name.startswith(begin) and number.isdecimal() and int(number) < blocks:
            found[int(number)][rest.replace("/", ".")] = tensor.float()
    if not all(found):
        raise ModelError(lacks)
    return Branch(found)


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was saved: the arguments of `Exits`, of the right types, "posterior" and "frequent", and the tensors."""
    try:
        values, tensors = artefact.read(folder, SCHEMA, KIND, without_digest=True)
    except ValueError as error:
        raise ModelError(str(error)) from error
    file = Path(folder).expanduser() / CONFIG
    values = {"classifier": False, "blocks": 0, "drafter": 0, **values}  # younger than the schema, as posteriors are
    types = {
        "model": str, "fingerprint": str, "num_layers": int, "width": int, "layers": list, "settings": dict,
        "classifier": bool, "blocks": int, "drafter": int,
    }  # fmt: skip
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    wrong += [] if type(values.get("rank", "")) in (int, type(None)) else ["rank"]
    wrong += [] if wrong or all(type(layer) is int for layer in values["layers"]) else ["layers"]
    if wrong:
        raise ModelError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type; {AGAIN}")
    if len(values["layers"]) > MOST_LAYERS:
        raise ModelError(f"{file} is damaged: it speaks of {len(values['layers']):,} exits; {AGAIN}")
    arguments = {name: values[name] for name in (*types, "rank")}
    return {**arguments, **{name: values.get(name) for name in ("posterior", "frequent")}}, tensors


def _frequent(folder: str | os.PathLike[str], count: Any, tokens: Tensor | None) -> Tensor:
    """The list of frequent tokens of what was read, of which the description says how many there are."""
    try:
        if tokens is None or type(count) is not int or not torch.equal(found := listed_once(tokens), tokens):
            raise ValueError("tokens and their number do not belong together")
        if len(found) != count:
            raise ValueError(f"{len(found)} tokens, not {count}")
    except ValueError as error:
        raise ModelError(f"the frequent tokens in {folder} are damaged ({first_line(error)}); {AGAIN}") from error
    return found.clone()


def _posterior(exits: Exits, folder: str | os.PathLike[str], values: Any, tensors: dict[str, Tensor]) -> Posterior:
    """The posterior of what was read, if it was fitted for these exits."""
    tensors = {name.removeprefix(_POSTERIOR): t.clone() for name, t in tensors.items()}
    try:
        if not isinstance(values, dict) or not_finite_in(tensors) is not None:
            raise ValueError("its settings are missing, or numbers are not finite")
        posterior = Posterior(values, tensors)
        if not set(posterior.layers) <= set(exits.layers):
            raise ValueError(f"it is for layers {posterior.layers}")
    except (ValueError, TypeError) as error:
        raise ModelError(f"the posterior in {folder} is damaged ({first_line(error)}); {AGAIN}") from error
    if posterior.settings.get("lenses") != fingerprint(exits.adapters):
        raise ModelError(
            f"the posterior in {folder} was fitted for other lenses than those beside it; fit it again with: "
            "offramp calibrate --posterior"
        )
    return posterior


def require_made_for(exits: Exits, split: SplitModel, name: str, folder: str | os.PathLike[str]) -> None:
    """Raise a ModelError unless exits, from `folder`, were made for the model called `name`."""
    advice = "load the model they were made for, or train exits for this one"
    if (exits.num_layers, exits.width) != (split.num_layers, split.shape.width):
        raise ModelError(
            f"the exits in {folder} were made for {exits.model} ({exits.num_layers} layers of width {exits.width}), "
            f"but {name} has {split.num_layers} of width {split.shape.width}; {advice}"
        )
    if (found := fingerprint(split.model)) != exits.fingerprint:
        if split.model.dtype == torch.float16:
            advice += "; if they were: float16 changes small weights, load it in float32 or bfloat16"
        raise ModelError(
            f"the exits in {folder} were made for {exits.model} with weights {exits.fingerprint[:12]}, but those of "
            f"{name} are {found[:12]} (fingerprints); {advice}"
        )
