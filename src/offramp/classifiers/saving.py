"""The files that a classifier is made of: a pretrained encoder it begins with, and the folder that it is saved in.

Encoders come by packaged name, local folder or hub id. In the folder, which `offramp.classifiers.loading` reads,
`config.json` says what is built, `model.safetensors` holds all weights. Beside them stand, in `encoder/`, the encoder's
own configuration and tokenizer as transformers writes them, in `preprocessor_config.json` how images are prepared, and
in `trained_on.json` how the training data was read and divided, in `training_rows.safetensors` hashes of its rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.classifiers.convolutional import MSDNet, MSDNetConfig, SmallCNN, SmallCNNConfig
from offramp.classifiers.projected import ProjectedHead
from offramp.families.backbone import ENCODERS
from offramp.hub.messages import ModelError
from offramp.hub.model_sources import find
from offramp.hub.pretrained import Source, config_of, loading, model_of, tokenizer_of
from offramp.runs import artefact
from offramp.runs.bounded import read_object
from offramp.runs.codec import encode
from offramp.runs.files import write_json
from offramp.runs.tensor_files import not_finite_in, read_tensors, write_tensors

PREPROCESSING = "preprocessor_config.json"
"""File of an image processor's settings."""
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


def load_encoder(source: str | os.PathLike[str]) -> tuple[Any, Any, dict[str, Any]]:
    """An encoder in float32 with what prepares its inputs. No code from a folder or from the hub is run.

    Args:
        source: Packaged name ("minilm"), local folder or hub id.

    Returns:
        The encoder in evaluation mode, its tokenizer or None, and the settings of its image processor, or none.

    Raises:
        ModelError: There is no such model, or it is damaged, incomplete or no encoder.
    """
    import torch
    from transformers import AutoModel

    found = find(source)
    with loading(found):
        config = config_of(found)
        if (kind := config.model_type) not in ENCODERS:
            raise ModelError(f"{found.place} is a {kind} model; classifiers can be made of {', '.join(ENCODERS)}")
        model, info = model_of(AutoModel, found, config=config, dtype=torch.float32)
        tokenizer = tokenizer_of(found) if model.main_input_name == "input_ids" else None
        preprocessing = _preprocessing(found) if model.main_input_name == "pixel_values" else {}
    if missing := sorted(name for name in info if not name.startswith("pooler.")):
        raise ModelError(
            f"{found.place} lacks {len(missing)} of the weights a {kind} encoder needs "
            f"({', '.join(missing[:3])}); is it of another architecture?"
        )
    return model, tokenizer, preprocessing


def _preprocessing(source: Source) -> dict[str, Any]:
    """The settings as a dictionary: an image processor itself would ask for more packages."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = Path(source.place, PREPROCESSING)
    if not source.local:
        try:
            file = Path(hf_hub_download(source.place, PREPROCESSING, local_files_only=source.where["local_files_only"]))
        except EntryNotFoundError:
            return {}
    return read_object(file, "name another folder") if file.is_file() else {}


def save(classifier: Any, folder: str | os.PathLike[str]) -> None:
    """Write a classifier: the folder appears complete, or stays what it was.

    Args:
        classifier: An `EarlyExitClassifier` on any device; the number format of its weights is kept.
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


def training_rows(folder: Path) -> Tensor | None:
    """Hashes of the rows that a saved classifier was trained on, [N]; None: it does not say."""
    return read_tensors(folder / ROWS, AGAIN)[1]["rows"] if (folder / ROWS).is_file() else None
