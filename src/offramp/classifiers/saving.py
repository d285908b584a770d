"""The folder a classifier is saved in; it is loaded again without a network and without the encoder it began with.

`config.json` says what is built, `model.safetensors` holds all weights. Beside them stand, in `encoder/`, the encoder's
own configuration and tokenizer as transformers writes them, in `preprocessor_config.json` how images are prepared, and
in `trained_on.json` how the training data was read and divided, in `training_rows.safetensors` hashes of its rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.backbone import Backbone
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.heads import HeadConfig
from offramp.classifiers.msdnet import MSDNet, MSDNetConfig
from offramp.classifiers.projected import ProjectedConfig, ProjectedHead
from offramp.classifiers.small_cnn import SmallCNN, SmallCNNConfig
from offramp.classifiers.sources import PREPROCESSING
from offramp.devices import named_device
from offramp.files import replace_folder, write_json, write_tensors
from offramp.model_sources import Source
from offramp.models import named_dtype
from offramp.packaged import ModelError, first_line, quiet
from offramp.pretrained import config_of, model_shaped, tokenizer_of

SCHEMA = "offramp/classifier/1"
CONFIG, WEIGHTS, ENCODER, TRAINED_ON = "config.json", "model.safetensors", "encoder", "trained_on.json"
ROWS = "training_rows.safetensors"
AGAIN = "save the classifier again, or copy its whole folder"
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
    target = Path(folder).expanduser().resolve()
    if target.exists() and not _may_go(target):
        raise FileExistsError(
            f"{folder} exists and holds something else than a classifier, which is not replaced; name a new folder"
        )
    backbone: Any = classifier.backbone
    own = next((kind for kind, (network, _) in OWN.items() if isinstance(backbone, network)), None)
    values = {
        "schema": SCHEMA,
        "backbone": {"kind": own, **backbone.config.as_dict()} if own else {"kind": "encoder"},
        "exits": list(classifier.layers[:-1]),
        "labels": list(classifier.labels),
        "head": classifier.head_config.as_dict(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    if isinstance(last := classifier.heads[-1], ProjectedHead):
        values["projected"] = last.config.as_dict()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    if (broken := not_finite_in(weights)) is not None:
        raise ValueError(
            f"{broken} holds NaN or infinity, so the classifier is not saved: its training diverged; train it again, "
            "with a smaller learning rate"
        )

    def put(temporary: Path) -> None:
        write_tensors(temporary / WEIGHTS, weights)
        write_json(temporary / CONFIG, values)
        if own is None:
            backbone.config.save_pretrained(temporary / ENCODER)
        if classifier.tokenizer is not None:
            classifier.tokenizer.save_pretrained(temporary / ENCODER)
        for name, given in ((PREPROCESSING, classifier.preprocessing), (TRAINED_ON, classifier.trained_on)):
            if given:
                write_json(temporary / name, given)
        if classifier.training_rows is not None:
            write_tensors(temporary / ROWS, {"rows": classifier.training_rows})

    replace_folder(target, put)


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
    from safetensors.torch import load_file

    place = Path(folder).expanduser()
    if not (place / CONFIG).is_file():
        raise ModelError(f"{place} holds no classifier: there is no {CONFIG}; name a folder that save wrote")
    values = _description(place)
    if values.get("schema") != SCHEMA:
        raise ModelError(
            f"{place / CONFIG} has the schema {values.get('schema')!r}, not {SCHEMA!r}: no early-exit classifier, or "
            "one of another version"
        )
    try:
        weights = load_file(place / WEIGHTS)
        with quiet():
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
        raise ModelError(f"{place} is damaged ({first_line(error)}); {AGAIN}") from error
    return classifier.to(named_device(device)).eval()


def not_finite_in(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first of these tensors that holds NaN or infinity; None: none does."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def _description(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG} is damaged ({first_line(error)}); {AGAIN}") from error
    return values if isinstance(values, dict) else {}


def _build(folder: Path, values: dict[str, Any]) -> EarlyExitClassifier:
    """A classifier of the right shape, with weights of no meaning."""
    shape = dict(values["backbone"])
    kind, dtype = shape.pop("kind"), named_dtype(values["dtype"])
    with torch.random.fork_rng(devices=[]):  # loading draws no random numbers that anyone sees
        if kind in OWN:
            network, config = OWN[kind]
            backbone: Backbone = network(config(**shape)).to(dtype)
        else:
            backbone = _encoder(folder / ENCODER, dtype)
        classifier = EarlyExitClassifier(
            backbone,
            values["exits"],
            labels=values["labels"],
            head=HeadConfig.from_dict(values["head"]),
            tokenizer=tokenizer_of(_beside(folder / ENCODER)),
            preprocessing=_json(folder / PREPROCESSING),
        )
        if (projected := values.get("projected")) is not None:
            classifier.heads[-1] = ProjectedHead(
                backbone, classifier.head_config.pooling, classifier.num_classes, ProjectedConfig.from_dict(projected)
            )
    classifier.trained_on, classifier.training_rows = _json(folder / TRAINED_ON), training_rows(folder)
    return classifier


def training_rows(folder: Path) -> Tensor | None:
    """Hashes of the rows that a saved classifier was trained on, [N]; None: it does not say."""
    from safetensors.torch import load_file

    return load_file(folder / ROWS)["rows"] if (folder / ROWS).is_file() else None


def _json(file: Path) -> dict[str, Any]:
    """Its content; nothing if it is not there."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _encoder(folder: Path, dtype: torch.dtype) -> Backbone:
    from transformers import AutoModel

    from offramp.families.encoders import SplitEncoder

    return SplitEncoder(model_shaped(AutoModel, config_of(_beside(folder)), dtype))


def _beside(folder: Path) -> Source:
    """Where an encoder's settings and tokenizer are kept."""
    return Source(str(folder), True, {"local_files_only": True})


def _may_go(folder: Path) -> bool:
    """Whether a folder is empty, or a classifier and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names <= {CONFIG, WEIGHTS, ENCODER, PREPROCESSING, TRAINED_ON, ROWS}:
        return False
    try:
        return not names or str(_description(folder).get("schema")).startswith("offramp/classifier/")
    except ModelError:
        return False
