"""Risk control: thresholds that keep a promise on how much is lost by leaving early.

P( mean loss of new prompts <= `tolerance` ) >= 1 - `failure`, over the draw of the calibration prompts, which must be
independent and like the new ones. The promise is about prompts, not tokens, and on average over them, not for each.

The literature calls both numbers δ and ε, in either order; here they are `tolerance` and `failure` only.
"""

from __future__ import annotations

# p-values, and bets while a policy is in use
from offramp.risk.bounds import BOUNDS as BOUNDS
from offramp.risk.bounds import Bound as Bound
from offramp.risk.bounds import binomial as binomial
from offramp.risk.bounds import hoeffding as hoeffding
from offramp.risk.bounds import hoeffding_bentkus as hoeffding_bentkus
from offramp.risk.bounds import hoeffding_signed as hoeffding_signed
from offramp.risk.bounds import lower_limit as lower_limit
from offramp.risk.bounds import samples_needed as samples_needed
from offramp.risk.bounds import samples_needed_like as samples_needed_like
from offramp.risk.bounds import wealth as wealth
from offramp.risk.bounds import wsr as wsr

# what is lost on a prompt
from offramp.risk.losses import risk_consistency as risk_consistency
from offramp.risk.losses import tail as tail
from offramp.risk.losses import textual_consistency as textual_consistency

# what is promised, and which setting of several sequences is chosen
from offramp.risk.search import CRC as CRC

# which settings of a sequence pass
from offramp.risk.search import Certified as Certified
from offramp.risk.search import Outcome as Outcome
from offramp.risk.search import Promised as Promised
from offramp.risk.search import Test as Test
from offramp.risk.search import conformal_risk_control as conformal_risk_control
from offramp.risk.search import fixed_sequence as fixed_sequence
from offramp.risk.search import pareto_front as pareto_front
from offramp.risk.search import search as search
