"""Answers of every setting to every part of the data, made when first asked for and kept in a file each.

records/PART/SETTING.jsonl     an interrupted calibration goes on from them, another promise finds them there
thresholds.json                thresholds of each layer, by what was tested on which examples
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.bounded import read_object
from offramp.calibration.grid import Setting
from offramp.calibration.layer_thresholds import layer_thresholds
from offramp.core.policy import ExitPolicy
from offramp.digests import sealed, unsealed, warn_of_none
from offramp.evaluation.arms import FULL
from offramp.evaluation.processes import shared, state_of
from offramp.evaluation.record_file import Progress, Record, header_of
from offramp.evaluation.records import decode_records
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.tasks import Example, Task

RECORDS, THRESHOLDS = "records", "thresholds.json"
AGAIN = "remove it to find thresholds again"


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
    """

    def __init__(
        self, lm: LanguageModel, task: Task, parts: Mapping[str, Sequence[Example]], folder: Path, *,
        max_new_tokens: int, batch_size: int, settings: Mapping[str, Any] | None, progress: Progress | None,
        state: Any = None,
    ) -> None:  # fmt: skip
        self.lm, self.task, self.parts, self.folder = lm, task, parts, folder
        self.max_new_tokens, self.batch_size, self.settings = max_new_tokens, batch_size, dict(settings or {})
        self.state = state or state_of(lm.split.device.type)
        self.progress = progress if self.state.is_main_process else None
        self.most = 0  # answers, if no sequence ends early
        self._done = 0
        self._records: dict[tuple[str, str], list[Record]] = {}

    def of(self, part: str, setting: Setting | None) -> list[Record]:
        """The records of a setting (None: the full model) on a part, in the order of its examples."""
        name = FULL if setting is None else setting.name
        if (part, name) not in self._records:
            full = None if setting is None else {record.id: record for record in self.of(part, None)}
            file = FULL.replace(" ", "-") if setting is None else setting.file_name

            def answer(examples: Sequence[Example], paths: Mapping[str, Path]) -> dict[str, list[Record]]:
                made = decode_records(
                    self.lm, self.task, examples, name, None if setting is None else setting.policy, paths[name],
                    full=full, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, settings=self.settings,
                    progress=self._count(part),
                )  # fmt: skip
                return {name: made}

            stem = self.folder / RECORDS / part / file
            made = shared(self.state, {name: stem}, self.parts[part], self.batch_size, answer)
            self._records[part, name] = made[name]
            self._done += len(self.parts[part])
        return self._records[part, name]

    def cost(self, part: str, setting: Setting) -> float:
        """FLOPs on a part, over the full model's."""
        mine, whole = (sum(record.flops for record in self.of(part, s)) for s in (setting, None))
        return mine / whole

    def layer_thresholds(self, part: str, policy: ExitPolicy, shares: Sequence[float]) -> list[tuple[float, ...]]:
        """Thresholds for each layer (see `offramp.calibration.layer_thresholds`), from the file if they are there."""
        options = {"max_new_tokens": self.max_new_tokens, **self.settings}
        header = header_of(self.lm, vars(self.task), self.parts[part], policy, options, 1)
        key = json.dumps([header, list(shares)], sort_keys=True)
        path = self.folder / THRESHOLDS
        known = _thresholds(path) if path.exists() else {}
        self.state.wait_for_everyone()  # all have read what there was before one of them writes
        if key not in known:
            count, mine = self._count(part), self.parts[part][self.state.process_index :: self.state.num_processes]
            made = layer_thresholds(
                self.lm, self.task, mine, policy, shares, max_new_tokens=self.max_new_tokens, settings=self.settings,
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

    def _count(self, part: str) -> Progress | None:
        if self.progress is None:
            return None
        progress, before, size = self.progress, self._done, len(self.parts[part])

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
