"""Where trained exits come from and go to: a folder, this package, the Hugging Face hub, with a README of theirs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.core.exits import Exits
from offramp.hub.exit_files import CONFIG, WEIGHTS, load_exits, save_exits
from offramp.hub.messages import ModelError, first_line

CARD = "README.md"
BUNDLED = "bundled"
"""Name of the exits that come with offramp, for a packaged model."""
_SAID = ("trainable", "objective", "steps", "tokens", "blocks", "learning_rate", "precision", "seed")
"""Choices of a training that tell it from others; the description has all of them."""


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


def model_card(
    exits: Exits, repository: str, *, with_model: bool = False, figures: str | None = None, license: str | None = None
) -> str:
    """Markdown with the hub's metadata in front; what is given is as for `offramp.hub.exit_sources.push`."""
    base = repository if with_model else exits.model
    trained = exits.settings.get("model")
    named = trained.get("name") if with_model and isinstance(trained, Mapping) else exits.model
    data = {"library_name": "offramp", "tags": ["early-exit", "offramp"]}
    if isinstance(named, str) and named.count("/") == 1 and not named.startswith((".", "~", "/")):
        data["base_model"] = named
    if license is not None:
        data["license"] = license
    lines = [f"{name}: {json.dumps(value)}" for name, value in data.items()]  # JSON is YAML
    return "\n".join([
        "---", *lines, "---", "",
        f"# Early exits for {named}", "",
        f"Readouts after layers {', '.join(map(str, exits.layers))} of {exits.num_layers}" + _parts(exits)
        if exits.layers else f"For a model of {exits.num_layers} layers" + _parts(exits),
        "They were made for one set of weights "
        f"(fingerprint `{exits.fingerprint[:12]}`) and are refused for others. The model and its exits were trained "
        "together: without exits it writes something else than the model it came from."
        if with_model else
        f"They were made for one set of weights (fingerprint `{exits.fingerprint[:12]}`) and are refused for others; "
        "the model itself stays as it is.", "",
        "## Use", "",
        "```python", "import offramp", "",
        f'lm = offramp.load("{base}", exits="{repository}")',
        f"policy = {_policy(exits)}",
        'print(lm.generate("Why is the sky blue?", policy=policy).texts[0])', "```", "",
        "The policy is an example and no recommendation: `offramp evaluate` says what one costs and loses, `offramp "
        "calibrate` finds one that keeps a promise.", "",
        "## Training", "", *_training(exits.settings), "",
        "## Measured", "", figures or "Nothing is claimed here: no figures were given.", "",
        "## Licence", "",
        f"{license}." if license is not None else
        f"None is stated. The terms of {named} hold for what was made from it.", "",
    ])  # fmt: skip


def _policy(exits: Exits) -> str:
    """One that uses what there is: drafts that the full model checks, or a test at every exit."""
    if exits.drafter is None:
        return "offramp.ExitPolicy(threshold=0.9)"
    frequent = "" if exits.frequent is None else ', vocabulary="frequent"'
    return f'offramp.ExitPolicy("static", min_layer=0, skipped="verify", draft_length=2{frequent})'


def _parts(exits: Exits) -> str:
    """What there is besides lenses, and an end of the sentence."""
    parts = [
        f"{exits.blocks} block(s) before each lens" if exits.blocks else None,
        "classifiers that judge each exit" if exits.classifiers is not None else None,
        "a drafter before the first layer" if exits.drafter is not None else None,
        "a posterior" if exits.posterior is not None else None,
        f"a list of {len(exits.frequent):,} frequent tokens" if exits.frequent is not None else None,
    ]
    found = [part for part in parts if part]
    return f", with {', '.join(found)}." if found else "."


def _training(settings: Mapping[str, Any]) -> list[str]:
    """The choices that tell this training from others."""
    config, data = settings.get("config"), settings.get("data")
    if not isinstance(config, Mapping):
        return ["How they were trained was not written down."]
    rows = [f"| {name} | {config[name]} |" for name in _SAID if config.get(name) is not None]
    if isinstance(data, Mapping) and "documents" in data:
        rows.append(f"| documents | {data['documents']} |")
    return ["| | |", "|---|---|", *rows, "", f"`{CONFIG}` has all of it."]
