"""Any supported model as start / run(lo, hi) / fill / readout: the only door to the internals of `transformers`.

Everything family-specific stands in `table`. `tests/test_families.py` runs the same contract over every row of it; an
architecture without a row is refused.
"""

from offramp.families.network import Edit as Edit
from offramp.families.network import acting as acting
from offramp.families.network import run_block as run_block
from offramp.families.split_model import SplitModel as SplitModel
from offramp.families.table import FAMILIES as FAMILIES
from offramp.families.table import Family as Family
from offramp.families.table import UnsupportedModelError as UnsupportedModelError
