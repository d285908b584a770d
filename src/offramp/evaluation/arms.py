"""Which policies are compared: static exits, the source documents' policies, and grids."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from offramp.core.plan import resolve
from offramp.core.policy import DRAFTS, ExitPolicy
from offramp.core.vocabulary import FREQUENT, KINDS, rule_of

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

FULL = "full model"
"""The arm that all others are compared with."""


def static_arms(
    lm: LanguageModel, layers: Sequence[int] | None = None, prompt_layers: Collection[int] = ()
) -> dict[str, ExitPolicy]:
    """Policies that always leave after one layer, by name, each also with prompts that stop at `prompt_layers`."""
    depth, trained = lm.num_layers, lm.split.exit_layers
    if layers is None:
        layers = trained or sorted({layer for layer in (depth // 2, 3 * depth // 4, depth - 2) if 1 <= layer < depth})
    arms = {f"static {layer}": ExitPolicy("static", min_layer=layer) for layer in layers}
    for stop in sorted(prompt_layers):
        arms |= {
            f"static {layer}, prompt to {stop}": ExitPolicy("static", min_layer=layer, prompt_layer=stop)
            for layer in layers
            if layer > stop
        }
    for policy in arms.values():
        resolve(policy, depth, lm.vocabulary, trained)
    return arms


def baselines(
    lm: LanguageModel, arms: Mapping[str, ExitPolicy], static_layers: Sequence[int] | None = None
) -> dict[str, ExitPolicy]:
    """By name, what is not among the arms: static exits, and policies' own shortened prompts without any exits."""
    prompts = {policy.prompt_layer for policy in arms.values() if policy.prompt_layer is not None}
    unexited = {name: policy for stop in sorted(prompts) for name, policy in _short_prompt(stop).items()}
    every = {**static_arms(lm, static_layers, prompts), **unexited}
    return {name: policy for name, policy in every.items() if name not in arms}


def _short_prompt(stop: int) -> dict[str, ExitPolicy]:
    return {f"prompt to {stop}": short_prompt(stop)}


def short_prompt(stop: int) -> ExitPolicy:
    """Prompts that stop after a layer, and nothing that leaves early."""
    return ExitPolicy(threshold=None, prompt_layer=stop)


def unexited(arms: Mapping[str, ExitPolicy | None], policy: ExitPolicy | None) -> str:
    """Which of the arms has the policy's shortened prompt and nothing else; empty where there is none, or no need."""
    stop = None if policy is None else policy.prompt_layer
    return "" if stop is None else next((name for name, other in arms.items() if other == short_prompt(stop)), "")


def static_sweep(lm: LanguageModel, arms: Mapping[str, ExitPolicy]) -> tuple[int, ...] | None:
    """Layers of static exits that can match a sweep: trained ones, else all from the first tested; None: none is."""
    if lm.split.exit_layers:
        return lm.split.exit_layers
    plans = [resolve(policy, lm.num_layers, lm.vocabulary) for policy in arms.values()]
    tested = [layer for plan in plans for layer in plan.thresholds]
    return tuple(range(min(tested), lm.num_layers)) if tested else None


def document_arms(lm: LanguageModel, *, prompt_layer: int | None = None) -> dict[str, ExitPolicy]:
    """The policies of "Early Exit LLMs" and "Dynamic Vocabulary Pruning", FREE and CALM's classifier, all at 0.9."""
    # One threshold is not one test: the measures do not compare, quality is read next to cost. FREE leaves at the first
    # of the exits; sets of a posterior leave with a single token, at any threshold from 1/2 on.
    softmax = ExitPolicy("softmax", threshold=0.9, prompt_layer=prompt_layer)
    jsd = replace(softmax, confidence="jsd")
    plan = resolve(softmax, lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    arms = {
        "softmax": softmax,
        **{f"softmax + {kind}": replace(softmax, vocabulary=kind) for kind in KINDS},
        "contrastive": replace(softmax, confidence="contrastive"),
        "jsd": jsd,
        "jsd + adaptive": replace(jsd, vocabulary="adaptive"),
        "FREE": replace(softmax, min_layer=None, exit_layers=(plan.min_layer,), skipped="defer", adaptive=True),
    }
    if lm.exits is not None and lm.exits.frequent is not None:
        arms["softmax + frequent"] = replace(softmax, vocabulary=FREQUENT)
    if lm.exits is not None and lm.exits.classifiers is not None:
        arms["classifier"] = replace(softmax, confidence="classifier")
    if lm.exits is not None and (posterior := lm.exits.posterior) is not None:  # with the pruning it was fitted for
        arms |= {method: posterior.policy(replace(softmax, confidence=method)) for method in posterior.methods}
    arms |= drafting_arms(lm)
    return arms if prompt_layer is None else arms | _short_prompt(prompt_layer)  # so that its own share can be told


def drafting_arms(lm: LanguageModel) -> dict[str, ExitPolicy]:
    """Drafts by the drafter of a model's exits, if they have one, on the frequent tokens, if these are listed."""
    if lm.exits is None or lm.exits.drafter is None:
        return {}
    return {"drafts": DRAFTS if lm.exits.frequent is not None else replace(DRAFTS, vocabulary=None)}


def grid(
    lm: LanguageModel,
    *,
    confidences: Sequence[str] = ("softmax",),
    thresholds: Sequence[float] = (0.9,),
    min_layers: Sequence[int | None] = (None,),
    vocabularies: Sequence[str | None] = (None,),
    vocabulary_size: int | None = None,
    skipped: str = "propagate",
    prompt_layer: int | None = None,
) -> dict[str, ExitPolicy]:
    """Every combination, named by its values, such as "softmax > 0.9, from 20, fixed, verify"."""
    if vocabulary_size is not None and not any(map(rule_of, vocabularies)):
        raise ValueError(f"vocabulary_size is {vocabulary_size}, but nothing is pruned; name one of {', '.join(KINDS)}")
    arms = {}
    for confidence, threshold, layer, kind in itertools.product(confidences, thresholds, min_layers, vocabularies):
        parts = [
            f"{confidence} > {threshold:g}", layer and f"from {layer}", kind, skipped != "propagate" and skipped,
            prompt_layer and f"prompt to {prompt_layer}",
        ]  # fmt: skip
        name = ", ".join(str(part) for part in parts if part)
        arms[name] = ExitPolicy(
            confidence, threshold=threshold, vocabulary=kind,
            vocabulary_size=vocabulary_size if rule_of(kind) else None, skipped=cast(Any, skipped),
            prompt_layer=prompt_layer, **tested_from(lm, layer),
        )  # fmt: skip
        resolve(arms[name], lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    return arms


def tested_from(lm: LanguageModel, layer: int | None) -> dict[str, Any]:
    """Fields of a policy that tests from a layer on, only at trained exits if there are any; None: where it would."""
    if layer is None or not lm.split.exit_layers:
        return {"min_layer": layer}
    exits = tuple(exit for exit in lm.split.exit_layers if exit >= layer)
    if not exits:
        raise ValueError(f"min_layer is {layer}, but the last trained exit is after layer {lm.split.exit_layers[-1]}")
    return {"min_layer": layer, "exit_layers": exits}


def sweep_layers(lm: LanguageModel) -> tuple[int, ...]:
    """Minimum layers worth trying: the usual one, and the exit halfway from there to the last layer."""
    exits = lm.split.exit_layers or tuple(range(max(1, lm.num_layers // 2), lm.num_layers))
    half = (exits[0] + lm.num_layers) / 2
    return tuple(sorted({exits[0], min(exits, key=lambda exit: (abs(exit - half), exit))}))
