"""What an exit really knows: calibrated probabilities, and sets and intervals that shrink with depth.

Everything here works on features and logits of exits (`ExitOutputs`), knows neither transformers nor files of data, and
reads config -> state -> fit -> apply. Arithmetic of fits is float64; everything is deterministic given a seed. A method
is a module, whose `fit` and `apply` go by its name, such as `nested_conformal.fit`.
"""

from __future__ import annotations

# methods
from offramp.uncertainty import avcs_classification as avcs_classification
from offramp.uncertainty import avcs_regression as avcs_regression
from offramp.uncertainty import bayesian_regression as bayesian_regression
from offramp.uncertainty import nested_conformal as nested_conformal
from offramp.uncertainty import per_exit as per_exit

# their settings
from offramp.uncertainty.avcs_classification import AVCSClassificationConfig as AVCSClassificationConfig
from offramp.uncertainty.avcs_regression import AVCSRegressionConfig as AVCSRegressionConfig
from offramp.uncertainty.bayesian_regression import BayesianRegressionConfig as BayesianRegressionConfig

# probabilities that do not fall
from offramp.uncertainty.monotone import ProductConfig as ProductConfig
from offramp.uncertainty.monotone import caching_anytime as caching_anytime
from offramp.uncertainty.monotone import product_anytime as product_anytime
from offramp.uncertainty.monotone import violations as violations
from offramp.uncertainty.nested_conformal import NestedConformalConfig as NestedConformalConfig

# what all methods read
from offramp.uncertainty.outputs import ExitOutputs as ExitOutputs
from offramp.uncertainty.outputs import require_disjoint as require_disjoint
from offramp.uncertainty.per_exit import PerExitConfig as PerExitConfig

# calibrated probabilities
from offramp.uncertainty.posterior import Posterior as Posterior
from offramp.uncertainty.posterior import PosteriorConfig as PosteriorConfig
from offramp.uncertainty.posterior import load_posterior as load_posterior

# what they give, and leaving by it
from offramp.uncertainty.sets import ClassSets as ClassSets
from offramp.uncertainty.sets import Intervals as Intervals
from offramp.uncertainty.sets import SetExitConfig as SetExitConfig
from offramp.uncertainty.sets import exits_by_size as exits_by_size
