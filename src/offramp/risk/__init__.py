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

# choosing a setting
from offramp.risk.control import (
    Certified,
    Chains,
    MeanControlled,
    ParetoTested,
    chains,
    conformal_risk_control,
    fixed_sequence,
    pareto_front,
    pareto_testing,
    split,
)

# what is lost on a prompt
from offramp.risk.losses import best_reference, risk_consistency, tail, textual_consistency

__all__ = [
    "BOUNDS",
    "Bound",
    "Certified",
    "Chains",
    "MeanControlled",
    "ParetoTested",
    "best_reference",
    "binomial",
    "chains",
    "conformal_risk_control",
    "fixed_sequence",
    "hoeffding",
    "hoeffding_bentkus",
    "hoeffding_signed",
    "pareto_front",
    "pareto_testing",
    "risk_consistency",
    "samples_needed",
    "samples_needed_like",
    "split",
    "tail",
    "textual_consistency",
    "wsr",
]
