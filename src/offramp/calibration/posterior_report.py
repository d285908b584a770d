"""How good fitted confidences are on held-out tokens, by exit: calibrated probabilities, other decisions, true sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.calibration.token_rows import ExitView, TokenViews
from offramp.hub.exit_posterior import SETS, Posterior
from offramp.metrics.calibration import Reliability
from offramp.metrics.intervals import binomial
from offramp.runs.results import Result
from offramp.runs.tables import markdown
from offramp.uncertainty import candidates, token_sets
from offramp.uncertainty.candidates import TokenRows, log_likelihood
from offramp.uncertainty.token_sets import share_outside
from offramp.uncertainty.tuning import temperature_alone

SCHEMA = "offramp/exit-posterior/1"
"""Of posterior.json; the state of a classifier's posterior has another, `offramp.uncertainty.posterior.SCHEMA`."""
THRESHOLD = 0.9
"""Of the softmax gap, whose share of tokens the other gap is compared at."""
BINS = 15
_ROWS = 1024  # tokens looked at together


@dataclass(frozen=True)
class ProbabilityQuality:
    """Probabilities of one exit by the trained head, with a temperature, and averaged over the posterior.

    Attributes:
        layer: The exit.
        nlpd: Mean of -ln p of the true token, by "map", "temperature" and "laplace".
        ece: Expected calibration error of the most probable token, 15 bins, likewise.
        better: How much smaller the NLPD of "laplace" is than that of "map" and of "temperature".
        error: Standard errors of these differences, texts (windows) being independent, tokens not.
        temperature: T of "temperature"; those of "laplace" are in the posterior's settings.
        correlation: Rank correlation of the softmax gap and the averaged one.
        leaving: Share of tokens whose softmax gap is above 0.9.
        changed: Share of tokens that one gap and not the other lets leave, both letting that many leave.
    """

    layer: int
    nlpd: dict[str, float]
    ece: dict[str, float]
    better: dict[str, float]
    error: dict[str, float]
    temperature: float
    correlation: float
    leaving: float
    changed: float


@dataclass(frozen=True)
class SetQuality:
    """The running sets of one kind after one exit.

    Attributes:
        kind: "conformal" or "avcs".
        layer: The exit.
        size: Mean number of tokens.
        single: Share of sets with one token.
        right: Share of these in which it is the true one.
        empty: Share of empty sets.
        coverage: Share of sets with the true token; those of all earlier exits have it, too.
        interval: Of the coverage, 95 %, as if tokens were independent (Clopper and Pearson).
    """

    kind: str
    layer: int
    size: float
    single: float
    right: float
    empty: float
    coverage: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class PosteriorReport(Result):
    """What was fitted and how good it is on the test tokens.

    Attributes:
        settings: Of the posterior.
        honesty: By exit; empty without "laplace".
        sets: By kind and exit.
        outside: Share of true tokens that are no candidates of the first exit.
        tokens: Test tokens.
        warnings: What a user should know.
    """

    schema = SCHEMA

    settings: dict[str, Any]
    honesty: tuple[ProbabilityQuality, ...]
    sets: tuple[SetQuality, ...]
    outside: float
    tokens: int
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"PosteriorReport({len(self.honesty)} exits, {len(self.sets)} kinds of sets, {self.tokens} test tokens)"

    def _rows(self) -> Iterable[Any]:
        """A row per exit, as `ProbabilityQuality` has them."""
        return self.honesty

    def table(self) -> str:
        """Tables in Markdown, with what follows from them."""
        parts = [self._probabilities(), self._verdict()] if self.honesty else []
        parts += [self._sets(), f"{self.outside:.1%} of the true tokens are no candidates."] if self.sets else []
        return "\n\n".join([*parts, *(f"Warning: {warning}." for warning in self.warnings)])

    def _probabilities(self) -> str:
        names = ("MAP", "MAP + T", "Laplace")
        head = (
            "exit", *(f"NLPD {name}" for name in names), "better than T", *(f"ECE {name}" for name in names),
            "rank corr.", "changed",
        )  # fmt: skip
        rows = [
            (
                str(h.layer), *(f"{h.nlpd[name]:.3f}" for name in h.nlpd),
                f"{h.better['temperature']:+.4f} ± {h.error['temperature']:.4f}",
                *(f"{h.ece[name]:.3f}" for name in h.ece), f"{h.correlation:.4f}", f"{h.changed:.2%}",
            )
            for h in self.honesty
        ]  # fmt: skip
        return markdown(head, rows)

    def _sets(self) -> str:
        head = ("sets", "exit", "size", "one token", "of these right", "empty", "coverage", "95 %")
        rows = [
            (
                s.kind, str(s.layer), f"{s.size:.2f}", f"{s.single:.1%}", f"{s.right:.1%}", f"{s.empty:.1%}",
                f"{s.coverage:.3f}", f"{s.interval[0]:.3f}-{s.interval[1]:.3f}",
            )
            for s in self.sets
        ]  # fmt: skip
        return markdown(head, rows)

    def _verdict(self) -> str:
        """Whether the averaged gap decides anything else than the softmax gap, and is better than a temperature."""
        lowest = min(h.correlation for h in self.honesty)
        said = f"{self.tokens} held-out tokens. "
        if lowest > 0.99:
            said += (
                "Both gaps rank tokens almost alike (above .99 at every exit): Laplace does not pay as a confidence. "
            )
        else:
            said += f"The gaps rank tokens differently (correlation down to {lowest:.3f}). "
        width = NormalDist().inv_cdf(1 - 0.025 / len(self.honesty))  # for all exits together (Bonferroni)
        lower, higher = (
            [h.layer for h in self.honesty if sign * h.better["temperature"] > width * h.error["temperature"]]
            for sign in (1, -1)
        )
        said += f"Its NLPD is lower than that of a temperature after {_layers(lower)}, higher after {_layers(higher)}"
        return said + " (by intervals that hold for all exits together with 95 %; no such word where they include 0)."


