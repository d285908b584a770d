"""Answers of every setting to every part of the data, made when first asked for, and what a setting loses there.

records/PART/SETTING.jsonl     an interrupted calibration goes on from them, another promise finds them there
thresholds.json                thresholds of each layer, by what was tested on which examples

The parts are those that choose, that certify and that judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.evidence import packed
from offramp.calibration.grid import PLAIN, Setting
from offramp.calibration.layer_thresholds import layer_thresholds
from offramp.calibration.promise import Promise, cost
from offramp.core.policy import ExitPolicy
from offramp.evaluation.arms import FULL, short_prompt
from offramp.evaluation.record_file import Progress, Record, header_of, read_records, shared, state_of
from offramp.evaluation.records import decode_arms
from offramp.evaluation.summary import summarise
from offramp.metrics.intervals import Bootstrap
from offramp.runs.bounded import read_object
from offramp.runs.digests import sealed, unsealed, warn_of_none
from offramp.runs.files import write_json
from offramp.tasks import split_groups

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task

TUNING, CERTIFICATION, TEST = "tuning", "certification", "test"
RECORDS, THRESHOLDS = "records", "thresholds.json"
AGAIN = "remove it to find thresholds again"
KEPT = (
    "quality", "difference", "identical", "exit_layer", "flops_ratio", "decode_flops_ratio", "flops_per_token_ratio",
    "own_flops_per_token_ratio", "bytes_ratio", "histogram",
)  # fmt: skip
"""Fields of `ArmSummary` that are the same whenever and wherever they are worked out."""
SECONDS = ("seconds_ratio", "seconds_per_token_ratio", "own_seconds_per_token_ratio")
"""Fields that are not."""


def divide(examples: Sequence[Example], *, tuning: float, test: float, seed: int) -> dict[str, list[Example]]:
    """Part examples at random by whole groups: shares that choose and are held out, maybe 0; the rest certifies."""
    if min(tuning, test) < 0 or tuning + test >= 1 - 1e-9:
        raise ValueError(f"the tuning share is {tuning} and the test share {test}; they must leave some to certify")
    if len({example.id for example in examples}) < len(examples):
        raise ValueError("two examples have the same id; give each one of its own")
    shares = {TUNING: tuning, CERTIFICATION: 1 - tuning - test, TEST: test}
    given = {name: share for name, share in shares.items() if share}
    parts = dict(zip(given, split_groups(examples, list(given.values()), seed), strict=True))
    return {name: parts.get(name, []) for name in shares}


def sizes(parts: Mapping[str, Sequence[Example]]) -> dict[str, list[int]]:
    """[examples, groups] of each part, by its name; a ValueError if a group is in two parts."""
    groups = {name: {example.group for example in part} for name, part in parts.items()}
    if len(set().union(*groups.values())) < sum(map(len, groups.values())):
        raise ValueError("a group is in two parts; divide examples by group")
    return {name: [len(part), len(groups[name])] for name, part in parts.items()}


def require_enough(promise: Promise, parts: Mapping[str, Sequence[Example]], level: float) -> None:
    """Raise a ValueError, which says how many would do, if the certification part is too small with no loss at all."""
    have = {name: examples if promise.unit == "prompt" else groups for name, (examples, groups) in sizes(parts).items()}
    needed, n, total = promise.needed(level), have[CERTIFICATION], sum(have.values())
    if needed is None or n >= needed:
        return
    wanted = f"tolerance {promise.tolerance:g}" + (f" at level {level:.3g}" if promise.bound != "crc" else "")
    raise ValueError(
        f"{n} {promise.unit}s are too few to certify {wanted}: bound {promise.bound} needs at least {needed} even if "
        f"none loses anything; give about {math.ceil(total * needed / n)} in all (there are {total}: "
        f"{', '.join(f'{count} {name}' for name, count in have.items())}), or smaller shares to tuning and test, or "
        "ask for a larger tolerance or failure probability"
    )


class Decoded:
    """Records by part and setting.

    Args:
        lm: The model.
        task: How to ask and how to judge.
        parts: Examples by the name of the part.
        folder: Where files are kept.
        max_new_tokens: Longest answer.
        batch_size: Examples answered together.
        settings: Further options of `LanguageModel.stream`, as JSON values.
        progress: Called with the answers done, asked for at most, and what comes next.
        state: `accelerate`'s; all processes ask for the same in the same order, and each answers its share. None: this
            process is alone.
        reference: The full model in another number format, whose answers losses and costs are relative to; None: `lm`.
    """

    def __init__(
        self, lm: LanguageModel, task: Task, parts: Mapping[str, Sequence[Example]], folder: Path, *,
        max_new_tokens: int, batch_size: int, settings: Mapping[str, Any] | None, progress: Progress | None,
        state: Any = None, reference: LanguageModel | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.task, self.parts, self.folder = lm, task, parts, folder
        self.max_new_tokens, self.batch_size, self.settings = max_new_tokens, batch_size, dict(settings or {})
        self.reference = reference
        self.state = state or state_of(lm.split.device.type)
        self.progress = progress if self.state.is_main_process else None
        self.most = 0  # answers, if no sequence ends early
        self._done = 0
        self._records: dict[tuple[str, str], list[Record]] = {}

    def of(self, part: str, setting: Setting | None) -> list[Record]:
        """The records of a setting (None: the full model) on a part, in the order of its examples."""
        if setting is not None:
            self.together(part, [None])
        return self.together(part, [setting])[0]

    def together(self, part: str, settings: Sequence[Setting | None]) -> list[list[Record]]:
        """The records of several settings on a part, those that are not there yet made in turns: seconds compare.

        Args:
            part: A key of `parts`.
            settings: Which; None: the full model, which comes first.

        Returns:
            One list of records per setting.
        """
        asked = {FULL if setting is None else setting.name: setting for setting in settings}
        new = {name: setting for name, setting in asked.items() if (part, name) not in self._records}
        if new:
            stems = {name: self._stem(part, setting) for name, setting in new.items()}
            count = self._count(part, len(new))

            def answer(examples: Sequence[Example], paths: Mapping[str, Path]) -> dict[str, list[Record]]:
                arms = {name: None if (s := new[name]) is None else s.policy for name in paths}
                return decode_arms(
                    self.lm, self.task, examples, arms, paths, full={} if FULL in paths else self._full(part),
                    max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, settings=self.settings,
                    progress=count, reference=self.reference,
                )  # fmt: skip

            made = shared(self.state, stems, self.parts[part], self.batch_size, answer)
            self._records |= {(part, name): records for name, records in made.items()}
            self._done += len(self.parts[part]) * len(new)
        return [self._records[part, name] for name in asked]

    def together_held_out(self, chosen: Setting | None) -> None:
        """Answer the held-out part with the full model, the chosen setting and its prompt without exits, in turns."""
        if self.parts[TEST]:
            self.together(TEST, [None, *(s for s in (chosen, self.same_prompt(chosen)) if s is not None)])

    def same_prompt(self, setting: Setting | None) -> Setting | None:
        """The setting with the same shortened prompt and no exits; None where prompts run in full."""
        stop = None if setting is None else setting.policy.prompt_layer
        return None if stop is None else Setting(f"prompt to {stop}", short_prompt(stop), None, 0, 0.0, PLAIN)

    def _stem(self, part: str, setting: Setting | None) -> Path:
        return self.folder / RECORDS / part / (FULL.replace(" ", "-") if setting is None else setting.file_name)

    def _full(self, part: str) -> dict[str, Record]:
        """Records of the full model by example id; another process may have made them just now."""
        if (part, FULL) in self._records:
            return {record.id: record for record in self._records[part, FULL]}
        path = self._stem(part, None)
        return {record.id: record for record in read_records(path.with_name(f"{path.name}.jsonl"))[1]}

    def cost(self, part: str, setting: Setting, measure: str) -> float:
        """What a setting costs on a part, over the full model's (`offramp.calibration.promise`)."""
        return cost(self.of(part, setting), self.of(part, None), measure)

    def layer_thresholds(
        self, part: str, policy: ExitPolicy, knobs: Sequence[float], rule: str
    ) -> list[tuple[float, ...]]:  # fmt: skip
        """Thresholds for each layer (see `offramp.calibration.layer_thresholds`), from the file if they are there."""
        options = {"max_new_tokens": self.max_new_tokens, **self.settings}
        header = header_of(self.lm, vars(self.task), self.parts[part], policy, options, 1)
        key = json.dumps([header, list(knobs), *([] if rule == "share" else [rule])], sort_keys=True)
        path = self.folder / THRESHOLDS
        known = _thresholds(path) if path.exists() else {}
        self.state.wait_for_everyone()  # all have read what there was before one of them writes
        if key not in known:
            count, mine = self._count(part), self.parts[part][self.state.process_index :: self.state.num_processes]
            made = layer_thresholds(
                self.lm, self.task, mine, policy, knobs, rule=rule, max_new_tokens=self.max_new_tokens,
                settings=self.settings,
                progress=None if count is None else lambda done: count(done, len(mine), "thresholds"),
                gather=self._gathered,
            )  # fmt: skip
            known[key] = [list(row) for row in made]
            if self.state.is_main_process:
                write_json(path, sealed({"thresholds": known}))
        self._done += len(self.parts[part])
        return [tuple(row) for row in known[key]]

    def _gathered(self, values: list[float]) -> list[float]:
        """Those of all processes."""
        from accelerate.utils import gather_object

        return values if self.state.num_processes == 1 else list(gather_object(values))

    def _count(self, part: str, arms: int = 1) -> Progress | None:
        if self.progress is None:
            return None
        progress, before, size = self.progress, self._done, len(self.parts[part]) * arms

        def update(done: int, total: int, what: str = "") -> None:
            done = done * size // max(total, 1)  # if the others are as far as this process
            progress(before + done, max(self.most, before + size), f"{part}: {what}")

        return update


def _thresholds(path: Path) -> dict[str, list[list[float]]]:
    """Thresholds of each layer by what they are of; earlier versions kept nothing else."""
    values = read_object(path, AGAIN)
    if "digest" not in values:
        warn_of_none(path)
        return values
    found = unsealed(values, path, AGAIN).get("thresholds")
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no thresholds; {AGAIN}")
    return found


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
