"""Early-exit models: readouts at several depths, confidence, and decoding that stops when it is sure.

Shapes are written with these letters everywhere: **B** batch · **A** rows still in · **T** time · **L** layers ·
**D** width · **V** vocabulary · **K** kept tokens · **P** protected tokens · **X** encoder positions. Layers count from
1: "after layer l" means that l blocks ran; L is the full model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.classifiers.calibrate_classifier import calibrate_classifier as calibrate_classifier
    from offramp.classifiers.classifier import EarlyExitClassifier as EarlyExitClassifier
    from offramp.classifiers.classify import classify as classify
    from offramp.classifiers.config import ClassifierTrainConfig as ClassifierTrainConfig
    from offramp.classifiers.evaluate_classifier import evaluate_classifier as evaluate_classifier
    from offramp.classifiers.train_classifier import train_classifier as train_classifier
    from offramp.core.batch import Step as Step
    from offramp.core.confidence import Contrast as Contrast
    from offramp.core.costs import Costs as Costs
    from offramp.core.exits import Exits as Exits
    from offramp.core.generation import Generation as Generation
    from offramp.core.language_model import LanguageModel as LanguageModel
    from offramp.core.policy import ExitPolicy as ExitPolicy
    from offramp.distillation.distill_grid import distill_grid as distill_grid
    from offramp.distillation.language_models import TokenDistillation as TokenDistillation
    from offramp.families import SplitModel as SplitModel
    from offramp.families import UnsupportedModelError as UnsupportedModelError
    from offramp.hub.messages import ModelError as ModelError
    from offramp.hub.models import load as load
    from offramp.lm.calibrate import calibrate as calibrate
    from offramp.lm.distill import distill as distill
    from offramp.lm.evaluate import evaluate as evaluate
    from offramp.lm.fit_posterior import fit_posterior as fit_posterior
    from offramp.lm.probe import probe as probe
    from offramp.lm.train import train as train
    from offramp.training.config import TrainConfig as TrainConfig

__version__ = "0.1.0"

_HOMES = {
    # models
    "load": "hub.models",
    "LanguageModel": "core.language_model",
    "Generation": "core.generation",
    "Exits": "core.exits",
    "EarlyExitClassifier": "classifiers.classifier",
    "ModelError": "hub.messages",
    "UnsupportedModelError": "families",
    # what is done with them
    "probe": "lm.probe",
    "train": "lm.train",
    "TrainConfig": "training.config",
    "evaluate": "lm.evaluate",
    "calibrate": "lm.calibrate",
    "fit_posterior": "lm.fit_posterior",
    "distill": "lm.distill",
    "distill_grid": "distillation.distill_grid",
    "TokenDistillation": "distillation.language_models",
    "train_classifier": "classifiers.train_classifier",
    "ClassifierTrainConfig": "classifiers.config",
    "evaluate_classifier": "classifiers.evaluate_classifier",
    "calibrate_classifier": "classifiers.calibrate_classifier",
    "classify": "classifiers.classify",
    # when to leave
    "ExitPolicy": "core.policy",
    "Contrast": "core.confidence",
    # generation, piece by piece
    "SplitModel": "families",
    "Step": "core.decoding",
    "Costs": "core.costs",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import offramp` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"offramp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
