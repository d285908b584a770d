"""Load a model by packaged name, local folder or hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never, get_args

from offramp.core.engine import Engines
from offramp.hub.exit_files import load_exits, require_made_for
from offramp.hub.messages import ModelError
from offramp.hub.model_sources import find
from offramp.hub.pretrained import (
    DTYPES,
    PACKAGED,
    config_of,
    loading,
    model_of,
    named_device,
    named_dtype,
    rounded_dtype,
    tokenizer_of,
)
from offramp.values import choice, listed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from offramp.core.language_model import LanguageModel

ATTENTION = ("sdpa", "eager")
"""Implementations of attention that give the same text with exits as without."""
_SPREAD = ("balanced", "balanced_low_0", "sequential")

_ELSEWHERE = {
    "torch_dtype": "it is called dtype here",
    "load_in_8bit": "give quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "give quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)",
    "trust_remote_code": "code that comes with a model is never run",
    "low_cpu_mem_usage": "weights are always loaded without a second copy; leave it out",
    "max_memory": "the model must lie on one device: name it by device",
    "offload_folder": "the model must lie on one device: name it by device",
    "tp_plan": "the model must lie on one device: name it by device",
    "gguf_file": "give the path of the file itself as the name",
    "config": "change the model's config.json, or wrap a model of your own in offramp.LanguageModel",
}
"""Options of `from_pretrained` that have another name here, or no sense, and what to do instead."""


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    exits: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
    attn_implementation: Literal["sdpa", "eager"] | None = None,
    quantization_config: Any = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    engine: Engines = "auto",
    **others: Never,
) -> LanguageModel:
    """Load a language model and its tokenizer, ready for evaluation.

    A string is first looked up among the packaged names, then as a local folder or file, then as a hub id. A packaged
    name therefore wins over a folder of the same name in the working directory; write `./smollm2` for that folder. A
    `Path` is always a folder or a file. No code from a folder or from the hub is run.

    Packaged models and GGUF files are converted on first use (see `packaged_folder`, `gguf_folder`). They are stored in
    bfloat16, so that loading in float32 and in bfloat16 gives the same weights.

    Args:
        name: Packaged name, local folder (config and weights as `save_pretrained` writes them), GGUF file or hub id.
        dtype: Number format of the weights: one of `DTYPES`, the torch dtype of that name, or "auto": as they were
            saved. Confidences are computed in float32 whatever it is. Also "int8" and "int4", made from bfloat16, which
            only the native engine reads: matrices in so many bits per weight, and what they multiply in eight. With
            "int4" readouts, trained exits and drafters keep eight bits.
        device: Where to put the model. None: the first CUDA GPU if there is one, else the CPU.
        exits: Exits trained for this model: a folder that `LanguageModel.save_exits` wrote, a hub id, or "bundled" for
            those that come with offramp.
        revision: Branch, tag or commit on the hub.
        token: For gated or private models on the hub; None: the one that `hf auth login` stored.
        cache_dir: Where what the hub gives is kept; None: the hub's own cache.
        subfolder: Folder of the model inside the folder or repository.
        local_files_only: Do not ask the hub; load only what it gave earlier.
        attn_implementation: One of `ATTENTION`; None: the model's usual one.
        quantization_config: One of `transformers`, such as `BitsAndBytesConfig`; the library it is for must be
            installed. Pruned vocabularies need a head that is not quantised.
        device_map: Another way to say `device`: one device, or "auto" for None. Models are never spread or offloaded.
        engine: What generates: "torch"; "native", our own kernels on the CPU (see `offramp.native`), which are compiled
            on first use; "cuda", captured segments on a CUDA device (see `offramp.cuda`); or "auto": native on a CPU
            where it can run the model, else torch, with the reason in the log.
        others: Refused, with what to give instead.

    Returns:
        The model with its tokenizer, which is None for a local folder without one: prompts must then be token ids.

    Raises:
        ValueError: The dtype, the device or another option is not one of those available.
        NativeError: The native engine, int8 or int4 is asked for and cannot run the model, or cannot be compiled here.
        CudaError: The CUDA engine is asked for and cannot run the model, or the model is not on a CUDA device.
        ModelError: There is no such model, or it is damaged, incomplete or not a language model; or the exits are
            damaged or were made for another model.
    """
    _refuse(others)
    choice("engine", engine, get_args(Engines))
    loaded, rounded = rounded_dtype(dtype)
    if rounded and engine == "torch":
        raise ValueError(
            f"dtype {rounded!r} is not available on torch; choose one of {', '.join(DTYPES)}, or give engine='native'"
        )
    torch_dtype = "auto" if dtype == "auto" else named_dtype(loaded)
    if attn_implementation not in (None, *ATTENTION):
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}; tested with early exits are {' and '.join(ATTENTION)}"
        )
    asked = _one_device(device, device_map)
    place = named_device("cpu" if asked is None and (engine == "native" or rounded) else asked)
    source = find(
        name, revision=revision, token=token, cache_dir=cache_dir, subfolder=subfolder,
        local_files_only=local_files_only,
    )  # fmt: skip
    from offramp.hub.exit_files import exits_folder

    trained = (
        None if exits is None else load_exits(exits_folder(exits, str(name)))
    )  # before the model, which takes longer
    options = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    with loading(source):
        config = config_of(source)
        model, missing = model_of(
            _auto_class(config, source.place), source, config=config, dtype=torch_dtype, device_map={"": place},
            **{option: value for option, value in options.items() if value is not None},
        )  # fmt: skip
        tokenizer = tokenizer_of(source)
    if missing:
        raise ModelError(
            f"{source.place} lacks {len(missing)} of the weights a {config.model_type} language model needs "
            f"({', '.join(sorted(missing)[:3])}); was it saved without its output head?"
        )
    from offramp.core.language_model import LanguageModel

    title = str(name) if name in PACKAGED or not source.local else Path(source.place).resolve().name
    lm = LanguageModel(model, tokenizer, name=title, engine=engine, rounded=rounded)
    if trained is not None and exits is not None:
        require_made_for(trained, lm.split, title, exits)
        lm.attach_exits(trained)
    return lm


# Arguments


def _one_device(device: Any, device_map: Any) -> Any:
    """The device that either names; None: that of `named_device`."""
    if device_map is None:
        return device
    if device is not None:
        raise ValueError(f"device is {device!r} and device_map {device_map!r}; give one of them")
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len(set(map(str, places))) != 1 or places[0] in _SPREAD:
        raise ValueError(
            f"device_map is {device_map!r}, which spreads the model, but early exits need it whole on one device: give "
            "that, such as 'cuda:0', or 'auto'"
        )
    return None if places[0] == "auto" else places[0]


def _refuse(others: Mapping[str, object]) -> None:
    """Say what to do instead of options that `load` does not have."""
    for name, value in others.items():
        if name == "trust_remote_code" and value is False:  # which is what happens
            continue
        known = list(load.__kwdefaults__ or ())
        why = _ELSEWHERE.get(name) or f"known are {listed(name, known)}"
        raise ValueError(f"{name} is no option of offramp.load; {why}")


def _auto_class(config: PreTrainedConfig, source: str) -> Any:  # noqa: ANN401 (the Auto classes share no public base)
    """The Auto class that makes a token-predicting model of `config`."""
    import transformers

    kinds = [
        (transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, transformers.AutoModelForSpeechSeq2Seq, True),
        (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM, True),
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM, False),
    ]
    for mapping, auto, encoder_decoder in kinds:
        if type(config) in mapping and bool(config.is_encoder_decoder) == encoder_decoder:
            return auto
    raise ModelError(f"{source} is a {config.model_type} model, which does not predict tokens; load a language model")
