"""Load a model by packaged name, local folder or hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.packaged import PACKAGED, ModelError, first_line, packaged_folder, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from offramp.language_model import LanguageModel

DTYPES = ("float32", "bfloat16")
"""Number formats a model can be loaded in."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    exits: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer, ready for evaluation.

    A string is first looked up among the packaged names, then as a local folder, then as a hub id. A packaged name
    therefore wins over a folder of the same name in the working directory; write `./smollm2` for that folder. A `Path`
    is always a folder. No code from a folder or from the hub is run.

    Packaged models are converted on first use (see `packaged_folder`). They are stored in bfloat16, so that loading in
    float32 and in bfloat16 gives the same weights.

    Args:
        name: Packaged name, local folder (config and weights as `save_pretrained` writes them) or hub id.
        dtype: Number format of the weights: one of `DTYPES`, or the torch dtype of that name.
        device: Where to put the model; None is the CPU.
        exits: Exits trained for this model: a folder that `LanguageModel.save_exits` wrote, a hub id, or "bundled" for
            those that come with offramp.

    Returns:
        The model with its tokenizer, which is None for a local folder without one: prompts must then be token ids.

    Raises:
        ValueError: The dtype or the device is not one of those available.
        ModelError: There is no such model, or it is damaged, incomplete or not a language model; or the exits are
            damaged or were made for another model.
    """
    torch_dtype, torch_device = named_dtype(dtype), named_device(device)
    source, local = resolve(name)
    from offramp.exit_sources import exits_folder
    from offramp.exits import Exits

    trained = (
        None if exits is None else Exits.load(exits_folder(exits, str(name)))
    )  # before the model, which takes longer
    model, tokenizer = _from_pretrained(source, torch_dtype, local=local)
    from offramp.language_model import LanguageModel

    title = str(name) if name in PACKAGED or not local else Path(name).expanduser().resolve().name
    lm = LanguageModel(model.to(torch_device), tokenizer, name=title)
    if trained is not None and exits is not None:
        trained.require(lm.split, title, exits)
        lm.attach_exits(trained)
    return lm


# Arguments


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A supported dtype by name, or itself."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not available; choose one of {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def named_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the CPU.

    Returns:
        The device.

    Raises:
        ValueError: This machine has none of that name.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([accelerator.type] if accelerator else [])]
    try:
        chosen = torch.device("cpu" if device is None else device)
    except RuntimeError:
        chosen = None
    count = torch.accelerator.device_count() if accelerator else 0
    if chosen is None or chosen.type not in known or (chosen.type != "cpu" and (chosen.index or 0) >= count):
        raise ValueError(f"device {str(device)!r} is not available on this machine; choose one of {', '.join(known)}")
    return chosen


def resolve(name: str | os.PathLike[str]) -> tuple[str, bool]:
    """What to hand to transformers for `name`, and whether that is a local folder.

    Args:
        name: Packaged name, local folder or hub id.

    Returns:
        A folder and True, or a hub id, which may not exist, and False.

    Raises:
        ModelError: It is none of them.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if isinstance(name, str) and name in PACKAGED:
        return str(packaged_folder(name)), True
    text = os.fspath(name)
    folder = Path(text).expanduser()
    if text and folder.exists():
        _check_folder(folder)
        return str(folder), True
    if not isinstance(name, str) or text.startswith((os.sep, "/", ".", "~")):
        raise ModelError(f"the folder {text} does not exist; {choices()}")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise ModelError(f"{text!r} is neither an existing folder nor a possible hub id; {choices()}") from None
    return text, False


def _check_folder(folder: Path) -> None:
    """Raise a ModelError unless `folder` looks like what `save_pretrained` writes."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file; name the folder that holds config.json and the weights")
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern)):
        lacking.append("weights (model.safetensors)")
    if lacking:
        raise ModelError(
            f"{folder} is not a model folder: it has no {' and no '.join(lacking)}; make one with save_pretrained"
        )


def choices() -> str:
    """What a model may be named by."""
    return f"give a packaged name ({', '.join(PACKAGED)}), a local model folder or a hub id such as owner/model"


# Loading with transformers


def _from_pretrained(source: str, dtype: torch.dtype, *, local: bool) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer or None, from a folder (`local`) or from the hub."""
    from transformers import AutoConfig, AutoTokenizer

    offline = None if local else hub_problem(source)
    options: dict[str, Any] = {"local_files_only": local or offline is not None, "trust_remote_code": False}
    try:
        with quiet(bars=not local):
            config = AutoConfig.from_pretrained(source, **options)
            auto = _auto_class(config, source)
            model, info = auto.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **options)
            has_tokenizer = not local or any(any(Path(source).glob(pattern)) for pattern in _TOKENIZER)
            tokenizer = AutoTokenizer.from_pretrained(source, **options) if has_tokenizer else None
    except ModelError:
        raise
    except Exception as error:  # each damaged file has an exception type of its own
        if offline is not None:
            raise ModelError(
                f"no model {source!r}: it is no packaged name and no local folder, it is not in the local hub cache, "
                f"and the hub cannot be reached ({offline}); {choices()}"
            ) from error
        raise ModelError(
            f"{source} could not be loaded, probably because a file is damaged or missing: {first_line(error)}"
        ) from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"{source} lacks {len(info['missing_keys'])} of the weights a {config.model_type} language model needs "
            f"({some}); was it saved without its output head?"
        )
    return model.eval(), tokenizer


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


def hub_problem(repo: str) -> str | None:
    """Ask the hub for `repo` once; transformers alone would retry for half a minute before it gives up.

    Returns:
        None if the hub has it, else why the hub cannot be reached.

    Raises:
        ModelError: The hub was reached and does not give it to this user.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=10)
    except GatedRepoError as error:
        raise ModelError(f"{repo!r} on the hub is gated: accept its terms there, then run: hf auth login") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ModelError(
            f"no model {repo!r}: it is no packaged name and no local folder, and the hub has no such model for you; "
            f"{choices()}"
        ) from error
    except Exception as error:  # connection, time-out, proxy, server error, offline mode
        return first_line(error)
    return None