def _layers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "no layer"


def judge(
    posterior: Posterior, views: Mapping[str, TokenViews], progress: Callable[..., None] | None = None
) -> PosteriorReport:
    """Figures on the test tokens of views by split; the temperature alone is that of the split "tune"."""
    test = views["test"]
    honesty = []
    for number, (layer, view) in enumerate(test.exits.items() if "laplace" in posterior.methods else ()):
        if progress is not None:
            progress(number, len(test.exits), f"judging exit {layer}")
        temperature = temperature_alone(views["tune"].exits[layer].rows)
        honesty.append(_probabilities(posterior, layer, view, temperature, test.windows))
    kinds = [kind for kind in SETS if kind in posterior.methods]
    sets = tuple(quality for kind in kinds for quality in _sets(posterior, kind, test))
    outside = share_outside(test.place, test.ids.shape[1])
    warnings = tuple(_warnings(posterior, views))
    return PosteriorReport(posterior.settings, tuple(honesty), sets, outside, len(test.target), warnings)


def _warnings(posterior: Posterior, views: Mapping[str, TokenViews]) -> list[str]:
    """What a user should know before relying on it."""
    found = []
    settings = posterior.settings.get("conformal")
    if settings is not None and not math.isfinite(float(settings["limit"])):
        calibration, alpha = views["calibrate"], settings["alpha"]
        outside = share_outside(calibration.place, calibration.ids.shape[1])
        needed = math.ceil(1 / alpha) - 1
        why = f"alpha {alpha} needs {needed} calibration tokens or more, and few that pruning drops"
        if outside > alpha:
            shares = {e: share_outside(v.rows.place, v.logits.shape[1]) for e, v in calibration.exits.items()}
            later = next((e for e, share in shares.items() if share <= alpha / 2), None)
            hint = "" if later is None else f"; after layer {later} it is {shares[later]:.1%}, so begin there"
            why = (
                f"k too small: after layer {next(iter(shares))}, {outside:.1%} of the true tokens are not among the "
                f"{posterior.candidates} candidates{hint}"
            )
        found.append(f"conformal sets exclude nothing, so that no token leaves ({why})")
    settings = posterior.settings.get("avcs")
    if settings is not None and (covered := settings.get("coverage")) is not None and covered <= 1 - settings["alpha"]:
        tuning = views["tune"]
        outside = share_outside(tuning.place, tuning.ids.shape[1])
        found.append(
            f"avcs covers {covered:.1%} of the tuning tokens, not more than 1 - alpha = {1 - settings['alpha']:.1%}, "
            f"though tau is 1 at all exits, the least there is ({outside:.1%} of the true tokens are no candidates; of "
            "the others missed, evidence at some exit is too small or a draw too far off): begin at a deeper layer, or "
            "give a larger alpha"
        )
    for layer, tuned in posterior.settings.get("laplace", {}).get("exits", {}).items():
        if tuned["edges"]:
            found.append(f"exit {layer}: {' and '.join(tuned['edges'])} of laplace at the end of what was tried")
    return found


