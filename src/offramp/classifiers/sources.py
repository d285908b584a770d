"""Pretrained encoders by packaged name, local folder or hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offramp.hub.messages import ModelError
from offramp.hub.model_sources import find
from offramp.hub.pretrained import Source, config_of, loading, model_of, tokenizer_of
from offramp.runs.bounded import read_object

PREPROCESSING = "preprocessor_config.json"
"""File of an image processor's settings."""


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
        _require_family(config.model_type, found.place)
        model, info = model_of(AutoModel, found, config=config, dtype=torch.float32)
        tokenizer = tokenizer_of(found) if model.main_input_name == "input_ids" else None
        preprocessing = _preprocessing(found) if model.main_input_name == "pixel_values" else {}
    if missing := sorted(name for name in info if not name.startswith("pooler.")):
        raise ModelError(
            f"{found.place} lacks {len(missing)} of the weights a {config.model_type} encoder needs "
            f"({', '.join(missing[:3])}); is it of another architecture?"
        )
    return model, tokenizer, preprocessing


def _require_family(name: str, source: str) -> None:
    from offramp.families.encoders import FAMILIES

    if name not in FAMILIES:
        raise ModelError(f"{source} is a {name} model; classifiers can be made of {', '.join(FAMILIES)}")


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
    found = read_object(file, "name another folder") if file.is_file() else {}
    return found
