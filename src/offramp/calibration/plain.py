"""What a policy has to beat: settings that test nothing, static exits and prompts that stop early alone.

"Never exit" is not among them: it costs what the full model costs and loses nothing, so it needs no certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offramp.core.policy import ExitPolicy
from offramp.evaluation.arms import short_prompt

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

STATIC = 4
"""Static exits tried unless others are named, at most."""


def static_layers_of(lm: LanguageModel) -> tuple[int, ...]:
    """Static exits worth trying: a few of the trained exits, the deepest among them; without any, none."""
    layers = lm.split.exit_layers
    step = -(-len(layers) // STATIC) or 1
    return tuple(sorted(layers[::-1][::step]))


def plain_policies(base: ExitPolicy, static_layers: Sequence[int]) -> dict[str, ExitPolicy]:
    """Settings that test nothing, with the prompt of a policy: from safe to bold.

    Args:
        base: The policy; if it drafts, tokens are drafted at the static exits, too.
        static_layers: Layers of the static exits.

    Returns:
        Policies by name: that of the prompt alone where it stops early, then static exits, the deepest first. A prompt
        stops where a static exit is, if that is shallower.
    """
    stop, policies = base.prompt_layer, dict[str, ExitPolicy]()
    if stop is not None and base.threshold is not None:
        policies[f"prompt to {stop}"] = short_prompt(stop)
    for layer in sorted(set(static_layers), reverse=True):
        inner = stop is not None and stop < layer
        policies[f"static {layer}" + (f", prompt to {stop}" if inner else "")] = ExitPolicy(
            "static", min_layer=layer, prompt_layer=stop if inner else None,
            skipped=base.skipped if base.skipped == "verify" else "propagate", draft_length=base.draft_length,
            draft=base.draft, accept=base.accept if base.skipped == "verify" else 1.0,
        )  # fmt: skip
    return policies