# ---------------------------------------------------------------- probabilities


def _probabilities(
    posterior: Posterior, layer: int, view: ExitView, temperature: float, windows: Tensor
) -> ProbabilityQuality:
    state, rows = posterior.laplace(layer), view.rows
    heads = {"map": (None, 1.0), "temperature": (None, temperature), "laplace": (state, state.temperature)}
    likely = {name: log_likelihood(rows, [t], s)[0].double() for name, (s, t) in heads.items()}
    tops, gaps = _tops(rows, temperature, posterior, layer)
    right = rows.place == rows.short.logits.argmax(-1)
    gain = {name: likely["laplace"] - likely[name] for name in ("map", "temperature")}
    leaving = gaps["map"] > THRESHOLD
    count = int(leaving.sum())
    chosen = torch.zeros_like(leaving)
    chosen[gaps["laplace"].argsort(descending=True, stable=True)[:count]] = True
    return ProbabilityQuality(
        layer,
        {name: -float(values.mean()) for name, values in likely.items()},
        {
            name: Reliability.empty(BINS).update(top.double().clamp(0, 1).numpy(), right.double().numpy()).error
            for name, top in tops.items()
        },
        {name: float(values.mean()) for name, values in gain.items()},
        {name: _standard_error(values, windows) for name, values in gain.items()},
        temperature,
        _rank_correlation(gaps["map"], gaps["laplace"]),
        float(leaving.float().mean()),
        float((leaving != chosen).float().mean()),
    )


def _tops(
    rows: TokenRows, temperature: float, posterior: Posterior, layer: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Probabilities of the best candidate by "map", "temperature" and "laplace"; gaps by "map" and "laplace"."""
    state = posterior.laplace(layer)
    tops: dict[str, list[Tensor]] = {"map": [], "temperature": [], "laplace": []}
    gaps: dict[str, list[Tensor]] = {"map": [], "laplace": []}
    for at in range(0, len(rows), _ROWS):
        part = rows.select(slice(at, at + _ROWS))
        short = part.short
        best = short.logits.argmax(-1, keepdim=True)
        z = torch.cat([short.logits, short.rest[:, None]], dim=-1)
        for name, t in (("map", 1.0), ("temperature", temperature)):
            tops[name].append((z / t).softmax(-1).gather(1, best)[:, 0])
        two = z.softmax(-1)[:, :-1].topk(2, dim=-1).values
        gaps["map"].append(two[:, 0] - two[:, 1])
        p, _ = candidates.predictive(state, part.x, short)
        tops["laplace"].append(p.gather(1, best)[:, 0])
        gaps["laplace"].append(candidates.gap(state, part.x, short))
    return {n: torch.cat(v) for n, v in tops.items()}, {n: torch.cat(v) for n, v in gaps.items()}


def _standard_error(values: Tensor, windows: Tensor) -> float:
    """Of the mean of values [N] that are dependent within windows [N]."""
    off = torch.zeros(int(windows.max()) + 1, dtype=torch.float64).index_add(0, windows, values - values.mean())
    return float(off.square().sum().sqrt() / len(values))


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, ties at their mean rank; 1 where a gap is the same everywhere."""
    from scipy.stats import rankdata

    first, second = rankdata(a.numpy()), rankdata(b.numpy())
    if first.std() == 0 or second.std() == 0:
        return 1.0
    return float(np.corrcoef(first, second)[0, 1])


# ---------------------------------------------------------------- sets


def _sets(posterior: Posterior, kind: str, test: TokenViews) -> list[SetQuality]:
    walked = token_sets.walk(posterior.sets(kind), test.ids, test.logits, test.normalisers, test.positions)
    found = []
    for layer, running in zip(test.exits, walked, strict=True):
        sizes = running.active.sum(-1)
        covered = (running.active & (running.ids == test.target[:, None])).any(-1)
        single = sizes == 1
        share = binomial(int(covered.sum()), len(covered))
        right = float((covered & single).sum() / single.sum().clamp(min=1))
        found.append(
            SetQuality(
                kind, layer, float(sizes.float().mean()), float(single.float().mean()), right,
                float((sizes == 0).float().mean()), share.value, (share.low, share.high),
            )
        )  # fmt: skip
    return found
