"""The folder a classifier is saved in; it is loaded again without a network and without the encoder it began with.

`config.json` says what is built, `model.safetensors` holds all weights. Beside them stand, in `encoder/`, the encoder's
own configuration and tokenizer as transformers writes them, in `preprocessor_config.json` how images are prepared, and
in `trained_on.json` how the training data was read and divided, in `training_rows.safetensors` hashes of its rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.heads import HeadConfig
from offramp.classifiers.msdnet import MSDNet, MSDNetConfig
from offramp.classifiers.projected import ProjectedConfig, ProjectedHead
from offramp.classifiers.small_cnn import SmallCNN, SmallCNNConfig
from offramp.classifiers.sources import PREPROCESSING
from offramp.families.backbone import Backbone
from offramp.hub.devices import named_device
from offramp.hub.messages import ModelError, first_line, quiet
from offramp.hub.models import named_dtype
from offramp.hub.pretrained import config_of, model_shaped, tokenizer_of
from offramp.hub.source import Source
from offramp.runs import artefact
from offramp.runs.bounded import read_object
from offramp.runs.codec import decode, encode
from offramp.runs.files import write_json
from offramp.runs.tensor_files import not_finite_in, read_tensors, write_tensors

SCHEMA = "offramp/classifier/1"
CONFIG, WEIGHTS, ENCODER, TRAINED_ON = "config.json", "model.safetensors", "encoder", "trained_on.json"
ROWS = "training_rows.safetensors"
AGAIN = "save the classifier again, or copy its whole folder"
KIND = artefact.Kind(
    "a classifier", CONFIG, WEIGHTS, frozenset((ENCODER, PREPROCESSING, TRAINED_ON, ROWS)), "offramp/classifier/",
    AGAIN, "name a folder that save wrote",
)  # fmt: skip
OWN: dict[str, tuple[Any, Any]] = {"msdnet": (MSDNet, MSDNetConfig), "small-cnn": (SmallCNN, SmallCNNConfig)}
"""Networks of our own and their configurations, by the kind that is written."""


def save(classifier: EarlyExitClassifier, folder: str | os.PathLike[str]) -> None:
    """Write a classifier: the folder appears complete, or stays what it was.

    Args:
        classifier: On any device; the number format of its weights is kept.
        folder: A new or empty folder, or one with a classifier, which is replaced.

    Raises:
        FileExistsError: There is something else of that name; it is left alone.
        ValueError: A weight is NaN or infinite.
    """
    backbone: Any = classifier.backbone
    own = next((kind for kind, (network, _) in OWN.items() if isinstance(backbone, network)), None)
    values = {
        "backbone": {"kind": own, **encode(backbone.config)} if own else {"kind": "encoder"},
        "exits": list(classifier.layers[:-1]),
        "labels": list(classifier.labels),
        "head": encode(classifier.head_config),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    if isinstance(last := classifier.heads[-1], ProjectedHead):
        values["projected"] = encode(last.config)
    weights = classifier.state_dict()
    if (broken := not_finite_in(weights)) is not None:
        raise ValueError(
            f"{broken} holds NaN or infinity, so the classifier is not saved: its training diverged; train it again, "
            "with a smaller learning rate"
        )

    def put(temporary: Path) -> None:
        if own is None:
            backbone.config.save_pretrained(temporary / ENCODER)
        if classifier.tokenizer is not None:
            classifier.tokenizer.save_pretrained(temporary / ENCODER)
        for name, given in ((PREPROCESSING, classifier.preprocessing), (TRAINED_ON, classifier.trained_on)):
            if given:
                write_json(temporary / name, given)
        if classifier.training_rows is not None:
            write_tensors(temporary / ROWS, {"rows": classifier.training_rows})

    artefact.write(folder, SCHEMA, values, weights, KIND, put)


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


def training_rows(folder: Path) -> Tensor | None:
    """Hashes of the rows that a saved classifier was trained on, [N]; None: it does not say."""
    return read_tensors(folder / ROWS, AGAIN)[1]["rows"] if (folder / ROWS).is_file() else None


def _json(file: Path) -> dict[str, Any]:
    """Its content; nothing if it is not there."""
    return read_object(file, AGAIN) if file.is_file() else {}


def _encoder(folder: Path, dtype: torch.dtype) -> Backbone:
    from transformers import AutoModel

    from offramp.families.encoders import SplitEncoder

    return SplitEncoder(model_shaped(AutoModel, config_of(_beside(folder)), dtype))


def _beside(folder: Path) -> Source:
    """Where an encoder's settings and tokenizer are kept."""
    return Source(str(folder), True, {"local_files_only": True})
