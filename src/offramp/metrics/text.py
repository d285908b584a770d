"""How well a text agrees with references: per sample in [0, 1], and for a whole corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, references, at least one) -> score in [0, 1], the best over the references."""


def _todo(prediction: str, references: Sequence[str]) -> float:
    raise NotImplementedError


METRICS: dict[str, Metric] = dict.fromkeys(("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"), _todo)
"""Scores of one sample by name; larger is better."""


def corpus_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores of all samples together: corpus BLEU and chrF in 0..100, means in [0, 1] of everything else.

    Args:
        names: Of `METRICS`.
        predictions: [N], at least one.
        references: At least one for each prediction; their number may differ.

    Returns:
        Score by name.

    Raises:
        ValueError: An unknown name, or numbers that do not fit.
    """
    raise NotImplementedError
