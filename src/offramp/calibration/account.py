"""What a calibration found, as its certificate keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp.calibration.promise import Promise
from offramp.calibration.room import Room

_RATIOS = {
    "flops-per-token": "flops_per_token_ratio", "flops": "flops_ratio",
    "seconds-per-token": "seconds_per_token_ratio", "seconds": "seconds_ratio",
}  # fmt: skip
"""Of `estimates`, by what is minimised."""


@dataclass(frozen=True)
class Account:
    """What is known about a policy.

    Attributes:
        certified: Whether anything is promised of a policy that leaves early; if not, the policy never does, which is
            the full model and loses nothing: nothing else passed, or nothing that passed costs less.
        promise: Tolerance, failure, kind of loss, metric, margin, bound and unit.
        policy: The certified policy, as JSON values.
        order: "path", "chains" or "pareto": how the grid was gone through.
        n: Independent draws that certified: prompts, or groups of them.
        splits: Examples and groups by part, as [examples, groups].
        seed: Of the splits and of the order of draws.
        base: The policy whose open values the grid filled in.
        grid: What was tried.
        tests: The settings that were looked at, in their order: name, value on the grid (`knob`), what their policies
            change of the base, mean loss, p-value, passed, costs over the full model's (`cost` is what was minimised,
            `flops` and `flops_per_token` are those of the certification part; earlier versions have all FLOPs of those
            that passed as `cost`), and the losses, packed (`offramp.calibration.evidence`).
        selected: Which of them was chosen; None: none.
        level: At which each sequence was tested.
        needed: If nothing is certified, about how many draws would certify one of the settings that were looked at, if
            losses stay as they are: their mean, or for the bound "wsr" all of them, repeated and shuffled
            (`Promise.needed_like`). None: no number would, or none within reason.
        conditions: Model, its weights' and exits' fingerprints, dtype, task, chat template, decoding settings, batch
            size: what the promise holds for.
        data: Name and SHA-256 of the examples.
        estimates: By part, mean loss and costs with 95 % bootstrap intervals, and the histogram of exit layers. On the
            part "test", which nothing was chosen by, also an upper limit of the mean loss by the promise's bound.
        versions: Of offramp, torch and transformers.
        room: What there was to lose (`offramp.calibration.room.Room`), as JSON values; None in earlier versions.
        reference: What losses and costs are relative to.
        exits: Where the tokens of each answer left (`offramp.calibration.drift.packed`), for `drift`: of the held-out
            part, or without one of the certification part. None: nothing was certified, prompts of one group may be
            alike, or the certificate is of an earlier version.
        minimise: Which cost the chosen setting has the smallest of (`offramp.calibration.spending.MEASURES`). None: an
            earlier version, that of all FLOPs.
        must_pay: Whether a policy that does not cost less than the full model was left out.
    """

    certified: bool
    promise: Promise
    policy: dict[str, Any]
    order: str
    n: int
    splits: dict[str, list[int]]
    seed: int
    base: dict[str, Any]
    grid: dict[str, Any]
    tests: list[dict[str, Any]]
    selected: int | None
    level: float
    needed: int | None
    conditions: dict[str, Any]
    data: dict[str, Any]
    estimates: dict[str, Any]
    versions: dict[str, str]
    room: dict[str, Any] | None = None
    reference: str = "the full model"
    exits: list[str] | None = None
    minimise: str | None = None
    must_pay: bool = False

    @property
    def keeps_losses(self) -> bool:
        """Whether the statement follows from what is kept; it does not in the first version."""
        return self.room is not None and all("losses" in test for test in self.tests)

    @property
    def other_format(self) -> bool:
        """Whether losses and costs are relative to the full model in another number format."""
        return bool(self.grid.get("full_depth"))

    @property
    def pays_nothing(self) -> bool:
        """Whether the policy never exits because nothing that may be used costs less than the full model."""
        if self.certified or not self.must_pay or self.room is None or not Room(**self.room).suffices(self.promise):
            return False
        return not self.tests or any(test["passed"] for test in self.tests)

    @property
    def paid(self) -> dict[str, Any] | None:
        """The cost that was minimised, over the full model's, with its 95 % interval, on the held-out part if any.

        None: an earlier version, or seconds that do not compare there (a part that was not answered in turns).
        """
        seen: dict[str, Any] = self.estimates.get("test", self.estimates["certification"])
        return seen.get(_RATIOS[self.minimise or "flops"])

    @property
    def saves(self) -> bool:
        """Whether the policy was certified and cost less than the full model, on the held-out part if any.

        By the cost that was minimised; seconds that do not compare there are those of the tuning part, by which the
        policy was chosen. What was found of some prompts, no promise: see `saving_is_sure`.
        """
        cost = self.paid
        if cost is not None or self.selected is None:
            return self.certified and cost is not None and bool(cost["value"] < 1)
        return self.certified and bool(self.tests[self.selected]["cost"] < 1)

    @property
    def saving_is_sure(self) -> bool:
        """Whether it `saves`, and the whole interval of its cost is below the full model's."""
        return self.saves and self.paid is not None and self.paid["high"] is not None and bool(self.paid["high"] < 1)
