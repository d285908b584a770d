"""From examples and a promise to a certified policy: a folder from which an interrupted calibration goes on.

config.json               what was asked for
records/PART/*.jsonl      answers (see `offramp.calibration.decoded`)
policy.json               the policy and its certificate
result.json               everything, with a picture of it

Nothing is chosen on certification data but the setting that passes, and nothing at all on the held-out part. Several
promises may be tried on one folder, its answers are used again; each certificate then holds for itself, not together
with the others, and not for whichever looks best.

Started several times by `accelerate launch` (or `torchrun`, on CPUs too), each process answers its part of the examples
and all go through the same search; they must see the same folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from offramp import __version__
from offramp.calibration.certificate import Certificate, conditions_of, reference_of
from offramp.calibration.decoded import (
    CERTIFICATION,
    TEST,
    TUNING,
    Decoded,
    divide,
    estimate,
    require_enough,
    seconds_held_out,
    sizes,
    units,
)
from offramp.calibration.drift import packed
from offramp.calibration.evidence import changes
from offramp.calibration.evidence import packed as packed_losses
from offramp.calibration.grid import NEVER, Grid, Setting, chains_of, paths_of, settings_of, static_layers_of
from offramp.calibration.promise import MEASURES, NO_LESS, PER_TOKEN, Promise, Room, Spent, is_timed, room_of, spent
from offramp.calibration.result import CONFIG, Calibration
from offramp.calibration.validate import Validation, validate
from offramp.evaluation.record_file import Progress, digest, locked_by_first, state_of
from offramp.report.plots import save_calibration
from offramp.risk import CRC, Outcome, pareto_front, search
from offramp.runs.files import write_json
from offramp.runs.resume import as_json
from offramp.values import choice

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Example, Task

ORDERS = ("auto", "path", "chains", "pareto")
ENOUGH = 400
"""Examples from which on a part of them is better spent on finding an order of the grid."""


def calibrate(
    lm: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    base: ExitPolicy,
    promise: Promise,
    folder: Path,
    *,
    grid: Grid | None = None,
    minimise: str = PER_TOKEN,
    must_pay: bool = True,
    order: str = "auto",
    tuning: float | None = None,
    test: float = 0.25,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    repeats: int = 0,
    about: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    progress: Progress | None = None,
    reference: LanguageModel | None = None,
) -> Calibration:
    """Certify the cheapest setting that keeps a promise: of a grid, static exits, prompts alone, and never exiting.

    Never exiting is what is left where nothing else passes, or where nothing that passes is cheaper. Nothing is
    certified, nor searched for, where the promise would say nothing (see `offramp.calibration.promise`).

    Args:
        lm: The model.
        task: How to ask and how to judge.
        examples: With ids of their own, in groups that are never divided; their prompts must fit.
        base: The policy; the grid replaces its threshold, and its minimum layer and vocabulary size if given.
        promise: What is to hold.
        folder: Run folder; answers in it are used again.
        grid: What is tried; None: `THRESHOLDS`.
        minimise: Which cost, over the full model's on the same prompts: a key of `offramp.calibration.MEASURES`. FLOPs
            are those of the certification part, see `offramp.risk.search` for why that may be. Seconds are those
            of the tuning part, on which then all settings take turns.
        must_pay: Take no policy that does not cost less than the full model.
        order: "path": one sequence through the grid, by boldness. "chains": one sequence of thresholds per combination
            of all else. Settings that test nothing have a sequence of their own in both; each sequence is tested at its
            share of the failure probability. "pareto": the Pareto front of loss and cost on the tuning part, of
            settings that pay there. "auto": "pareto" for several combinations and 400 examples or more, else "path".
        tuning: Share of the examples that things are chosen by: the order "pareto", thresholds per layer, seconds.
            None: 0.3 if there is such a thing, else 0.
        test: Share of the examples held out, to report by; may be 0.
        seed: Of the division and of the order of draws.
        max_new_tokens: Longest answer; None: the task's.
        batch_size: Examples answered together.
        settings: Further options of `LanguageModel.stream`, as JSON values.
        repeats: Calibrations repeated over random splits of certification and held-out part, to see how often the
            promise is broken (`Validation`); all settings are then decoded on both.
        about: What else the certificate should say of the data, as JSON values.
        resamples: Of the bootstrap behind the intervals.
        progress: Called with the answers done, asked for at most, and what comes next.
        reference: The same model in another number format, at whose full depth answers are made that losses and costs
            are relative to: what eight bits lose is then part of the loss, what they save part of the gain, and never
            exiting has to be certified like anything else. None: `lm` itself.

    Returns:
        The policy, its certificate and all that was looked at, also written to the folder.

    Raises:
        ValueError: Too few examples for the promise, before anything is decoded; a metric that is not the task's; a
            share, an order or a policy that is not allowed; a folder that holds records made otherwise; a reference
            that is another model or in the same number format.
    """
    grid = replace(grid or Grid(), full_depth=reference is not None)
    _check_reference(lm, reference)
    _check(promise, task, order, minimise, repeats, test)
    if order == "auto":
        order = "pareto" if grid.chains(base) > 1 and len(examples) >= ENOUGH else "path"
    grid = _with_plain(lm, grid, base, promise, order)
    parts = divide(examples, tuning=_tuning_share(tuning, grid, order, minimise), test=test, seed=seed)
    require_enough(promise, parts, promise.failure / grid.sequences(base, order))
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    options = {"max_new_tokens": limit, **(settings or {})}
    asked = as_json({
        "promise": asdict(promise), "base": base.to_dict(), "grid": asdict(grid), "order": order, "seed": seed,
        "minimise": minimise, "must_pay": must_pay,
        "splits": sizes(parts), "conditions": conditions_of(lm, task, options, batch_size),
        "data": {**(about or {}), "sha256": digest(examples)},
    })  # fmt: skip
    state = state_of(lm.split.device.type)
    decoded = Decoded(
        lm, task, parts, folder, max_new_tokens=limit, batch_size=batch_size, settings=settings, progress=progress,
        state=state, reference=reference,
    )  # fmt: skip
    decoded.most = _most(parts, grid, base, order, minimise, repeats)
    below = NO_LESS if must_pay else math.inf
    with locked_by_first(state, folder, "another calibration runs"):
        choices = settings_of(lm, base, grid, partial(decoded.layer_thresholds, TUNING))
        if state.is_main_process:
            write_json(folder / CONFIG, {"schema": "offramp/calibrate-config/1", **asked})
        room = room_of(promise, decoded.of(CERTIFICATION, None), parts[CERTIFICATION], seed)
        outcome, validation = Outcome(None, (), promise.failure), None
        if room.suffices(promise):
            sequences = _sequences(order, choices, decoded, promise, seed, minimise, below)
            outcome = search(
                sequences,
                lambda s: units(decoded, CERTIFICATION, choices[s], promise, seed),
                lambda s: decoded.cost(_priced_on(minimise), choices[s], minimise),
                promise,
                below=below,
            )
        chosen = None if outcome.selected is None else choices[outcome.selected]
        decoded.together_held_out(chosen)
        if repeats and room.suffices(promise):
            validation = _validation(decoded, choices, sequences, promise, repeats, seed, minimise, below)
        certificate = _certificate(promise, room, outcome, choices, asked, decoded, seed=seed, resamples=resamples)
        seconds = seconds_held_out(decoded, chosen, seed=seed, resamples=resamples)
        result = Calibration(certificate, tuple(choices), outcome, validation, seconds)
        if state.is_main_process:
            result.save(folder)
            save_calibration(result, folder)
        state.wait_for_everyone()
    return result


def _check(promise: Promise, task: Task, order: str, minimise: str, repeats: int, test: float) -> None:
    if promise.metric not in task.metrics:
        raise ValueError(f"metric is {promise.metric!r}; {task.name} has {', '.join(task.metrics)}")
    choice("order", order, ORDERS)
    choice("minimise", minimise, MEASURES)
    if order == "chains" and promise.bound == CRC:
        raise ValueError("conformal risk control has no failure probability to divide among chains; use path or pareto")
    if repeats and not test:
        raise ValueError("repeated calibrations need a held-out part; give the test a share above 0")


def _check_reference(lm: LanguageModel, reference: LanguageModel | None) -> None:
    if reference is None:
        return
    if reference.number_format == lm.number_format:
        raise ValueError(
            f"the reference is in {lm.number_format} as the model is; leave it out, or give another format"
        )
    mine, its = lm.model.state_dict(), reference.model.state_dict()
    same = mine.keys() == its.keys() and all(t.shape == its[name].shape for name, t in mine.items())
    if not same or not all(torch.allclose(t.float(), its[name].float(), 2**-6, 1e-4) for name, t in mine.items()):
        raise ValueError("the reference is another model; give the same one in another number format")


def _with_plain(lm: LanguageModel, grid: Grid, base: ExitPolicy, promise: Promise, order: str) -> Grid:
    """The grid with its static exits named. One sequence of conformal risk control cannot have them beside it."""
    if promise.bound == CRC and order == "path":
        if grid.static_layers:
            raise ValueError("conformal risk control has one sequence; try static exits with the order 'pareto'")
        return replace(grid, static_layers=(), plain=False)
    if grid.static_layers is None:
        return replace(grid, static_layers=() if base.confidence == "static" else static_layers_of(lm))
    return grid


def _tuning_share(given: float | None, grid: Grid, order: str, minimise: str) -> float:
    chooses = grid.per_layer or grid.gains or order == "pareto" or is_timed(minimise)
    if chooses and given == 0:
        raise ValueError(
            "thresholds per layer, the order 'pareto' and seconds are found on a tuning part; give it a share"
        )
    return (0.3 if chooses else 0.0) if given is None else given


def _priced_on(minimise: str) -> str:
    """The part that costs are measured on: seconds compare only where all settings took turns."""
    return TUNING if is_timed(minimise) else CERTIFICATION


def _most(
    parts: Mapping[str, Sequence[Example]], grid: Grid, base: ExitPolicy, order: str, minimise: str, repeats: int
) -> int:
    """Answers, if no sequence ends early."""
    settings, n = grid.size(base), {name: len(part) for name, part in parts.items()}
    every = order == "pareto" or is_timed(minimise)
    tuning = (settings + 1 if every else 0) + len(grid.places(base)) * (grid.per_layer + bool(grid.gains))
    return n[TUNING] * tuning + n[CERTIFICATION] * (settings + 1) + n[TEST] * (settings + 1 if repeats else 2)


def _sequences(
    order: str, choices: Sequence[Setting], decoded: Decoded, promise: Promise, seed: int, minimise: str, below: float
) -> Sequence[Sequence[int]]:
    """Orders that no certification example has a part in."""
    if is_timed(minimise):
        decoded.together(TUNING, [None, *choices])
    if order == "path":
        return paths_of(choices)
    if order == "chains":
        return chains_of(choices)
    costs = [decoded.cost(TUNING, setting, minimise) for setting in choices]
    paying = [index for index, cost in enumerate(costs) if cost < below]
    if not paying:
        return [[]]
    means = [float(units(decoded, TUNING, choices[index], promise, seed).mean()) for index in paying]
    return [[paying[place] for place in pareto_front(means, [costs[index] for index in paying])]]


# ---------------------------------------------------------------- what came of it


def _certificate(
    promise: Promise, room: Room, outcome: Outcome, choices: Sequence[Setting], asked: Mapping[str, Any],
    decoded: Decoded, *, seed: int, resamples: int,
) -> Certificate:  # fmt: skip
    chosen = None if outcome.selected is None else choices[outcome.selected]
    tests = [
        {
            "name": choices[test.setting].name,
            "knob": choices[test.setting].knob,
            "changes": changes(as_json(choices[test.setting].policy.to_dict()), asked["base"]),
            **asdict(test),
            "cost": decoded.cost(_priced_on(asked["minimise"]), choices[test.setting], asked["minimise"]),
            "flops": decoded.cost(CERTIFICATION, choices[test.setting], "flops"),
            "flops_per_token": decoded.cost(CERTIFICATION, choices[test.setting], PER_TOKEN),
            "losses": packed_losses(units(decoded, CERTIFICATION, choices[test.setting], promise, seed)),
        }
        for test in outcome.tests
    ]
    n = len(units(decoded, CERTIFICATION, None, promise, seed))
    needed = [
        promise.needed_like(outcome.level, units(decoded, CERTIFICATION, choices[test.setting], promise, seed), seed)
        for test in outcome.tests
        if not any(test.passed for test in outcome.tests)
    ]
    estimates = {
        part: estimate(
            decoded,
            part,
            chosen,
            promise,
            unseen=part == TEST,
            seed=seed,
            resamples=resamples,
            timed=is_timed(asked["minimise"]),
        )
        for part in (CERTIFICATION, TEST)
        if decoded.parts[part]
    }
    return Certificate(
        certified=chosen is not None,
        promise=promise,
        policy=as_json((NEVER if chosen is None else chosen.policy).to_dict()),
        order=asked["order"],
        n=n,
        splits=asked["splits"],
        seed=seed,
        base=asked["base"],
        grid=asked["grid"],
        tests=tests,
        selected=next((i for i, test in enumerate(outcome.tests) if test.setting == outcome.selected), None),
        level=outcome.level,
        needed=min((count for count in needed if count is not None), default=None),
        conditions=asked["conditions"],
        data=asked["data"],
        estimates=estimates,
        versions={"offramp": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        room=asdict(room),
        reference=reference_of(
            decoded.lm.num_layers, None if decoded.reference is None else decoded.reference.number_format
        ),
        exits=_exits(decoded, chosen, promise),
        minimise=asked["minimise"],
        must_pay=asked["must_pay"],
    )


def _exits(decoded: Decoded, chosen: Setting | None, promise: Promise) -> list[str] | None:
    """Where tokens of each answer leave under the chosen setting; on a part it was not chosen by, if there is one."""
    if chosen is None or promise.unit != "prompt":
        return None
    records = decoded.of(TEST if decoded.parts[TEST] else CERTIFICATION, chosen)
    return [text for text in (packed(record.exit_layers) for record in records) if text]


def _validation(
    decoded: Decoded, choices: Sequence[Setting], sequences: Sequence[Sequence[int]], promise: Promise, repeats: int,
    seed: int, minimise: str, below: float,
) -> Validation:  # fmt: skip
    """Of certification and held-out part together, each answered as it was; seconds stay those of the tuning part."""
    both = (CERTIFICATION, TEST)
    examples = [example for part in both for example in decoded.parts[part]]
    full = [record for part in both for record in decoded.of(part, None)]
    nothing = np.zeros(0)
    losses, paid = [nothing] * len(choices), [Spent(nothing, nothing)] * len(choices)
    ones = np.ones(len(examples))
    for setting in {setting for sequence in sequences for setting in sequence}:
        records = [record for part in both for record in decoded.of(part, choices[setting])]
        losses[setting] = promise.losses(records, full)
        if is_timed(minimise):
            paid[setting] = Spent(decoded.cost(TUNING, choices[setting], minimise) * ones, ones)
        else:
            paid[setting] = spent(records, minimise)
    whole = Spent(ones, ones) if is_timed(minimise) else spent(full, minimise)
    share = len(decoded.parts[CERTIFICATION]) / len(examples)
    return validate(
        examples, losses, paid, whole, sequences, promise, share=share, repeats=repeats, seed=seed, below=below,
        cost=MEASURES[minimise],
    )  # fmt: skip
