"""Sets of tokens that shrink from exit to exit of one token: nested split conformal sets, and nested evidence sets.

The candidates S are the best tokens at the first exit; tokens outside are in no set. A token leaves the network when
one candidate is left. The sets cover the true token with the stated probability for exchangeable tokens, under teacher
forcing, on average over tokens: tokens of a text are not exchangeable, and exits change what is read later. For a
guarantee on generated texts calibrate the threshold of the policy (`offramp calibrate`).

Both kinds share a signature: `start` with the candidates, then a `step` at each exit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offramp.uncertainty.avcs_classification import log_steps
from offramp.uncertainty.per_exit import conformal_rank
from offramp.values import check_level

KNOTS = 257
"""Most points of an equalising function."""
_ODD = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7, 0xAEF17502108EF2D9)  # far apart, for hashing
_TRIES = 6  # of a gamma draw; each is accepted with probability above 0.95


class Running(NamedTuple):
    """Where the sets of A tokens stand.

    Attributes:
        ids: Candidates, [A, k].
        score: How implausible each has been so far, [A, k].
        active: Which are still in the set, bool [A, k]; never more than before.
    """

    ids: Tensor
    score: Tensor
    active: Tensor

    def select(self, rows: Tensor) -> Running:
        """Some of the rows."""
        return Running(self.ids[rows], self.score[rows], self.active[rows])

    def among(self, scores: Tensor) -> Tensor:
        """Scores of all tokens [A, V], with -inf outside a row's set unless that is empty."""
        inside = torch.zeros_like(scores, dtype=torch.bool).scatter(1, self.ids, self.active)
        return scores.masked_fill(~inside & self.active.any(-1, keepdim=True), -torch.inf)


class TokenSets(Protocol):
    """A kind of nested sets."""

    def step(self, running: Running, layer: int, logits: Tensor, normaliser: Tensor, position: int | Tensor) -> Running:
        """The sets after one more exit.

        Args:
            running: The sets so far, from `start` at the first exit.
            layer: The exit.
            logits: Of the candidates, [A, k]; -inf for those that were not scored.
            normaliser: ln of the sum of exp(logit) over all scored tokens, [A].
            position: Of the tokens in their texts, one for all or [A].

        Returns:
            The sets.
        """
        ...


def start(ids: Tensor) -> Running:
    """Sets of all candidates [A, k], before the first exit."""
    return Running(ids, torch.zeros(ids.shape, device=ids.device), torch.ones_like(ids, dtype=torch.bool))


# ---------------------------------------------------------------- nested split conformal


@dataclass(frozen=True)
class ConformalSets:
    """C_e = {y : max(0, F_l(-ln p_l(y)) over exits l <= e) <= q}; nested by construction, whatever the model.

    -ln p orders tokens as 1 - p does, without rounding to 1. F_l makes the exits comparable, so that the weakest does
    not dominate the maximum: the distribution function of the true tokens' scores on other data, fixed beforehand.

    Attributes:
        alpha: Share of tokens that may lie outside.
        limit: q; infinite if there were too few tokens or candidates, so that nothing is ever excluded.
        knots: Of each F_l: scores and levels, [2, m] each; without, F_l is the identity.
    """

    alpha: float
    limit: float
    knots: Mapping[int, Tensor]

    def step(self, running: Running, layer: int, logits: Tensor, normaliser: Tensor, position: int | Tensor) -> Running:
        """See `TokenSets`; the position has no influence."""
        surprise = normaliser[:, None] - logits
        score = torch.maximum(running.score, equalised(surprise, self.knots.get(layer)))
        return Running(running.ids, score, running.active & (score <= self.limit))


def equaliser(scores: Tensor) -> Tensor:
    """A strictly rising function near the distribution function of scores [N], infinite ones included.

    Not `nested_conformal.Equaliser`, which keeps all scores in float64 and is inverted for intervals: this one has few
    points, for it is evaluated at every token generated, and true tokens outside the candidates count as infinite.

    Args:
        scores: Of true tokens at one exit, [N], float32.

    Returns:
        Scores and levels of up to 257 points, [2, m], float32; an empty one, for the identity, if there are less than
        two different finite scores.
    """
    finite = scores[scores.isfinite()].float().sort().values
    if not len(finite):
        return torch.empty(2, 0)
    chosen = torch.linspace(0, len(finite) - 1, min(KNOTS, len(finite)), dtype=torch.float64).round().long()
    x, counts = torch.unique_consecutive(finite[chosen], return_counts=True)
    last = chosen[counts.cumsum(0) - 1]
    levels = ((last + 1).double() / len(scores)).float()
    return torch.stack([x, levels]) if len(x) > 1 else torch.empty(2, 0)


