"""Which of several settings may be used, so that the promise holds for the one that is chosen.

Settings are counted as they come, from 0 and from safe to aggressive; the order must not depend on the prompts that
certify. "Never exit" is not among them: it needs no certificate, and it is what `index` None stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp.risk.bounds import Bound, check_level
from offramp.risk.losses import TIE, Losses, checked

# ---------------------------------------------------------------- one sequence


@dataclass(frozen=True)
class Certified:
    """What a fixed sequence of tests allows: with probability 1 - failure, all of `passed` keep the tolerance together.

    Attributes:
        index: The last setting that passed, never one that failed; None: nothing certified, never exit.
        passed: All settings that passed. Any of them may be used, so also the cheapest.
        p_values: Those that were looked at: of `passed`, and of the setting that failed if one did.
        failure: Level of the tests.
    """

    index: int | None
    passed: tuple[int, ...]
    p_values: tuple[float, ...]
    failure: float

    @property
    def guarantee(self) -> str:
        """The promise in words."""
        return f"with probability at least {1 - self.failure:g} over the calibration prompts"


def fixed_sequence(p_values: Iterable[float], failure: float) -> Certified:
    """Test one setting after the other, from safe to aggressive, and stop at the first that fails.

    Angelopoulos et al. (2021), "Learn then Test", fixed-sequence testing. Every test is at the full level: a false one
    can only follow if the first true null was rejected.

    Args:
        p_values: Of each setting in order, computed when asked for: a generator, or `map(p_value, settings)`. After the
            first failure no further one is asked for.
        failure: Probability with which the promise may fail, in (0, 1).

    Returns:
        The settings that passed.

    Raises:
        ValueError: A p-value is NaN or outside [0, 1], or `failure` is outside (0, 1).
    """
    check_level("failure", failure)
    seen: list[float] = []
    passed = 0
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"the p-value of setting {len(seen)} is {p}; allowed are values in [0, 1]")
        seen.append(float(p))
        if p > failure:
            break
        passed += 1
    return Certified(passed - 1 if passed else None, tuple(range(passed)), tuple(seen), failure)


# ---------------------------------------------------------------- several sequences


@dataclass(frozen=True)
class Chains:
    """What several fixed sequences allow together.

    Attributes:
        chain: The chain of the cheapest certified setting; None: nothing certified, never exit.
        index: Its place in the chain; None likewise.
        cost: Its cost; None likewise.
        chains: The outcome of each chain, at its share of `failure`. All that passed in any of them may be used.
        failure: Level of all chains together.
    """

    chain: int | None
    index: int | None
    cost: float | None
    chains: tuple[Certified, ...]
    failure: float


def chains(p_values: Sequence[Iterable[float]], cost: Callable[[int, int], float], failure: float) -> Chains:
    """One fixed sequence per group of settings, each at an equal share of `failure`, and the cheapest that passed.

    Angelopoulos et al. (2021), "Learn then Test", fixed-sequence testing from several starts, without passing on the
    share of a chain that went through. For thresholds at several minimum layers and vocabulary sizes: one chain of
    thresholds per pair.

    Args:
        p_values: Per chain, what `fixed_sequence` takes. (`wsr` is strongest with `failure` divided likewise.)
        cost: Cost of setting (chain, index), asked only of those that passed; it may have been measured on the same
            prompts. Between equals, the earlier chain and the safer setting is taken.
        failure: Probability with which the promise may fail, in (0, 1).

    Returns:
        The cheapest certified setting and the outcome of each chain.

    Raises:
        ValueError: There is no chain, a cost is NaN, a p-value is outside [0, 1], or `failure` is outside (0, 1).
    """
    check_level("failure", failure)
    if not p_values:
        raise ValueError("p_values is empty; at least one chain is needed")
    outcomes = tuple(fixed_sequence(chain, failure / len(p_values)) for chain in p_values)
    costs = {(c, i): float(cost(c, i)) for c, outcome in enumerate(outcomes) for i in outcome.passed}
    for (c, i), value in costs.items():
        if math.isnan(value):
            raise ValueError(f"the cost of setting {i} of chain {c} is nan; it must be a number")
    if not costs:
        return Chains(None, None, None, outcomes, failure)
    chain, index = min(costs, key=costs.__getitem__)
    return Chains(chain, index, costs[chain, index], outcomes, failure)


# ---------------------------------------------------------------- a sequence found on other prompts


@dataclass(frozen=True)
class ParetoTested:
    """What Pareto testing allows.

    Attributes:
        setting: The cheapest certified setting; None: nothing certified, never exit.
        front: Settings on the Pareto front of the first part of the prompts, by increasing loss: the order of tests.
        certified: Outcome of the tests; its indices are places in `front`.
        passed: The settings that passed. Any of them may be used.
        first: The prompts that the front was found on.
        second: The prompts that certify.
        seed: Of the split.
    """

    setting: int | None
    front: tuple[int, ...]
    certified: Certified
    passed: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    seed: int


def split(prompts: int, seed: int, share: float = 0.5) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Part the prompts at random.

    Args:
        prompts: N, at least 2.
        seed: Of the shuffle; numpy's PCG64, the same everywhere.
        share: Share of the first part, in (0, 1); each part gets at least one prompt.

    Returns:
        Which prompts are in the first and which in the second part, each in shuffled order.

    Raises:
        ValueError: There are fewer than two prompts, or the share is outside (0, 1).
    """
    check_level("share", share)
    if prompts < 2:
        raise ValueError(f"prompts is {prompts}; at least 2 are needed to part them")
    order = np.random.default_rng(seed).permutation(prompts)
    cut = min(max(round(share * prompts), 1), prompts - 1)
    return order[:cut], order[cut:]


