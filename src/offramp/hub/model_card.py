"""The README that goes to the hub with exits: what they are, for which model, how they were trained and are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from offramp.core.exits import Exits
from offramp.hub.exit_files import CONFIG

CARD = "README.md"
_SAID = ("trainable", "objective", "steps", "tokens", "blocks", "learning_rate", "precision", "seed")
"""Choices of a training that tell it from others; the description has all of them."""


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
