"""The only place where `transformers` loads anything: what holds for one load holds for all of them.

No code from a folder or from the hub is run, and nobody is asked on the terminal whether it may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.hub.catalogue import Source, choices
from offramp.hub.messages import ModelError, first_line, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt")
_NEVER: dict[str, Any] = {"trust_remote_code": False}


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Load quietly inside the block; whatever goes wrong becomes a ModelError of one line that says what to do."""
    try:
        with quiet(bars=not source.local):
            yield
    except ModelError:
        raise
    except ImportError as error:  # of a quantisation, for example
        raise ModelError(f"{source.place} needs what is not installed: {first_line(error)}") from error
    except Exception as error:  # each damaged file has an exception type of its own
        place = source.place
        if source.offline is not None:
            raise ModelError(
                f"no model {place!r}: it is no packaged name and no local folder, it is not in the local hub cache, "
                f"and the hub cannot be reached ({source.offline}); {choices(place)}"
            ) from error
        raise ModelError(
            f"{place} could not be loaded, probably because a file is damaged or missing: {first_line(error)}"
        ) from error


@contextmanager
def _without_code(place: str) -> Iterator[None]:
    """Say in our words that code would have to be run: the advice of `transformers`, to trust it, is none here."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{place} needs code of its own (auto_map in its files), which offramp never runs; load a model whose "
            "architecture and tokenizer are part of transformers"
        ) from error


def config_of(source: Source) -> PreTrainedConfig:
    """What a model is made of."""
    from transformers import AutoConfig

    with _without_code(source.place):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **source.where, **_NEVER)
    return config


def model_of(auto: Any, source: Source, **options: Any) -> tuple[Any, set[str]]:
    """A model in evaluation mode, and the names of weights that it needs and the files lack."""
    with _without_code(source.place):
        model, info = auto.from_pretrained(source.place, output_loading_info=True, **source.where, **options, **_NEVER)
    return model.eval(), set(info["missing_keys"])


def model_shaped(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model with weights of no meaning."""
    with _without_code(config.name_or_path):
        return auto.from_config(config, dtype=dtype, **_NEVER)


def tokenizer_of(source: Source) -> Any:
    """The tokenizer beside a model; None for a local folder without one."""
    from transformers import AutoTokenizer

    if source.local and "gguf_file" not in source.where:
        if not any(any(Path(source.place).glob(pattern)) for pattern in _TOKENIZER):
            return None
    with _without_code(source.place):
        return AutoTokenizer.from_pretrained(source.place, **source.where, **_NEVER)


def inside_peft(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`, others themselves; a ValueError if tokens are prepended, which no layer holds."""
    if not hasattr(model, "get_base_model"):
        inside: PreTrainedModel = model
        return inside
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = model.active_peft_config.peft_type
        raise ValueError(f"a PeftModel of type {kind} prepends tokens to every prompt, which is not supported here")
    inside = model.get_base_model()
    return inside
