"""The prompts that come with offramp: written for it, so that a model can be looked at without any data set."""

from __future__ import annotations

import json
from importlib import resources


def bundled_prompts() -> list[str]:
    """Sixty short English tasks for an instruction-following model, always in the same order."""
    text = resources.files("offramp").joinpath("data/prompts.json").read_text(encoding="utf-8")
    return [entry["prompt"] for entry in json.loads(text)["prompts"]]
