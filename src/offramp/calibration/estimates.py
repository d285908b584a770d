"""What a setting loses, saves and answers on one part of the data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.decoded import Decoded
from offramp.calibration.evidence import packed
from offramp.calibration.grid import Setting
from offramp.calibration.promise import Promise
from offramp.calibration.splits import TEST
from offramp.evaluation.summary import summarise
from offramp.metrics.intervals import Bootstrap

KEPT = (
    "quality",
    "difference",
    "identical",
    "exit_layer",
    "flops_ratio",
    "decode_flops_ratio",
    "flops_per_token_ratio",
    "own_flops_per_token_ratio",
    "bytes_ratio",
    "histogram",
)
"""Fields of `ArmSummary` that are the same whenever and wherever they are worked out."""
SECONDS = ("seconds_ratio", "seconds_per_token_ratio", "own_seconds_per_token_ratio")
"""Fields that are not."""


def units(decoded: Decoded, part: str, setting: Setting | None, promise: Promise, seed: int) -> NDArray[np.float64]:
    """The losses of a setting on a part, one per independent draw, in an order fixed in advance."""
    full = decoded.of(part, None)
    losses = promise.losses(decoded.of(part, setting), full)
    return promise.units(losses, [record.group for record in full], seed)


def estimate(
    decoded: Decoded, part: str, setting: Setting | None, promise: Promise, *, unseen: bool, seed: int, resamples: int,
    timed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Mean loss, over the promise's units, and costs, over prompts, with bootstrap intervals over groups.

    Args:
        decoded: All answers.
        part: A key of `decoded.parts`.
        setting: Of which setting; None: the full model.
        promise: What a loss is.
        unseen: The part had no share in choosing the setting, so that an upper limit of the mean loss can be given.
        seed: Of the draws.
        resamples: Their number.
        timed: Seconds, too.

    Returns:
        JSON values; `losses` are those of each draw, packed (`offramp.calibration.evidence`).
    """
    full, records = decoded.of(part, None), decoded.of(part, setting)
    bootstrap = Bootstrap([record.group for record in full], resamples=resamples, seed=seed)
    summary = _summary(decoded, part, setting, bootstrap)
    values = units(decoded, part, setting, promise, seed)
    if promise.unit == "group":  # one loss for each, as the promise counts
        loss = Bootstrap([str(row) for row in range(len(values))], resamples=resamples, seed=seed).mean(values.tolist())
    else:
        loss = bootstrap.mean(promise.losses(records, full).tolist())
    upper = {"upper": promise.upper_limit(values)} if unseen and setting is not None else {}
    kept = {name: summary[name] for name in (*KEPT, *(SECONDS if timed else ()))}
    return {"examples": len(full), "loss": asdict(loss), **upper, "losses": packed(values), **kept}


def seconds_held_out(decoded: Decoded, setting: Setting | None, *, seed: int, resamples: int) -> dict[str, Any] | None:
    """Seconds over the full model's on the held-out part, where the two took turns.

    Returns:
        Intervals as JSON values, or None each; None if nothing is held out, or the setting is the full model.
    """
    if setting is None or not decoded.parts[TEST]:
        return None
    groups = [record.group for record in decoded.of(TEST, None)]
    summary = _summary(decoded, TEST, setting, Bootstrap(groups, resamples=resamples, seed=seed))
    return {name: summary[name] for name in SECONDS}


def _summary(decoded: Decoded, part: str, setting: Setting | None, bootstrap: Bootstrap) -> dict[str, Any]:
    same = decoded.same_prompt(setting)
    return asdict(
        summarise(
            decoded.of(part, setting), decoded.of(part, None),
            policy=None if setting is None else setting.policy.to_dict(), num_layers=decoded.lm.num_layers,
            bootstrap=bootstrap, same_prompt=None if same is None else decoded.of(part, same),
        )
    )  # fmt: skip
