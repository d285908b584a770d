"""What an exit really knows: probabilities made honest, and sets and intervals that shrink with depth.

Everything here works on features and logits of exits (`ExitOutputs`), knows neither transformers nor files of data, and
reads config -> state -> fit -> apply. Arithmetic of fits is float64; everything is deterministic given a seed. A method
is a module, whose `fit` and `apply` go by its name, such as `nested_conformal.fit`.
"""

from __future__ import annotations

# methods
from offramp.uncertainty import (
    avcs_classification,
    avcs_regression,
    bayesian_regression,
    nested_conformal,
    per_exit,
    set_exits,
)

# their settings
from offramp.uncertainty.avcs_classification import AVCSClassificationConfig
from offramp.uncertainty.avcs_regression import AVCSRegressionConfig
from offramp.uncertainty.bayesian_regression import BayesianRegressionConfig

# probabilities that do not fall
from offramp.uncertainty.monotone import ProductConfig, caching_anytime, product_anytime, violations
from offramp.uncertainty.nested_conformal import NestedConformalConfig

# what all methods read
from offramp.uncertainty.outputs import ExitOutputs, require_disjoint
from offramp.uncertainty.per_exit import PerExitConfig

# honest probabilities
from offramp.uncertainty.posterior import Posterior, PosteriorConfig, load_posterior
from offramp.uncertainty.set_exits import SetExitConfig

# what they give
from offramp.uncertainty.sets import ClassSets, Intervals

__all__ = [
    "AVCSClassificationConfig",
    "AVCSRegressionConfig",
    "BayesianRegressionConfig",
    "ClassSets",
    "ExitOutputs",
    "Intervals",
    "NestedConformalConfig",
    "PerExitConfig",
    "Posterior",
    "PosteriorConfig",
    "ProductConfig",
    "SetExitConfig",
    "avcs_classification",
    "avcs_regression",
    "bayesian_regression",
    "caching_anytime",
    "load_posterior",
    "nested_conformal",
    "per_exit",
    "product_anytime",
    "require_disjoint",
    "set_exits",
    "violations",
]
