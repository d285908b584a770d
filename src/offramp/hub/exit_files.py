"""Exits as files: the folder they are saved in, those that come with this package, and those on the hub.

A folder has a description, `exits.json`, and weights, `exits.safetensors`; on the hub it has a README, too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.core.adapters import Branch, Drafter
from offramp.core.exits import Exits, listed_once
from offramp.families import SplitModel
from offramp.hub.exit_posterior import Posterior
from offramp.hub.messages import ModelError, first_line
from offramp.runs import artefact
from offramp.runs.digests import fingerprint
from offramp.runs.tensor_files import not_finite_in

SCHEMA = "offramp/exits/1"
CONFIG, WEIGHTS = "exits.json", "exits.safetensors"
AGAIN = "save the exits again, or copy their whole folder"
MOST_LAYERS = 10_000
"""A description that speaks of more is damaged."""
_BRANCHES = "branches."
_DRAFTER = "drafter."
_POSTERIOR = "posterior."  # what its tensors' names begin with
KIND = artefact.Kind(
    "exits", CONFIG, WEIGHTS, family="offramp/exits/", again=AGAIN, saved="name a folder that save_exits wrote"
)


def save_exits(
    exits: Exits,
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write exits with all that belongs to them, as a whole or not at all; None: what the exits say of themselves."""
    values = {
        "model": exits.model if model is None else model, "num_layers": exits.num_layers, "width": exits.width,
        "layers": list(exits.layers), "rank": exits.rank, "classifier": exits.classifiers is not None,
        "fingerprint": exits.fingerprint if fingerprint is None else fingerprint,
        "settings": exits.settings if settings is None else dict(settings),
        **({"blocks": exits.blocks} if exits.blocks else {}),
        **({} if exits.drafter is None else {"drafter": len(exits.drafter.branch.blocks())}),
        **({} if exits.posterior is None else {"posterior": exits.posterior.settings}),
        **({} if exits.frequent is None else {"frequent": len(exits.frequent)}),
    }  # fmt: skip
    tensors = {name: t.detach().to(_kept_in(name, t)).cpu().contiguous() for name, t in exits.state_dict().items()}
    artefact.write(folder, SCHEMA, values, tensors, KIND)


def _kept_in(name: str, tensor: Tensor) -> torch.dtype:
    """The number format of a tensor in the file: branches and drafters, which are large, take half of the room."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.bfloat16 if name.startswith((_BRANCHES, _DRAFTER)) else torch.float32


def load_exits(folder: str | os.PathLike[str]) -> Exits:
    """Exits that `save_exits` wrote, in float32 on the CPU; a ModelError if there are none or they are damaged."""
    values, tensors = _read(folder)
    file, posterior, count = Path(folder) / WEIGHTS, values.pop("posterior"), values.pop("frequent")
    try:
        with torch.device("meta"):
            exits = Exits(**values)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the latter from impossible sizes
        raise ModelError(f"{Path(folder) / CONFIG} is damaged ({first_line(error)}); {AGAIN}") from error
    fitted = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_POSTERIOR)}
    frequent = tensors.pop("frequent", None)
    if exits.blocks:
        for layer in exits.layers:
            lacks = f"{file} lacks blocks of the exit after layer {layer}; {AGAIN}"
            exits.branches[str(layer)] = _branch(tensors, f"{_BRANCHES}{layer}.", exits.blocks, lacks)
    if values["drafter"]:
        with torch.device("meta"):
            lacks = f"{file} lacks blocks of the drafter; {AGAIN}"
            exits.drafter = Drafter(exits.width, _branch(tensors, f"{_DRAFTER}branch.", values["drafter"], lacks))
    expected = {name: t.shape for name, t in exits.state_dict().items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise ModelError(f"{file} does not hold the lenses (or classifiers) {CONFIG} speaks of; {AGAIN}")
    if not_finite_in(tensors) is not None:
        raise ModelError(f"{file} holds numbers that are not finite: their training diverged; train them again")
    exits.load_state_dict({n: t.to(torch.float32, copy=True) for n, t in tensors.items()}, assign=True)
    if posterior is not None or fitted:
        exits.posterior = _posterior(exits, folder, posterior, fitted)
    if frequent is not None or count is not None:
        exits.frequent = _frequent(folder, count, frequent)
    return exits


def _branch(tensors: Mapping[str, Tensor], begin: str, blocks: int, lacks: str) -> Branch:
    """A branch with the tensors that are there for it; whether these fit a model is for the model to see."""
    found: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(begin).partition("/")
        if name.startswith(begin) and number.isdecimal() and int(number) < blocks:
            found[int(number)][rest.replace("/", ".")] = tensor.float()
    if not all(found):
        raise ModelError(lacks)
    return Branch(found)


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was saved: the arguments of `Exits`, of the right types, "posterior" and "frequent", and the tensors."""
    try:
        values, tensors = artefact.read(folder, SCHEMA, KIND, without_digest=True)
    except ValueError as error:
        raise ModelError(str(error)) from error
    file = Path(folder).expanduser() / CONFIG
    values = {"classifier": False, "blocks": 0, "drafter": 0, **values}  # younger than the schema, as posteriors are
    types = {
        "model": str, "fingerprint": str, "num_layers": int, "width": int, "layers": list, "settings": dict,
        "classifier": bool, "blocks": int, "drafter": int,
    }  # fmt: skip
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    wrong += [] if type(values.get("rank", "")) in (int, type(None)) else ["rank"]
    wrong += [] if wrong or all(type(layer) is int for layer in values["layers"]) else ["layers"]
    if wrong:
        raise ModelError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type; {AGAIN}")
    if len(values["layers"]) > MOST_LAYERS:
        raise ModelError(f"{file} is damaged: it speaks of {len(values['layers']):,} exits; {AGAIN}")
    arguments = {name: values[name] for name in (*types, "rank")}
    return {**arguments, **{name: values.get(name) for name in ("posterior", "frequent")}}, tensors


