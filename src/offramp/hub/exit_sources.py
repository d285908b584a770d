"""Where trained exits come from and go to: a folder, this package, the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from offramp.hub.exit_files import CONFIG, WEIGHTS, load_exits, save_exits
from offramp.hub.messages import ModelError, first_line
from offramp.hub.model_card import CARD, model_card

BUNDLED = "bundled"
"""Name of the exits that come with offramp, for a packaged model."""


def exits_folder(source: str | os.PathLike[str], model: str) -> Path:
    """The folder of what is given: a folder (a `Path` always is one), "bundled" (by the model's name), or a hub id."""
    folder = Path(source).expanduser()
    if str(source) == BUNDLED and not folder.exists():
        bundled = Path(__file__).parents[1] / "data" / "exits"
        have = sorted(path.name for path in bundled.glob("*/"))
        if model not in have:
            names = ", ".join(have) or "no model"
            raise ModelError(
                f"no exits for {model!r} come with offramp, only for {names}; train some with offramp train"
            )
        return bundled / model
    named = isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "~", "/"))
    if folder.exists() or not named:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:
        raise ModelError(
            f"{source} is no folder, and the hub does not give it ({first_line(error)}); name a folder of exits, or a "
            "hub id that offramp train --push-to-hub wrote"
        ) from error


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    model: str | os.PathLike[str] | None = None,
    figures: str | None = None,
    license: str | None = None,
) -> str:
    """Put a folder of exits on the hub, with a model card, for `offramp.load(name, exits=repository)`.

    A card that is there already is left alone: it may say more by now.

    Args:
        folder: What `save_exits` wrote.
        repository: OWNER/NAME; made if it does not exist.
        private: Whether a new repository is; None: the owner's default.
        model: Folder of the model they are for, if it was trained with them: it goes to the same repository, for
            `offramp.load(repository, exits=repository)`, and the exits there name the repository as their model.
        figures: What was measured, for the card, as Markdown: such as the `table()` of an evaluation.
        license: For the card, by the hub's identifier, such as "apache-2.0"; None: none is stated.

    Returns:
        Its address.

    Raises:
        ModelError: The folder holds no exits, or the hub does not take them.
    """
    from huggingface_hub import HfApi

    exits = load_exits(folder)  # nothing half-written goes out
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        if model is not None:
            hub.upload_folder(repo_id=repository, folder_path=Path(model))
        with tempfile.TemporaryDirectory() as place:
            save_exits(exits, place, model=None if model is None else repository)
            files = [CONFIG, WEIGHTS]
            if not hub.file_exists(repository, CARD):
                card = model_card(exits, repository, with_model=model is not None, figures=figures, license=license)
                (Path(place) / CARD).write_text(card, encoding="utf-8")
                files.append(CARD)
            hub.upload_folder(repo_id=repository, folder_path=Path(place), allow_patterns=files)
    except Exception as error:
        what = "exits" if model is None else f"model (kept in {model}) and its exits"
        raise ModelError(
            f"the hub does not take the {what} as {repository} ({first_line(error)}); they are kept in {folder}. Give "
            "OWNER/NAME of your own, after hf auth login"
        ) from error
    return str(address)