def equalised(scores: Tensor, knots: Tensor | None) -> Tensor:
    """Scores through an `equaliser`, straight between its points and on from the last ones."""
    if knots is None or not knots.shape[1]:
        return scores
    x, y = knots.to(scores)
    right = torch.searchsorted(x, scores.contiguous()).clamp(1, len(x) - 1)
    left = right - 1
    slope = (y[right] - y[left]) / (x[right] - x[left])
    level: Tensor = y[left] + (scores - x[left]) * slope
    return level


def conformal(
    tuning: Mapping[int, Tensor], calibration: Mapping[int, Tensor], alpha: float, *, equalise: bool = True
) -> ConformalSets:
    """Calibrate nested sets.

    Args:
        tuning: Scores -ln p_e of true tokens by exit, of tokens that only shape the equalising functions; infinite
            outside the candidates, [N] each.
        calibration: The same of other tokens.
        alpha: Share of tokens that may lie outside, in (0, 1).
        equalise: Whether to make the exits comparable.

    Returns:
        The sets.

    Raises:
        ValueError: alpha is out of range.
    """
    check_level("alpha", alpha)
    knots = {layer: equaliser(scores) for layer, scores in tuning.items()} if equalise else {}
    worst = torch.stack([equalised(scores.float(), knots.get(e)) for e, scores in calibration.items()]).amax(0)
    worst = worst.clamp(min=0)
    index = conformal_rank(len(worst), alpha)
    limit = float(worst.sort().values[index - 1]) if index <= len(worst) else math.inf
    return ConformalSets(alpha, limit, knots)


# ---------------------------------------------------------------- nested evidence sets (AVCS)


@dataclass(frozen=True)
class EvidenceSets:
    """Jazbec et al. 2024 (arXiv 2311.05931), classification: C_e = {y : R_e(y) <= 1/alpha}, intersected over exits.

    Evidence a_y is the candidate's logit less the candidates' mean, where at least τ_e, else nothing; a probability
    vector π is drawn from Dir(a) at each exit, and R multiplies (a_y / Σa) / π_y over the exits. The draw belongs to
    (seed, exit, position, token id), so it does not depend on batches or ranks. alpha is a model-based target, no
    guarantee: look at the coverage on held-out tokens.

    Attributes:
        alpha: Of the target 1 - alpha.
        thresholds: τ by exit, each at least 1.
        seed: Of the draws.
        coverage: Share of the tuning tokens that are in their sets at all exits; None: not known.
    """

    alpha: float
    thresholds: Mapping[int, float]
    seed: int = 0
    coverage: float | None = None

    def step(self, running: Running, layer: int, logits: Tensor, normaliser: Tensor, position: int | Tensor) -> Running:
        """See `TokenSets`; the normaliser has no influence."""
        ratio = log_ratio(running.ids, logits, self.thresholds[layer], layer, position, self.seed)
        score = running.score + ratio
        return Running(running.ids, score, running.active & (score <= -math.log(self.alpha)))


def log_ratio(
    ids: Tensor, logits: Tensor, threshold: float, layer: int, position: int | Tensor, seed: int
) -> Tensor:  # fmt: skip
    """Log of (a_y / Σa) / π_y at one exit, [A, k]; infinite outside the support of the evidence."""
    scored = logits.isfinite()
    mean = torch.where(scored, logits, 0).sum(-1, keepdim=True) / scored.sum(-1, keepdim=True).clamp(min=1)
    a = logits.double() - mean.double()
    a = torch.where(scored & (a >= threshold), a, 0.0)
    drawn = _gamma(a.clamp(min=1), _uniforms(ids, layer, position, seed)).log()
    return log_steps(a, drawn).float()


