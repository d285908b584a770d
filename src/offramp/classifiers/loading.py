"""A saved classifier, built again without a network and without the encoder it began with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.projected import ProjectedConfig, ProjectedHead
from offramp.classifiers.saving import (
    AGAIN,
    CONFIG,
    ENCODER,
    KIND,
    OWN,
    PREPROCESSING,
    SCHEMA,
    TRAINED_ON,
    WEIGHTS,
    training_rows,
)  # fmt: skip
from offramp.families.backbone import Backbone, HeadConfig, SplitEncoder
from offramp.hub.messages import ModelError, first_line, quiet
from offramp.hub.pretrained import Source, config_of, model_shaped, named_device, named_dtype, tokenizer_of
from offramp.runs import artefact
from offramp.runs.bounded import read_object
from offramp.runs.codec import decode
from offramp.runs.tensor_files import not_finite_in


def load(folder: str | os.PathLike[str], *, device: str | torch.device | None = None) -> EarlyExitClassifier:
    """Load a classifier that was saved, in evaluation mode.

    Args:
        folder: What `EarlyExitClassifier.save` wrote.
        device: Where to put it; None: the first CUDA GPU if there is one, else the CPU.

    Returns:
        The classifier, with its tokenizer and preprocessing settings.

    Raises:
        ModelError: There is none, it is damaged, or a weight is NaN or infinite.
    """
    place = Path(folder).expanduser()
    try:
        values, weights = artefact.read(place, SCHEMA, KIND, without_digest=True)
        with quiet():
            _require_shapes(place, values, weights)
            classifier = _build(place, values)
        classifier.load_state_dict(weights)
        if (broken := not_finite_in(weights)) is not None:
            raise ModelError(
                f"{place / WEIGHTS}: {broken} holds NaN or infinity, so its training diverged or the file is damaged; "
                "train it again, or copy its whole folder"
            )
    except ModelError:
        raise
    except Exception as error:  # each damaged file has an exception type of its own
        told = isinstance(error, ValueError) and str(place) in str(error)
        raise ModelError(str(error) if told else f"{place} is damaged ({first_line(error)}); {AGAIN}") from error
    return classifier.to(named_device(device)).eval()


def title(model: str | os.PathLike[str]) -> str:
    """What a classifier in a folder is called: after its run, `runs/train-NAME/model`."""
    place = Path(model).expanduser().resolve()
    return (place.parent if place.name == "model" else place).name.removeprefix("train-")


def run_folder(verb: str, model: str | os.PathLike[str], *more: str) -> Path:
    """Where a run on a classifier is written by default, runs/VERB-NAME-MORE."""
    return Path("runs") / "-".join((verb, title(model), *more))


def _require_shapes(folder: Path, values: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse, before any memory is asked for, a description of another network than the weights are of."""
    most = max(1024, len(weights), *(size for tensor in weights.values() for size in tensor.shape))
    for name, value in values["backbone"].items():
        if any(type(size) in (int, float) and size > most for size in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name} is {value!r:.60}, more than its weights are")
    with torch.device("meta"):
        described = _build(folder, values).state_dict()
    if {name: t.shape for name, t in described.items()} != {name: t.shape for name, t in weights.items()}:
        raise ValueError(f"{WEIGHTS} does not hold the network {CONFIG} speaks of")


def _build(folder: Path, values: dict[str, Any]) -> EarlyExitClassifier:
    """A classifier of the right shape, with weights of no meaning."""
    shape = dict(values["backbone"])
    kind, dtype = shape.pop("kind"), named_dtype(values["dtype"])
    with torch.random.fork_rng(devices=[]):  # loading draws no random numbers that anyone sees
        if kind in OWN:
            network, config = OWN[kind]
            backbone: Backbone = network(decode(config, shape)).to(dtype)
        else:
            backbone = _encoder(folder / ENCODER, dtype)
        classifier = EarlyExitClassifier(
            backbone,
            values["exits"],
            labels=values["labels"],
            head=decode(HeadConfig, values["head"]),
            tokenizer=tokenizer_of(_beside(folder / ENCODER)),
            preprocessing=_json(folder / PREPROCESSING),
        )
        if (projected := values.get("projected")) is not None:
            classifier.heads[-1] = ProjectedHead(
                backbone, classifier.head_config.pooling, classifier.num_classes, decode(ProjectedConfig, projected)
            )
    classifier.trained_on, classifier.training_rows = _json(folder / TRAINED_ON), training_rows(folder)
    return classifier


def _json(file: Path) -> dict[str, Any]:
    """Its content; nothing if it is not there."""
    return read_object(file, AGAIN) if file.is_file() else {}


def _encoder(folder: Path, dtype: torch.dtype) -> Backbone:
    from transformers import AutoModel

    return SplitEncoder(model_shaped(AutoModel, config_of(_beside(folder)), dtype))


def _beside(folder: Path) -> Source:
    """Where an encoder's settings and tokenizer are kept."""
    return Source(str(folder), True, {"local_files_only": True})