def _frequent(folder: str | os.PathLike[str], count: Any, tokens: Tensor | None) -> Tensor:
    """The list of frequent tokens of what was read, of which the description says how many there are."""
    try:
        if tokens is None or type(count) is not int or not torch.equal(found := listed_once(tokens), tokens):
            raise ValueError("tokens and their number do not belong together")
        if len(found) != count:
            raise ValueError(f"{len(found)} tokens, not {count}")
    except ValueError as error:
        raise ModelError(f"the frequent tokens in {folder} are damaged ({first_line(error)}); {AGAIN}") from error
    return found.clone()


def _posterior(exits: Exits, folder: str | os.PathLike[str], values: Any, tensors: dict[str, Tensor]) -> Posterior:
    """The posterior of what was read, if it was fitted for these exits."""
    tensors = {name.removeprefix(_POSTERIOR): t.clone() for name, t in tensors.items()}
    try:
        if not isinstance(values, dict) or not_finite_in(tensors) is not None:
            raise ValueError("its settings are missing, or numbers are not finite")
        posterior = Posterior(values, tensors)
        if not set(posterior.layers) <= set(exits.layers):
            raise ValueError(f"it is for layers {posterior.layers}")
    except (ValueError, TypeError) as error:
        raise ModelError(f"the posterior in {folder} is damaged ({first_line(error)}); {AGAIN}") from error
    if posterior.settings.get("lenses") != fingerprint(exits.adapters):
        raise ModelError(
            f"the posterior in {folder} was fitted for other lenses than those beside it; fit it again with: "
            "offramp calibrate --posterior"
        )
    return posterior


def require_made_for(exits: Exits, split: SplitModel, name: str, folder: str | os.PathLike[str]) -> None:
    """Raise a ModelError unless exits, from `folder`, were made for the model called `name`."""
    advice = "load the model they were made for, or train exits for this one"
    if (exits.num_layers, exits.width) != (split.num_layers, split.shape.width):
        raise ModelError(
            f"the exits in {folder} were made for {exits.model} ({exits.num_layers} layers of width {exits.width}), "
            f"but {name} has {split.num_layers} of width {split.shape.width}; {advice}"
        )
    if (found := fingerprint(split.model)) != exits.fingerprint:
        if split.model.dtype == torch.float16:
            advice += "; if they were: float16 changes small weights, load it in float32 or bfloat16"
        raise ModelError(
            f"the exits in {folder} were made for {exits.model} with weights {exits.fingerprint[:12]}, but those of "
            f"{name} are {found[:12]} (fingerprints); {advice}"
        )


# ---------------------------------------------------------------- where they come from and go to

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
    """Markdown with the hub's metadata in front; what is given is as for `offramp.hub.exit_files.push`."""
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
