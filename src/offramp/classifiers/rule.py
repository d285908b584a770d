"""By what inputs leave a classifier early: thresholds that are given, those of a budget, or a certified one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offramp.classifiers.answers import Thresholds
from offramp.classifiers.calibrated import Calibrated
from offramp.values import ArgumentError


@dataclass(frozen=True)
class Rule:
    """Thresholds, one for all exits or one each (None: no input leaves early), and where they come from.

    Attributes:
        thresholds: What a confidence has to be above.
        words: Where they come from.
        spent: For a budget, what was asked for and the quantile q that meets it.
    """

    thresholds: Thresholds
    words: str
    spent: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinities are null."""
        given = self.thresholds if isinstance(self.thresholds, Sequence) else [self.thresholds]
        limits = [_finite(float(value)) for value in given if value is not None]
        spent = {} if self.spent is None else {"budget": self.spent[0], "q": _finite(self.spent[1])}
        return {"words": self.words, **spent, "thresholds": limits}


def rule_of(calibrated: Calibrated | None, budget: float | None, thresholds: Thresholds, confidence: str) -> Rule:
    """The rule that is asked for.

    Args:
        calibrated: What the classifier's posterior holds; None: there is none.
        budget: See `offramp.classify`, like the rest.
        thresholds: One for all exits, or one each.
        confidence: What is compared with them.

    Returns:
        The thresholds, and where they come from; without any a certified one, if there is one.

    Raises:
        ArgumentError: Arguments that do not go together.
        ValueError: The budget cannot be had.
    """
    if budget is not None:
        if thresholds is not None:
            raise ArgumentError("give one of `budget` and `thresholds`")
        if calibrated is None:
            raise ArgumentError("`budget` needs `posterior`: thresholds come from the rows of offramp calibrate")
        if confidence != "max":
            raise ArgumentError("`budget` has thresholds for `confidence` max only")
        found, full = calibrated.budget(budget), calibrated.full_cost
        met = (
            f"{found.target:.4g} FLOPs per row (on the threshold split {found.realised:.4g})"
            if full is None
            else f"{found.target / full:.3f} of the plain full network's FLOPs (on the threshold split "
            f"{found.realised / full:.3f})"
        )
        return Rule(found.thresholds.tolist(), f"a budget of {met}", (budget, found.q))
    if thresholds is not None:
        return Rule(thresholds, f"leaving above {thresholds}")
    if calibrated is None or calibrated.certified is None:
        return Rule(None, "full depth, for want of a budget or a threshold")
    if confidence != "max":
        raise ArgumentError(
            f"the threshold in `posterior` is certified for `confidence` max, not for {confidence}; give `thresholds` "
            "for it, or leave out `confidence`"
        )
    certified, certificate = calibrated.certified, calibrated.certificate or {}
    against = certificate["promise"].get("reference") or "the last exit with the posterior"  # as it once was
    words = f"the certified threshold, {certified:.6g} (its promise is against {against})"
    return Rule(certified, words if certificate["index"] else "full depth, for no early leaving is certified")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
