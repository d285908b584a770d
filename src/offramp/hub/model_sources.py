"""Where a model is: its packaged name, its local folder or its hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offramp.hub.catalogue import PACKAGED, Source, choices
from offramp.hub.messages import ModelError, first_line
from offramp.hub.packaged import packaged_folder

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
        raise ModelError(f"{folder} is a file; name the folder that holds config.json and the weights")
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
