"""Where a model is: in an ordinary Python package, in a local folder or GGUF file, or on the hub.

Packages carry models so that everything can be tried without a model hub. Such a package is only looked up, never
imported: its weights are checked, converted once into the user's cache folder and loaded from there like any local
folder. So are GGUF files.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from offramp.hub.messages import ModelError, first_line, quiet, say
from offramp.hub.pretrained import PACKAGED, Packaged, Source, choices
from offramp.runs.digests import of_file

_MIB = 1 << 20


def packaged_folder(name: str) -> Path:
    """Find the converted copy of a packaged model in the cache, converting it first if needed.

    The cache is `$OFFRAMP_CACHE`, else `$XDG_CACHE_HOME/offramp`, else `~/.cache/offramp`. The copy appears there
    complete or not at all, also when the conversion is killed or runs in several processes at once: one converts, the
    others wait. Checksums are compared at every load (0.2 s for 260 MB), and a copy that is damaged in any way is made
    again.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` takes, with weights in bfloat16 and, in `SOURCE.json`, what
        it was made from.

    Raises:
        ModelError: The package is missing, its weights are not the expected ones, or the conversion failed, for example
            for want of room.
    """
    packaged = PACKAGED[name]
    folder = cache_folder() / "models" / f"{name}-{packaged.sha256[:12]}"
    if _is_complete(folder):
        return folder
    weights = _find_weights(packaged)

    def make(partial: Path) -> None:
        if (digest := of_file(weights)) != packaged.sha256:
            raise ModelError(
                f"{weights} has SHA-256 {digest}, not {packaged.sha256}: a damaged file or another version; "
                f"run: {packaged.install} --force-reinstall"
            )
        if packaged.beside:
            say(f"copying {packaged.title} once into {folder}")
            for file in (weights.name, *packaged.beside):
                shutil.copyfile(weights.with_name(file), partial / file)
        else:
            say(f"converting {packaged.title} once into {folder} (about 30 s)")
            _convert(weights, partial)
        _write_source(
            partial, packaged.title, packaged.sha256, licence=packaged.licence,
            package=f"{packaged.distribution}=={packaged.version}",
        )  # fmt: skip

    _made(folder, packaged.title, packaged.converted_mib, make)
    return folder


def gguf_folder(file: Path) -> Path:
    """Find the converted copy of a GGUF file in the cache, converting it first if needed, as `packaged_folder` does.

    Numbers of four bits lie on the same grids in the copy, in bfloat16, so that `load(..., dtype="int4")` reads them as
    they are. The copy belongs to the file's name and content, wherever it lies.

    Returns:
        As `packaged_folder`; without a tokenizer if the file has none.

    Raises:
        ModelError: The file is no GGUF, or one of several parts, or transformers cannot read its architecture, or there
            is no room.
    """
    digest = of_file(file)
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:12]}"
    if _is_complete(folder):
        return folder
    said, numbers = _contents(file, "split.count", "tokenizer.ggml.model")
    if (parts := said["split.count"] or 1) > 1:
        raise ModelError(f"{file} is one of {parts} parts; make one file of them with llama-gguf-split --merge")

    def make(partial: Path) -> None:
        say(f"converting {file.name} once into {folder}")
        _convert(file, partial, tokenizer=said["tokenizer.ggml.model"] not in (None, "no_vocab"))
        _write_source(partial, file.name, digest)

    _made(folder, file.name, 2 * numbers // _MIB + 20, make)  # two bytes a number, and a tokenizer
    return folder


def _contents(file: Path, *fields: str) -> tuple[dict[str, Any], int]:
    """What a GGUF file says under these names, or None, and how many weights it has; a ModelError if it is none."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # each damaged file has an exception type of its own
        raise ModelError(f"{file} cannot be read as GGUF: {first_line(error)}; was it downloaded whole?") from error
    said = {name: field.contents() if (field := reader.get_field(name)) else None for name in fields}
    return said, sum(int(tensor.n_elements) for tensor in reader.tensors)


def cache_folder() -> Path:
    """Where converted models and compiled kernels are kept: `$OFFRAMP_CACHE`, else the user's cache folder."""
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
    """Whether every file has the checksum that `SOURCE.json` lists for it."""
    try:
        sums: dict[str, str] = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))["sha256"]
        return bool(sums) and all(of_file(folder / file) == wanted for file, wanted in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def sole_maker(folder: Path) -> Iterator[None]:
    """Let one process at a time make `folder`; the system releases the lock when a process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"waiting for another process that makes {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _made(folder: Path, title: str, room: int, make: Callable[[Path], None]) -> None:
    """Make `folder`, for which there must be so many MiB, unless another process just did; errors are ModelErrors."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_maker(folder):
            if not _is_complete(folder):  # another process may have made it while this one waited for the lock
                _build(folder, title, room, make)
    except ModelError:
        raise
    except Exception as error:  # whatever the disk, safetensors or transformers came up with
        raise ModelError(
            f"{title} could not be converted in {folder.parent}: {first_line(error)}; nothing was kept. "
            f"If the disk is the reason, set OFFRAMP_CACHE to a writable folder with {room} MiB free"
        ) from error


def _build(folder: Path, title: str, room: int, make: Callable[[Path], None]) -> None:
    """Make `folder` under the lock: all of it or, whatever happens, nothing."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process; a living one would hold the lock
    if folder.exists():
        say(f"{folder} is incomplete or damaged; it is made again")
        shutil.rmtree(folder)
    free = shutil.disk_usage(folder.parent).free // _MIB
    if free < room:
        raise ModelError(
            f"{free} MiB free at {folder.parent}, but converting {title} takes {room} MiB; make room, or set "
            "OFFRAMP_CACHE to a folder with more"
        )
    try:
        partial.mkdir()
        make(partial)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(folder)
    except BaseException:  # also an interrupt from the keyboard
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert(weights: Path, out: Path, *, tokenizer: bool = True) -> None:
    """Unpack the quantised blocks of a GGUF file and save model and, if it has one, tokenizer to `out`, in bfloat16.

    The model is loaded in bfloat16 rather than cast to it, since a cast would round the rotary frequencies as well.
    With `dequantize` transformers does not treat the result as quantised, which it would refuse to save.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from offramp.hub.pretrained import model_of, tokenizer_of

    source = Source(str(weights.parent), True, {"gguf_file": weights.name, "local_files_only": True})
    with quiet(), redirect_stderr(io.StringIO()):  # reading GGUF draws a bar that cannot be turned off
        model, _ = model_of(
            AutoModelForCausalLM, source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(out, max_shard_size="100GB")  # one file
        if tokenizer:
            tokenizer_of(source).save_pretrained(out)
    (out / "model.safetensors").chmod((out / "config.json").stat().st_mode)  # it is written for its owner's eyes only


def _write_source(out: Path, title: str, digest: str, **more: str) -> None:
    """Record in `out` what it was made from and how large each file is."""
    import transformers

    record = {
        "title": title,
        **more,
        "weights_sha256": digest,
        "transformers": transformers.__version__,
        "sha256": {path.name: of_file(path) for path in sorted(out.iterdir())},
    }
    (out / "SOURCE.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Write a file or folder through to the disk, so that a power cut after the rename cannot lose what is in it."""
    if os.name != "posix":  # elsewhere a folder cannot be opened; the checksums find what was lost
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- by any name

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def find(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> Source:
    """Find a model, asking the hub once whether it has it; arguments are those of `offramp.load`."""
    place, local = resolve(name, subfolder)
    if local:
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {name} is no model on the hub, which alone has revisions")
        return Source(place, True, {"local_files_only": True})
    where: dict[str, Any] = {"revision": revision or "main", "token": token, "subfolder": subfolder}
    asked = None if local_files_only else hub_problem(place, **where)
    offline = "local_files_only is True" if local_files_only else asked
    if cache_dir is not None:
        where["cache_dir"] = os.fspath(cache_dir)
    return Source(place, False, {**where, "local_files_only": offline is not None}, offline)


def resolve(name: str | os.PathLike[str], subfolder: str = "") -> tuple[str, bool]:
    """What to hand to transformers: a local folder, and True, or a hub id, which may not exist, and False."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    text = os.fspath(name)
    packaged = isinstance(name, str) and name in PACKAGED
    folder = packaged_folder(text) if packaged else Path(text).expanduser()
    if folder.suffix == ".gguf" and folder.is_file() and not subfolder:
        return str(gguf_folder(folder)), True
    if text and folder.exists():
        _check_folder(folder / subfolder)
        return str(folder / subfolder), True
    if not isinstance(name, str) or text.startswith((os.sep, "/", ".", "~")):
        raise ModelError(f"the folder {text} does not exist; {choices()}")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise ModelError(f"{text!r} is neither an existing folder nor a possible hub id; {choices(text)}") from None
    return text, False


def _check_folder(folder: Path) -> None:
    """Raise a ModelError unless `folder` looks like what `save_pretrained` writes."""
    if folder.is_file():
        raise ModelError(f"{folder} is a file; name the folder that holds config.json and the weights, or a .gguf file")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is an adapter without its model: load that with transformers, put the adapter on it with peft's "
            "PeftModel, and give it to offramp.LanguageModel(model, tokenizer)"
        )
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern)):
        lacking.append("weights (model.safetensors)")
    if lacking:
        raise ModelError(
            f"{folder} is not a model folder: it has no {' and no '.join(lacking)}; make one with save_pretrained"
        )


def hub_problem(
    repo: str, *, revision: str = "main", token: str | bool | None = None, subfolder: str = ""
) -> str | None:
    """Why the hub cannot be reached, asked once: transformers retries for half a minute. None: it has the model."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    address = hf_hub_url(repo, "config.json", revision=revision, subfolder=subfolder or None)
    try:
        get_hf_file_metadata(address, token=token, timeout=10)
    except GatedRepoError as error:
        raise ModelError(f"{repo!r} on the hub is gated: accept its terms there, then run: hf auth login") from error
    except NoRevision as error:
        raise ModelError(f"{repo!r} on the hub has no revision {revision!r}; name a branch, tag or commit") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        inside = f" with a model in {subfolder}" if subfolder else ""
        raise ModelError(
            f"no model {repo!r}{inside}: it is no packaged name and no local folder, and the hub has no such model for "
            f"you; {choices(repo)}"
        ) from error
    except Exception as error:  # connection, time-out, proxy, server error, offline mode
        return first_line(error)
    return None
