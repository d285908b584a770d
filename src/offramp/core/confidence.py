"""How sure is a readout? Each measure maps a `Reading` of A rows to one number per row, [A], float32, at most 1.

The larger, the surer; a token leaves when the measure is *strictly* above its threshold, so a threshold of 1 never
exits, and NaN never does. Thresholds of different measures, or of pruned and unpruned readouts, do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.families.readouts import Best, best_of
from offramp.values import choice, flag, number, whole


class Reading(Protocol):
    """What a measure may look at: one exit of one token step, for A rows.

    Attributes:
        layer: The exit layer, 1..L-1.
        num_layers: L.
        candidates: Earlier layers whose logits `earlier` can give, ascending.
        hidden: Residual state, [A, D].
        previous: Residual state at the previous exit point of this token, [A, D]; None at the first.
        logits: Raw logits in float32 on the whole vocabulary, [A, V], or on the kept tokens, [A, K]; -inf where masked.
            Computed when first asked for.
        top: The two best of these logits and their normaliser: cheaper than all of them.
        kept: Whether `logits` are those of a pruned set of tokens.
        ids: Their token ids, [A, K]; None: all V, in order.
        input: Readout input, [A, D]: what the head is multiplied with. Computed when first asked for.
        rows: Which rows of the batch these are, A of them.
        position: Of the tokens, counted from the first generated one: one for all rows, or [A].
    """

    layer: int
    num_layers: int
    position: int | Tensor
    rows: list[int]
    candidates: tuple[int, ...]
    hidden: Tensor
    previous: Tensor | None

    @property
    def logits(self) -> Tensor:
        """Raw logits, computed when first asked for."""
        ...

    @property
    def top(self) -> Best:
        """The two best tokens and the normaliser of `logits`, where nothing else of them is wanted."""
        ...

    @property
    def kept(self) -> bool:
        """Whether `logits` are pruned."""
        ...

    @property
    def ids(self) -> Tensor | None:
        """Token ids of the columns of pruned `logits`."""
        ...

    @property
    def input(self) -> Tensor:
        """Readout input, computed when first asked for."""
        ...

    def of(self, ids: Tensor) -> Tensor:
        """Logits of tokens [A, k]; -inf for those that were not scored."""
        ...

    def plausible(self) -> Tensor | None:
        """Columns of `logits` that survive pruning, bool [A, K or V]; None without pruning."""
        ...

    def earlier(self, layer: int, columns: Tensor | None = None) -> Tensor:
        """Logits of an earlier layer on the columns of `logits`, or only on some of them, [A, M]."""
        ...

    def bill(self, flops: int, shared: int, own: int = 0) -> None:
        """Write down what the measure computes beyond logits: FLOPs per row, bytes read for all rows and per row."""
        ...


class Confidence(Protocol):
    """A measure: a plain function, or a frozen dataclass with parameters.

    One that remembers something from exit to exit of a token also has `begin() -> TokenConfidence`.
    """

    def __call__(self, reading: Reading, /) -> Tensor:
        """[A] in [-1, 1]; NaN means "do not exit"."""
        ...


class TokenConfidence(Protocol):
    """A measure within one token step of A rows."""

    restricts: bool
    """Whether a token that leaves is chosen among some tokens only."""

    def __call__(self, reading: Reading, /) -> Tensor:
        """As for `Confidence`."""
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows; the others have left."""
        ...

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Scores [n, V] of the `rows` that leave, -inf for tokens that are out of the question."""
        ...


@dataclass
class Forgetful:
    """A measure that remembers nothing, within one token step."""

    measure: Confidence
    restricts: bool = False

    def __call__(self, reading: Reading) -> Tensor:
        """As the measure."""
        return self.measure(reading)

    def select(self, rows: Tensor) -> None:
        """Nothing is kept by row."""

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        """The scores as they are."""
        return scores


def begun(measure: Confidence) -> TokenConfidence:
    """A measure at the start of a token step."""
    begin: Callable[[], TokenConfidence] | None = getattr(measure, "begin", None)
    return Forgetful(measure) if begin is None else begin()


def gap_of(logits: Tensor) -> Tensor:
    """p_(1) - p_(2) of logits [A, n]."""
    return best_of(logits).gap


def softmax_gap(reading: Reading) -> Tensor:
    """Difference of the two largest probabilities (CALM, arXiv 2207.07061, section 3.3), in [0, 1]."""
    return reading.top.gap


def max_probability(reading: Reading) -> Tensor:
    """The largest probability, in [0, 1]."""
    return reading.top.probabilities[:, 0]


def entropy(reading: Reading) -> Tensor:
    """1 - H(p) / ln n over the n scored tokens (as DeeBERT, arXiv 2004.12993), in [0, 1]."""
    logits = reading.logits
    log_p = logits.log_softmax(-1)
    finite = log_p > -math.inf
    spread = -(log_p.exp() * log_p.masked_fill(~finite, 0.0)).sum(-1)
    return torch.where(logits.isnan().any(-1), torch.nan, 1 - spread / finite.sum(-1).clamp(min=2).log())


def state_saturation(reading: Reading) -> Tensor:
    """Cosine of the residual states at this and the previous exit point (CALM, section 3.3), in [-1, 1].

    The first exit point of a token has no previous one and never exits. Needs no head.

    Returns:
        One cosine per row, [A]; NaN at the first exit point.
    """
    if reading.previous is None:
        return torch.full((len(reading.hidden),), torch.nan, device=reading.hidden.device)
    return torch.cosine_similarity(reading.hidden.float(), reading.previous.float(), dim=-1).clamp(-1, 1)


def certain(reading: Reading) -> Tensor:
    """1 for every row, [A]: always leave."""
    return torch.ones(len(reading.hidden), device=reading.hidden.device)


@dataclass(frozen=True)
class Contrast:
    """Options of the contrastive measures ("Early Exit LLMs", section on contrastive decoding; ACD, arXiv 2305.01628).

    Attributes:
        score: What mass the contrasted head set M gets. "mass": the expert's own mass P_M, so scores are a
            distribution (ACD). "text": 1, so scores sum to 2 - P_M (the draft's formula). "head": P_M inside M and
            nothing outside (the reference code's "weighted").
        alpha: M = {v : p_v >= alpha · max p} (Li et al., arXiv 2210.15097).
        alpha_schedule: None, or "hyperbolic": alpha / (1 + rho · l) · (1 - gap), at least 0.001. The draft's schedule;
            its "confidence" is read as the softmax gap, which is known before M is.
        alpha_decay: rho; None: 1 / L (the source gives no value).
        plausibility: "alpha", or "pruned": M is the kept set of vocabulary pruning (the draft's mixed approach).
        amateur: The `contrastive` measure's earlier layer; None: half the exit layer.
        candidates: The `jsd` measure's choice of earlier layers: "below" the minimum exit layer, 2..l_min-1 (each read
            once per token), or "all", 2..l-1.
        stride: Every how many layers a candidate stands; None: so that at most 4 stand below l_min.
        support: Where the Jensen-Shannon divergence is taken: "all" scored tokens, "head" (M, not renormalised, as the
            reference code), or "head_renorm" (M, renormalised).
        full: Contrast tokens at full depth too, where the emitted token comes from the contrastive scores.
    """

    score: str = "mass"
    alpha: float = 0.1
    alpha_schedule: str | None = None
    alpha_decay: float | None = None
    plausibility: str = "alpha"
    amateur: int | None = None
    candidates: str = "below"
    stride: int | None = None
    support: str = "all"
    full: bool = False

    def __post_init__(self) -> None:
        why = "it is a fraction of the largest probability, in (0, 1]"
        taken: dict[str, Any] = {"alpha": number("contrast alpha", self.alpha, 0, 1, above=True, why=why)}
        taken["full"] = flag("contrast full", self.full)
        if self.alpha_decay is not None:
            taken["alpha_decay"] = number("contrast alpha_decay", self.alpha_decay, 0)
        for name, least in (("amateur", -(2**31)), ("stride", 1)):  # the model's own layers are known to `Plan`
            if (value := getattr(self, name)) is not None:
                taken[name] = whole(f"contrast {name}", value, least, why="it counts layers, from 1")
        choices: dict[str, tuple[str | None, ...]] = {
            "score": ("mass", "text", "head"),
            "alpha_schedule": (None, "hyperbolic"),
            "plausibility": ("alpha", "pruned"),
            "candidates": ("below", "all"),
            "support": ("all", "head", "head_renorm"),
        }
        for name, allowed in choices.items():
            choice(f"contrast {name}", getattr(self, name), allowed)
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    def below(self, min_layer: int) -> tuple[int, ...]:
        """Candidate layers below the minimum exit layer: {2..l_min-1}, strided from the deepest, or {1}."""
        layers = list(range(2, min_layer)) or list(range(1, min_layer))
        stride = self.stride or -(-len(layers) // 4) or 1
        return tuple(sorted(layers[::-1][::stride]))


@dataclass(frozen=True)
class Contrastive:
    """Gap of the scores of this layer (expert) against an earlier one (amateur).

    With r = softmax over M of (z_expert - z_amateur), the scores are P_M · r inside M and p outside (see
    `Contrast.score`). Normalisers cancel inside that softmax, so only the rows M of the amateur are computed. Falls
    back to the softmax gap where there is no earlier layer.

    Attributes:
        options: See `Contrast`.
        discounted: False: the amateur is a fixed layer (the draft's "weighted" measure). True: it is the candidate with
            the largest JSD(p_l, p_m) / (l - m), ties to the deepest (the draft's "JSD" measure).
    """

    options: Contrast
    discounted: bool

    def __call__(self, reading: Reading) -> Tensor:
        """Difference of the two largest scores, [A]."""
        top = self.scores(reading).topk(2, dim=-1).values
        return (top[:, 0] - top[:, 1]).clamp(max=1)

    def scores(self, reading: Reading) -> Tensor:
        """Contrastive scores on the columns of the reading's logits, [A, K or V]; with "mass" they sum to 1."""
        log_p = reading.logits.log_softmax(-1)
        p = log_p.exp()
        candidates = self._candidates(reading)
        if not candidates:
            return p
        columns, inside = self._head(reading, log_p)  # [A, M] both
        expert = log_p.gather(1, columns)
        amateur = self._amateur(reading, candidates, log_p, columns, inside)  # [A, M]
        ratio = (expert - amateur).masked_fill(~inside, -torch.inf)
        r = ratio.softmax(-1)
        mass = torch.where(inside, p.gather(1, columns), 0).sum(-1, keepdim=True)
        head = r if self.options.score == "text" else mass * r
        outside = p * 0 if self.options.score == "head" else p  # a product, so that NaN stays NaN
        return outside.scatter(1, columns, torch.where(inside, head, outside.gather(1, columns)))

    def _candidates(self, reading: Reading) -> tuple[int, ...]:
        """Layers the amateur is chosen from."""
        if self.discounted:
            return reading.candidates
        fixed = self.options.amateur or reading.layer // 2
        return (fixed,) if 1 <= fixed < reading.layer else ()

    def _head(self, reading: Reading, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [A, M] that hold every row's head set, and which of them belong to it."""
        plausible = reading.plausible() if self.options.plausibility == "pruned" else None
        if plausible is None:
            alpha = torch.full_like(log_p[:, :1], self.options.alpha)
            if self.options.alpha_schedule == "hyperbolic":
                rho = 1 / reading.num_layers if self.options.alpha_decay is None else self.options.alpha_decay
                alpha = alpha / (1 + rho * reading.layer) * (1 - gap_of(reading.logits)[:, None])
                alpha = alpha.clamp(min=1e-3)
            plausible = log_p >= log_p.amax(-1, keepdim=True) + alpha.log()
        count = max(int(plausible.sum(-1).max()), 1)
        columns = log_p.masked_fill(~plausible, -torch.inf).topk(count, dim=-1).indices
        return columns, plausible.gather(1, columns)

    def _amateur(
        self, reading: Reading, candidates: tuple[int, ...], log_p: Tensor, columns: Tensor, inside: Tensor
    ) -> Tensor:
        """Logits of every row's amateur on `columns`, [A, M], up to a constant per row."""
        if len(candidates) == 1:
            return reading.earlier(candidates[0], columns)
        divergences, logits = [], []
        for layer in candidates:
            if self.options.support == "head_renorm":
                amateur = reading.earlier(layer, columns)
                a, b = (z.masked_fill(~inside, -torch.inf).softmax(-1) for z in (log_p.gather(1, columns), amateur))
            else:
                full = reading.earlier(layer)
                amateur = full.gather(1, columns)
                a, b = log_p.exp(), full.softmax(-1)
                if self.options.support == "head":
                    a, b = (torch.where(inside, x.gather(1, columns), 0) for x in (a, b))
            logits.append(amateur)
            divergences.append(jensen_shannon(a, b) / (reading.layer - layer))
        # `argmax` of a reversed stack: the deepest candidate among equals.
        best = len(candidates) - 1 - torch.stack(divergences[::-1]).argmax(0)  # [A]
        return torch.stack(logits)[best, torch.arange(len(best), device=best.device)]


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """½ KL(a ‖ μ) + ½ KL(b ‖ μ), μ = (a + b)/2, in nats, summed over the last axis; 0 · log 0 = 0."""
    tiny = torch.finfo(a.dtype).tiny  # a clamped logarithm: `xlogy` takes five times as long on CPU

    def log(x: Tensor) -> Tensor:
        return x.clamp(min=tiny).log()

    log_mean = log((a + b) / 2)
    return (a * (log(a) - log_mean) + b * (log(b) - log_mean)).sum(-1) / 2


def require_learned(exits: Any, name: str, plan: Any) -> Confidence:
    """One of the measures in `LEARNED`, for a model's exits, `Exits` or None.

    Returns:
        The measure.

    Raises:
        ValueError: The model has no exits, or they cannot give it where it is asked for.
    """
    if exits is not None:
        found: Confidence = exits.confidence(name, plan)
        return found
    if name == "classifier":
        raise ValueError(
            "confidence 'classifier' needs trained classifiers, but the model has no trained exits; train some with: "
            "offramp train --objective consistency"
        )
    raise ValueError(
        f"confidence {name!r} needs a posterior fitted on text, but the model has no exits; fit one with: "
        f"offramp calibrate MODEL --posterior {name}"
    )


MEASURES: dict[str, Callable[[Contrast], Confidence]] = {
    "softmax": lambda _: softmax_gap,
    "max": lambda _: max_probability,
    "entropy": lambda _: entropy,
    "state": lambda _: state_saturation,
    "contrastive": lambda options: Contrastive(options, discounted=False),
    "jsd": lambda options: Contrastive(options, discounted=True),
}
"""Measures of the readout alone, by name."""

LEARNED = ("classifier", "laplace", "conformal", "avcs")
"""Measures that a model's exits bring: `Exits.confidence` gives them."""

NAMES = (*MEASURES, *LEARNED)
"""All that `ExitPolicy` and the command line take, besides "static"."""

RANGES: dict[str, tuple[float, float]] = {name: (-1.0 if name == "state" else 0.0, 1.0) for name in NAMES}
"""Smallest and largest value of each measure: the thresholds that make sense."""

HEADLESS = ("state", "classifier")
"""Measures that read no logits: a token is read out once, where it leaves, and pruning does nothing."""