def evidence_sets(
    ids: Tensor, logits: Mapping[int, Tensor], place: Tensor, position: Tensor, alpha: float, *, seed: int = 0
) -> EvidenceSets:
    """Choose τ exit by exit: as large as leaves the true token in the running sets of a share above 1 - alpha.

    Each τ starts at 1 and rises by 0.5 while the coverage holds at every exit, the later ones at 1.

    Args:
        ids: Candidates of N tokens that are used for nothing else, [N, k].
        logits: Theirs by exit, ascending, [N, k] each.
        place: Column of the true token, [N]; k outside the candidates.
        position: Of the tokens in their texts, [N].
        alpha: Of the target 1 - alpha.
        seed: Of the draws.

    Returns:
        The sets; with all τ at 1 if already those do not cover enough: then their coverage is 1 - alpha or less.

    Raises:
        ValueError: alpha is out of range.
    """
    check_level("alpha", alpha)
    inside = place < ids.shape[1]
    column = place.clamp(max=ids.shape[1] - 1)[:, None]

    def true_ratio(layer: int, threshold: float) -> Tensor:
        ratio = log_ratio(ids, logits[layer], threshold, layer, position, seed).gather(1, column)[:, 0]
        return torch.where(inside, ratio, torch.inf)

    layers, thresholds = list(logits), dict.fromkeys(logits, 1.0)
    ratios = {layer: true_ratio(layer, 1.0) for layer in layers}
    for layer in layers:
        while True:
            raised = true_ratio(layer, thresholds[layer] + 0.5)
            if _coverage({**ratios, layer: raised}, alpha) <= 1 - alpha:
                break
            thresholds[layer] += 0.5
            ratios[layer] = raised
    return EvidenceSets(alpha, thresholds, seed, _coverage(ratios, alpha))


def _coverage(ratios: Mapping[int, Tensor], alpha: float) -> float:
    """Share of true tokens in the running set at the last exit, which is in all earlier ones."""
    largest = torch.stack(list(ratios.values())).cumsum(0).amax(0)
    return float((largest <= -math.log(alpha)).float().mean())


# ---------------------------------------------------------------- draws that belong to a place


def _uniforms(ids: Tensor, layer: int, position: int | Tensor, seed: int) -> Tensor:
    """Numbers in (0, 1) of (seed, layer, position, id), two per try, [A, k, 2 · tries], float64: SplitMix64's hash."""
    at: int | Tensor = (
        _signed(position * _ODD[1]) if isinstance(position, int) else position[:, None] * _signed(_ODD[1])
    )
    key = _mixed(ids * _signed(_ODD[0]) + at)
    key = _mixed(key + _signed(layer * _ODD[2] + seed * _ODD[3]))
    lanes = torch.arange(1, 2 * _TRIES + 1, device=ids.device) * _signed(_ODD[0])
    bits = (_mixed(key[..., None] + lanes) >> 11) & ((1 << 53) - 1)
    return (bits.double() + 0.5) / 2**53


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on int64, whose products wrap around."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    """The 64 lowest bits, as int64 reads them."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _gamma(a: Tensor, uniforms: Tensor) -> Tensor:
    """Draws of Gamma(a, 1), a >= 1, from uniform numbers: the first accepted try of Marsaglia and Tsang (2000)."""
    normal = torch.special.ndtri(uniforms[..., :_TRIES])  # [A, k, tries]
    log_u = uniforms[..., _TRIES:].log()
    d = (a - 1 / 3)[..., None]
    v = (1 + normal / (9 * d).sqrt()) ** 3
    positive = v.clamp(min=1e-12)
    accepted = (v > 0) & (log_u < normal**2 / 2 + d - d * positive + d * positive.log())
    first = accepted.int().argmax(-1, keepdim=True)
    drawn: Tensor = (d * positive).gather(-1, first)[..., 0]
    return drawn


def share_outside(place: Tensor, candidates: int) -> float:
    """Share of true tokens that are no candidates."""
    return float((place >= candidates).float().mean())


def walk(
    sets: TokenSets, ids: Tensor, logits: Mapping[int, Tensor], normalisers: Mapping[int, Tensor], position: Tensor
) -> list[Running]:
    """The sets of N tokens after each exit; arguments by layer, ascending, as for `TokenSets.step`."""
    running, found = start(ids), []
    for layer, z in logits.items():
        running = sets.step(running, layer, z, normalisers[layer], position)
        found.append(running)
    return found
