"""Pretrained encoders by packaged name, local folder or hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from offramp.models import choices, hub_problem, resolve
from offramp.packaged import ModelError, first_line, quiet

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt")
"""Files that show that there is a tokenizer."""
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
    from transformers import AutoConfig, AutoModel

    found, local = resolve(source)
    offline = None if local else hub_problem(found)
    options: dict[str, Any] = {"local_files_only": local or offline is not None, "trust_remote_code": False}
    try:
        with quiet(bars=not local):
            config = AutoConfig.from_pretrained(found, **options)
            _require_family(config.model_type, found)
            model, info = AutoModel.from_pretrained(
                found, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
            tokenizer = _tokenizer(found, model.main_input_name == "input_ids", options, local=local)
            preprocessing = _preprocessing(found, model.main_input_name == "pixel_values", options, local=local)
    except ModelError:
        raise
    except Exception as error:  # each damaged file has an exception type of its own
        if offline is not None:
            raise ModelError(
                f"no model {found!r}: it is no packaged name and no local folder, it is not in the local hub cache, "
                f"and the hub cannot be reached ({offline}); {choices()}"
            ) from error
        raise ModelError(
            f"{found} could not be loaded, probably because a file is damaged or missing: {first_line(error)}"
        ) from error
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise ModelError(
            f"{found} lacks {len(missing)} of the weights a {config.model_type} encoder needs "
            f"({', '.join(missing[:3])}); is it of another architecture?"
        )
    return model.eval(), tokenizer, preprocessing


def _require_family(name: str, source: str) -> None:
    from offramp.families.encoders import FAMILIES

    if name not in FAMILIES:
        raise ModelError(f"{source} is a {name} model; classifiers can be made of {', '.join(FAMILIES)}")


def _tokenizer(source: str, reads_text: bool, options: dict[str, Any], *, local: bool) -> Any:
    from transformers import AutoTokenizer

    if not reads_text or (local and not any(any(Path(source).glob(pattern)) for pattern in TOKENIZER)):
        return None
    return AutoTokenizer.from_pretrained(source, **options)


def _preprocessing(source: str, reads_images: bool, options: dict[str, Any], *, local: bool) -> dict[str, Any]:
    """The settings as a dictionary: an image processor itself would ask for more packages."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if not reads_images:
        return {}
    file = Path(source, PREPROCESSING)
    if not local:
        try:
            file = Path(hf_hub_download(source, PREPROCESSING, local_files_only=options["local_files_only"]))
        except EntryNotFoundError:
            return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
