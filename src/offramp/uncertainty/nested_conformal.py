"""Nested sets with a finite-sample guarantee: split conformal prediction with the largest score over the exits.

With scores s_e(x, y) (`per_exit`, low if plausible) and M_e = max_{l<=e} s_l, the sets {y : M_e(x, y) <= q} are
nested by construction. With q the ⌈(n + 1)(1 - α)⌉-th smallest M_E of n calibration rows, exchangeable with new ones,

    P( y in the sets of all exits ) >= 1 - α

for any model and any rule, however it looks at the data, that says at which exit to stop. The probability is over the
calibration rows and the new row together: not per class, per group (`cells` is for that) or for each row. Vovk et al.
(2005), "Algorithmic Learning in a Random World"; the maximum makes the claim simultaneous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offramp.uncertainty.bayesian_regression import RegressionPrediction
from offramp.uncertainty.outputs import ExitOutputs, require_disjoint
from offramp.uncertainty.per_exit import ClassScore, class_scores, conformal_quantile, label_scores
from offramp.uncertainty.sets import ClassSets, Intervals
from offramp.values import check_level, choice


@dataclass(frozen=True)
class Equaliser:
    """Scores of all exits on one scale: the share of true labels that score lower there.

    Of raw scores the weakest exit dominates the maximum over exits, and the sets of the others gain nothing. The map of
    each exit is its empirical distribution function on the *tune* split, so it is fixed before calibration and leaves
    the guarantee as it is. Deviates in joining the steps by lines and continuing them beyond the ends at the mean
    slope: the map then increases strictly, has an inverse, and tells apart scores larger than any that was seen.

    Attributes:
        scores: Distinct scores, ascending, E tensors [k_e], float64.
        levels: Share of the tune rows up to each, r/(n + 1), E tensors [k_e], float64.
    """

    scores: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]


def fit_equaliser(scores: Tensor) -> Equaliser:
    """Learn the maps from scores of true labels of a tune split, [E, n]; a ValueError unless there are finite ones."""
    if scores.ndim != 2 or not scores.shape[1] or not bool(scores.isfinite().all()):
        raise ValueError(f"finite scores of true labels are needed, exits x rows; shape {list(scores.shape)} was given")
    knots, levels = [], []
    for row in scores.double():
        values, counts = torch.unique(row, return_counts=True)
        knots.append(values)
        levels.append(counts.cumsum(0).double() / (len(row) + 1))
    return Equaliser(tuple(knots), tuple(levels))


def equalise(state: Equaliser, scores: Tensor) -> Tensor:
    """Levels of scores, [E, ...] -> [E, ...]."""
    maps = zip(state.scores, state.levels, scores.double(), strict=True)
    return torch.stack([_joined(knots, levels, some) for knots, levels, some in maps])


def equaliser_inverse(state: Equaliser, levels: Tensor) -> Tensor:
    """The score of each exit that has a level, [...] -> [E, ...]."""
    maps = zip(state.scores, state.levels, strict=True)
    return torch.stack([_joined(ends, knots, levels.double()) for knots, ends in maps])


def _joined(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The line through the points (x, y), both ascending, and beyond them on at the mean slope."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0]) if len(x) > 1 else y.new_ones(())
    beyond = torch.where(at < x[0], y[0] + slope * (at - x[0]), y[-1] + slope * (at - x[-1]))
    if len(x) == 1:
        return beyond
    right = torch.searchsorted(x, at.contiguous(), right=True).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    inner = y[right - 1] + share * (y[right] - y[right - 1])
    return torch.where((at < x[0]) | (at > x[-1]), beyond, inner)


@dataclass(frozen=True)
class NestedConformalConfig:
    """What sets to make.

    Attributes:
        alpha: Probability that the sets of some exit miss the truth, in (0, 1).
        score: Of classes, "complement" or "raps"; numbers have one only.
        equalise: Put the scores of all exits on one scale first, with a tune split (`Equaliser`).
        cells: "all": one guarantee for all rows. "group": one for each group of rows. "class": one for each true class.
            Every cell needs 1/α rows of its own.
        first_exit: Exits before it, counted from 0, are not looked at: their sets hold everything. A poor first exit
            widens the sets of all.
    """

    alpha: float = 0.05
    score: ClassScore = "complement"
    equalise: bool = True
    cells: Literal["all", "group", "class"] = "all"
    first_exit: int = 0

    def __post_init__(self) -> None:
        check_level("alpha", self.alpha)
        choice("score", self.score, ("complement", "raps"))
        choice("cells", self.cells, ("all", "group", "class"))
        if self.first_exit < 0:
            raise ValueError(f"first_exit is {self.first_exit}; exits count from 0")


@dataclass(frozen=True)
class NestedConformal:
    """Where the sets end.

    Attributes:
        cells: Numbers of the cells, ascending, [G], int64; a single 0 if all rows are one.
        quantiles: q of each cell, [G], float64; +inf where there were too few rows.
        rows: Calibration rows of each cell, [G], int64.
        equaliser: Of the scores; None: they are taken raw.
        config: How they were calibrated.
    """

    cells: Tensor
    quantiles: Tensor
    rows: Tensor
    equaliser: Equaliser | None
    config: NestedConformalConfig


def fit(
    scores: Tensor,
    config: NestedConformalConfig | None = None,
    *,
    tune: Tensor | None = None,
    cells: Tensor | None = None,
) -> NestedConformal:
    """Calibrate, from scores.

    Args:
        scores: Of the true labels or numbers of the calibration rows, [E, n]: rows that nothing else was chosen on.
        config: What sets; the default aims at 0.95 with equalised scores.
        tune: Scores of the true labels of *other* rows, [E, t], to equalise with.
        cells: The group or true label of each calibration row, [n], int64, unless all are one cell.

    Returns:
        The quantiles.

    Raises:
        ValueError: Scores are missing or NaN, or what the config asks for was not given.
    """
    config = config or NestedConformalConfig()
    if scores.ndim != 2 or not scores.shape[1] or bool(scores.isnan().any()):
        raise ValueError(
            f"scores of true labels are needed, exits x rows, at least one row and no NaN; their shape is "
            f"{list(scores.shape)}"
        )
    if config.first_exit >= len(scores):
        raise ValueError(f"first_exit is {config.first_exit}; there are exits 0..{len(scores) - 1}")
    if config.equalise != (tune is not None):
        raise ValueError(
            "equalised scores need tune=: scores of true labels of a split of their own; or set equalise=False"
            if config.equalise
            else "tune= is given, but equalise is False; leave out one of them"
        )
    if (config.cells == "all") != (cells is None) or (cells is not None and cells.shape != scores.shape[1:]):
        raise ValueError(f"cells is {config.cells!r}: 'all' needs no cells=, the others a number per calibration row")
    maps = None if tune is None else fit_equaliser(tune)
    largest = _largest(scores, maps, config)[-1]
    cells = torch.zeros(len(largest), dtype=torch.int64) if cells is None else cells
    names, counts = torch.unique(cells, return_counts=True)
    quantiles = [
        conformal_quantile(largest[cells == name], config.alpha, "" if config.cells == "all" else f"cell {int(name)}")
        for name in names
    ]
    return NestedConformal(names, torch.tensor(quantiles, dtype=torch.float64), counts, maps, config)


def fit_classes(
    calibrate: ExitOutputs, config: NestedConformalConfig | None = None, *, tune: ExitOutputs | None = None
) -> NestedConformal:
    """Calibrate sets of classes, from outputs; for probabilities of a posterior p, those with logits ln p.

    Args:
        calibrate: Rows that nothing else was chosen on.
        config: What sets; the default aims at 0.95 with equalised scores.
        tune: Other rows, to equalise with.

    Returns:
        The quantiles.

    Raises:
        ValueError: The splits share a row, groups are missing, or what the config asks for was not given.
    """
    config = config or NestedConformalConfig()
    if tune is not None:
        require_disjoint(tune=tune, calibrate=calibrate)
    if config.cells == "group" and calibrate.groups is None:
        raise ValueError("cells is 'group', but the calibration rows have no groups; give them, or use cells='all'")
    return fit(
        label_scores(class_scores(calibrate, config.score), calibrate.labels), config,
        tune=None if tune is None else label_scores(class_scores(tune, config.score), tune.labels),
        cells={"all": None, "group": calibrate.groups, "class": calibrate.labels}[config.cells],
    )  # fmt: skip


def apply_classes(state: NestedConformal, given: ExitOutputs | Tensor, *, groups: Tensor | None = None) -> ClassSets:
    """Nested sets of classes.

    Args:
        state: The quantiles.
        given: Outputs of the exits, or probabilities, [E, N, C].
        groups: Of the rows, [N], with cells "group"; those of the outputs if not given.

    Returns:
        The sets, nested.

    Raises:
        ValueError: Groups are needed, or these are no probabilities.
    """
    if groups is None and isinstance(given, ExitOutputs):
        groups = given.groups
    scores = class_scores(given, state.config.score)
    if state.config.cells == "class":
        quantile = _quantiles(state, torch.arange(scores.shape[-1]))
    else:
        quantile = _row_quantiles(state, scores.shape[1], groups).unsqueeze(-1)
    return ClassSets(_largest(scores, state.equaliser, state.config) <= quantile)


def apply_intervals(
    state: NestedConformal, prediction: RegressionPrediction, *, groups: Tensor | None = None
) -> Intervals:
    """Nested intervals, ∩_{l<=e} [m_l ± r_l·√q_l], of a state fitted on `per_exit.residuals`.

    Returns:
        The intervals, nested; unbounded where there were too few calibration rows.

    Raises:
        ValueError: Groups are needed, or the cells are classes.
    """
    if state.config.cells == "class":
        raise ValueError("cells is 'class', but numbers have none; use 'all' or 'group'")
    quantile = _row_quantiles(state, prediction.mean.shape[1], groups)
    if state.equaliser is None:
        radius = quantile.expand(prediction.mean.shape).clone()
    else:
        radius = equaliser_inverse(state.equaliser, quantile)
    radius[: state.config.first_exit] = torch.inf
    half = radius * prediction.total.sqrt()
    return Intervals.between(prediction.mean - half, prediction.mean + half).running()


def _largest(scores: Tensor, maps: Equaliser | None, config: NestedConformalConfig) -> Tensor:
    """M_e of scores [E, ...]."""
    scores = scores.double() if maps is None else equalise(maps, scores)
    scores = torch.cat([torch.full_like(scores[: config.first_exit], -torch.inf), scores[config.first_exit :]])
    return scores.cummax(dim=0).values


def _quantiles(state: NestedConformal, cells: Tensor) -> Tensor:
    """Of cells; +inf for those that had no calibration rows."""
    same = cells.unsqueeze(-1) == state.cells  # [..., G]
    return torch.where(same, state.quantiles, torch.inf).amin(dim=-1)


def _row_quantiles(state: NestedConformal, rows: int, groups: Tensor | None) -> Tensor:
    if state.config.cells == "all":
        return state.quantiles.expand(rows)
    if groups is None or groups.shape != (rows,):
        raise ValueError(f"cells is 'group': a group for each of the {rows} rows is needed")
    return _quantiles(state, groups)
