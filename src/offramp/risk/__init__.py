"""Risk control: thresholds that keep a promise on how much is lost by leaving early.

P( mean loss of new prompts <= `tolerance` ) >= 1 - `failure`, over the draw of the calibration prompts, which must be
independent and like the new ones. The promise is about prompts, not tokens, and on average over them, not for each.

The literature calls both numbers δ and ε, in either order; here they are `tolerance` and `failure` only.
"""

from __future__ import annotations

# p-values
from offramp.risk.bounds import (
    BOUNDS,
    Bound,
    binomial,
    hoeffding,
    hoeffding_bentkus,
    hoeffding_signed,
    samples_needed,
    samples_needed_like,
    wsr,
)

# which settings of a sequence pass
from offramp.risk.control import Certified, conformal_risk_control, fixed_sequence, pareto_front

# what is lost on a prompt
from offramp.risk.losses import risk_consistency, tail, textual_consistency

# what is promised, and which setting of several sequences is chosen
from offramp.risk.promise import CRC, Promised
from offramp.risk.search import Outcome, Test, search

# whether a promise is kept in use
from offramp.risk.sequence import lower_limit, wealth

__all__ = [
    "BOUNDS",
    "CRC",
    "Bound",
    "Certified",
    "Outcome",
    "Promised",
    "Test",
    "binomial",
    "conformal_risk_control",
    "fixed_sequence",
    "hoeffding",
    "hoeffding_bentkus",
    "hoeffding_signed",
    "lower_limit",
    "pareto_front",
    "risk_consistency",
    "samples_needed",
    "samples_needed_like",
    "search",
    "tail",
    "textual_consistency",
    "wealth",
    "wsr",
]
