"""Early-exit models: readouts at several depths, confidence, and decoding that stops when it is sure.

Shapes are written with these letters everywhere: **B** batch · **A** rows still in · **T** time · **L** layers ·
**D** width · **V** vocabulary · **K** kept tokens · **P** protected tokens · **X** encoder positions. Layers count from
1: "after layer l" means that l blocks ran; L is the full model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.classifiers import EarlyExitClassifier as EarlyExitClassifier
    from offramp.confidence import Contrast as Contrast
    from offramp.costs import Costs as Costs
    from offramp.decoding import Step as Step
    from offramp.exits import Exits as Exits
    from offramp.families import SplitModel as SplitModel
    from offramp.families import UnsupportedModelError as UnsupportedModelError
    from offramp.language_model import Generation as Generation
    from offramp.language_model import LanguageModel as LanguageModel
    from offramp.models import load as load
    from offramp.packaged import ModelError as ModelError
    from offramp.policy import ExitPolicy as ExitPolicy

__version__ = "0.1.0"

_HOMES = {
    # models
    "load": "models",
    "LanguageModel": "language_model",
    "Generation": "language_model",
    "Exits": "exits",
    "EarlyExitClassifier": "classifiers",
    "ModelError": "packaged",
    "UnsupportedModelError": "families",
    # when to leave
    "ExitPolicy": "policy",
    "Contrast": "confidence",
    # generation, piece by piece
    "SplitModel": "families",
    "Step": "decoding",
    "Costs": "costs",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import offramp` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"offramp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