def pareto_front(losses: Losses, costs: Losses) -> tuple[int, ...]:
    """Settings that no other one beats in loss without costing more.

    Args:
        losses: Mean loss of each setting, in any order.
        costs: Cost of each setting.

    Returns:
        The settings on the front by increasing loss, so by decreasing cost; of equal ones the first.

    Raises:
        ValueError: There are none, their numbers differ, or a value is not finite.
    """
    loss = checked(losses, -math.inf, math.inf)
    cost = checked(costs, -math.inf, math.inf, "costs")
    if len(loss) != len(cost):
        raise ValueError(f"there are {len(loss)} losses and {len(cost)} costs; each setting has one of both")
    front: list[int] = []
    for setting in np.lexsort((cost, loss)):  # by loss, then by cost; stable
        if not front or cost[setting] < cost[front[-1]]:
            front.append(int(setting))
    return tuple(front)


def pareto_testing(
    measure: Callable[[int, NDArray[np.int64]], tuple[Losses, float]],
    settings: int,
    prompts: int,
    *,
    bound: Bound,
    tolerance: float,
    failure: float,
    seed: int,
    share: float = 0.5,
) -> ParetoTested:
    """Find the Pareto front of loss and cost on some prompts, and certify along it on the others.

    Laufer-Goldshtein et al. (2023), "Efficiently Controlling Multiple Risks with Pareto Testing", for one risk and one
    cost. Differs in ordering the front by loss, not by p-value; for one risk these go together.

    Args:
        measure: Runs one setting on some prompts, given by their numbers, and gives their losses in that order and the
            cost. Asked for all settings on the first part, and on the second for those of the front, until one fails.
        settings: How many settings there are.
        prompts: How many prompts there are.
        bound: The p-value.
        tolerance: Mean loss to be ruled out, in (0, 1).
        failure: Probability with which the promise may fail, in (0, 1).
        seed: Of the split.
        share: Share of the prompts that the front is found on.

    Returns:
        The cheapest certified setting (by the costs on the first part) and how it was found.

    Raises:
        ValueError: There are fewer than 2 prompts or no settings, or a level, share, loss or cost is outside its range.
    """
    check_level("tolerance", tolerance)
    check_level("failure", failure)
    if settings < 1:
        raise ValueError(f"settings is {settings}; at least one is needed")
    first, second = split(prompts, seed, share)
    means, costs = [], []
    for setting in range(settings):
        losses, cost = measure(setting, first)
        means.append(float(checked(losses, -math.inf, 1, f"losses of setting {setting}").mean()))
        costs.append(float(cost))
    front = pareto_front(means, costs)
    certified = fixed_sequence((bound(measure(setting, second)[0], tolerance) for setting in front), failure)
    passed = tuple(front[i] for i in certified.passed)
    return ParetoTested(
        setting=passed[-1] if passed else None,
        front=front,
        certified=certified,
        passed=passed,
        first=tuple(first.tolist()),
        second=tuple(second.tolist()),
        seed=seed,
    )


# ---------------------------------------------------------------- on average


@dataclass(frozen=True)
class MeanControlled:
    """What conformal risk control allows. A promise on the mean: no single calibration comes with a probability.

    Attributes:
        index: The most aggressive setting allowed; None: none is, never exit.
        passed: All settings up to it. Any of them may be used.
        risks: (n·mean + 1) / (n + 1) of each setting, of its losses made monotone; at most `tolerance` where allowed.
        tolerance: What the mean loss stays below.
    """

    index: int | None
    passed: tuple[int, ...]
    risks: tuple[float, ...]
    tolerance: float

    @property
    def guarantee(self) -> str:
        """The promise in words."""
        return "on average over calibrations; a single one may exceed the tolerance, with no stated probability"


def conformal_risk_control(
    losses: Tensor | NDArray[Any] | Sequence[Sequence[float]], tolerance: float
) -> MeanControlled:
    """The most aggressive setting whose expected loss on a new prompt is at most `tolerance`, on average over draws.

    Angelopoulos et al. (2024), "Conformal Risk Control", for losses in [0, 1]. Losses that do not grow from setting to
    setting are replaced by their running maximum from the safe side, prompt by prompt, as the paper suggests. What is
    promised if no setting is allowed is the loss of never exiting, which must not exceed the tolerance: consistency
    losses are 0 there.

    Args:
        losses: Of each setting, from safe to aggressive, on the same prompts, [S, N], in [0, 1].
        tolerance: Expected loss to stay below, in (0, 1).

    Returns:
        The settings allowed: those with (n·mean + 1) / (n + 1) <= tolerance.

    Raises:
        ValueError: A loss is NaN or outside [0, 1], there are none, or the tolerance is outside (0, 1).
    """
    check_level("tolerance", tolerance)
    monotone = np.maximum.accumulate(checked(losses, 0, 1, ndim=2), axis=0)
    risks = (monotone.sum(axis=1) + 1) / (monotone.shape[1] + 1)  # [S, N] -> [S]
    allowed = int(np.count_nonzero(risks <= tolerance + TIE / monotone.shape[1]))  # the first ones: risks do not fall
    return MeanControlled(allowed - 1 if allowed else None, tuple(range(allowed)), tuple(risks.tolist()), tolerance)
