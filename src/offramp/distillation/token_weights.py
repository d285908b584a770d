"""Weights of tokens from what an early readout of the student says: signal x gate x map, as for rows of classifiers.

DEDIER (Tiwari et al., WACV 2024) and its variants with uncertainty (arXiv 2505.01070) weight examples; to weight the
tokens of a language model by the same rule is our reading, and so is every default here. A token is a row with V
classes. Of all training tokens two numbers each are kept, never their probabilities: those of a chunk are made, looked
at and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.classifiers.exits import gap as margin
from offramp.distillation.instance_weights import Evidence, InstanceWeights, finished, gated, share_of_rank, signal
from offramp.distillation.readout import (
    LensData,
    ReadoutOutputs,
    TokenReadout,
    TokenReadoutConfig,
    early_states,
    taught,
)
from offramp.families import SplitModel
from offramp.families.backbone import evaluating
from offramp.training.data import Windows
from offramp.training.loop import Loop
from offramp.training.loss_sums import chunk_rows
from offramp.training.objectives import choices
from offramp.training.passes import states_of
from offramp.uncertainty import candidates
from offramp.uncertainty.candidates import LaplaceConfig, TokenLaplace, shortlist
from offramp.uncertainty.laplace import Factors
from offramp.values import choice

SIGNALS = ("margin", "entropy", "loss", "laplace_margin", "laplace_entropy")
GATES = ("wrong", "all", "correct")
CONTROLS = ("none", "permuted", "mean-matched")
TARGETS = ("text", "teacher")


def _rule() -> InstanceWeights:
    return InstanceWeights(alpha=0.2, beta=3.0, weight_on="kd", normalise="mean")


@dataclass(frozen=True)
class TokenWeights:
    """How tokens are weighted.

    Attributes:
        rule: Signal, gate, map, the term that is weighted, normalisation, control. The default is DEDIER's for
            MultiNLI, divided by its mean: an early readout gets most tokens wrong, not few. Its `readout`, `every`,
            `warmup` and sets are for classifiers.
        readout: What is read early.
        target: The token that a readout should say: the "text"'s, or the "teacher"'s choice.
        every: Steps between two readouts.
        start: Steps before the first one; None: `every`.
        candidates: k: Laplace spreads the logits of so many tokens, all others are one rest.
        evidence: What the number of tokens is multiplied with for Laplace: those of one text are not independent.

    Raises:
        ValueError: A value out of range, or one that is not for tokens.
    """

    rule: InstanceWeights = field(default_factory=_rule)
    readout: TokenReadoutConfig = field(default_factory=TokenReadoutConfig)
    target: str = "text"
    every: int = 100
    start: int | None = None
    candidates: int = 64
    evidence: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (("signal", SIGNALS), ("gate", GATES), ("control", CONTROLS)):
            choice(f"{name} of token weights", getattr(self.rule, name), allowed)
        choice("target of token weights", self.target, TARGETS)
        if (self.rule.every, self.rule.warmup) != (1, 0):
            raise ValueError(
                "every and warmup of the rule count epochs of rows; give every and start of the token weights"
            )
        if self.rule.prior_variance is None:
            raise ValueError("prior_variance of token weights cannot be tuned here; give a number above 0")
        if self.every < 1 or (self.start or 0) < 0 or self.candidates < 2:
            raise ValueError(
                f"every is {self.every}, start {self.start}, candidates {self.candidates}; they count from 1, 0 and 2"
            )
        LaplaceConfig(self.rule.n_mc, evidence=self.evidence)

    @property
    def first(self) -> int:
        """Steps before the first readout."""
        return self.every if self.start is None else self.start

    def due(self, step: int) -> bool:
        """Whether there is a new readout when so many steps are done."""
        return self.started(step) and (step - self.first) % self.every == 0

    def started(self, step: int) -> bool:
        """Whether tokens are weighted when so many steps are done."""
        return step >= self.first

    @property
    def laplace(self) -> bool:
        """Whether a posterior of the head is needed."""
        return self.rule.signal.startswith("laplace_")


@torch.no_grad()
def new_token_weights(
    student: SplitModel,
    teacher: SplitModel,
    windows: Windows,
    config: TokenWeights,
    *,
    step: int,
    seed: int,
    size: int,
    loop: Loop,
) -> Tensor:
    """Read the student as it is at all its training tokens, and weight them.

    Args:
        student: Not changed in any way.
        teacher: For targets.
        windows: N of up to T tokens.
        config: How.
        step: Steps done, of which a lens's draws depend.
        seed: Seed of the run.
        size: Windows in a pass.
        loop: Loop of the run, whose processes divide the windows.

    Returns:
        [N, T], float32; 1 where nothing is predicted.
    """
    here = hash((seed, step)) & 0x7FFFFFFF
    where = windows.counted.clone()
    where[:, 0] = False
    with evaluating(student.model):
        readout, posterior = _readout(student, teacher, windows, config, here, size)
        found = torch.zeros(2, *where.shape, dtype=torch.float64)
        own = torch.arange(loop.workers.process_index, len(windows), loop.workers.num_processes)
        for rows in torch.split(own, size):
            part = torch.zeros(2, len(rows), where.shape[1], dtype=torch.float64)
            part[:, where[rows]] = _look(readout, posterior, teacher, windows[rows], config)
            found[:, rows] = part
    u, right = loop.summed(found.to(student.device)).cpu()[:, where]
    if config.rule.signal == "loss":
        u = share_of_rank(u)
    weights = finished(gated(u, right > 0, config.rule), config.rule, here)
    return torch.ones(where.shape).masked_scatter(where, weights.float())


def _readout(
    student: SplitModel, teacher: SplitModel, windows: Windows, config: TokenWeights, seed: int, size: int
) -> tuple[TokenReadout, TokenLaplace | None]:
    """The readout and its posterior, if they are asked for fitted on some windows drawn with the seed."""
    readout = TokenReadout(student, config.readout.at(student))
    if config.readout.kind == "head" and not config.laplace:
        return readout, None
    kept = _keep(student, teacher, windows, config, seed, size)
    if config.readout.kind == "lens":
        readout = taught(student, teacher, kept, config.readout, seed)
    if not config.laplace:
        return readout, None
    vocabulary, bias = student.shape.vocabulary, student.head.bias is not None
    factors = Factors.empty(student.shape.width, vocabulary, bias=bias, diagonal=True)
    for states in torch.split(kept.states, chunk_rows(vocabulary)):
        x = readout.inputs(states)
        factors = factors.update(x, readout.logits(x))
    settings = LaplaceConfig(config.rule.n_mc, seed, config.evidence)
    draws = candidates.standard_draws(settings, vocabulary)
    assert config.rule.prior_variance is not None
    fitted = candidates.fit(factors, config.rule.prior_variance, draws, settings, name="the readout")
    return readout, fitted.single()


def _keep(
    student: SplitModel, teacher: SplitModel, windows: Windows, config: TokenWeights, seed: int, size: int
) -> LensData:  # fmt: skip
    """States and targets of windows drawn at random, as many as are allowed."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    lengths = windows.counted[:, 1:].sum(1)[order].cumsum(0)
    order = order[: max(1, int((lengths <= config.readout.tokens).sum()))]
    layer = config.readout.at(student)
    taught_by_teacher = config.readout.kind == "lens" and config.readout.fit != "labels"
    states, targets, guides = [], [], []
    for rows in torch.split(order, size):
        part = windows[rows]
        states.append(early_states(student, part, layer))
        target, guide = _targets(teacher, part, config.target == "teacher" or taught_by_teacher)
        targets.append(target.to(student.device))
        guides.append(guide)
    return LensData(torch.cat(states), torch.cat(targets), torch.cat(guides))


def _targets(teacher: SplitModel, windows: Windows, its_choice: bool) -> tuple[Tensor, Tensor]:
    """Tokens that should be said, [M], and the teacher's readout inputs, [M, D_t], if it was asked."""
    if not its_choice:
        labels = windows.of_tokens(windows.ids)
        return labels, torch.empty(len(labels), 0)
    (states,), _ = states_of(teacher, windows, (teacher.num_layers,))
    inputs = teacher.readout_input(states)
    chunks = torch.split(inputs, chunk_rows(teacher.shape.vocabulary))
    return torch.cat([choices(teacher.project(chunk)) for chunk in chunks]), inputs


def _look(
    readout: TokenReadout, posterior: TokenLaplace | None, teacher: SplitModel, windows: Windows, config: TokenWeights
) -> Tensor:
    """Signal, and whether the answer under the signal's own distribution is the target; [2, M], float64."""
    split = readout.split
    states = early_states(split, windows, readout.layer)
    targets, _ = _targets(teacher, windows, config.target == "teacher")
    rows = chunk_rows(split.shape.vocabulary)
    found = [torch.empty(2, 0, dtype=torch.float64)]
    for hidden, target in _chunks(rows, states, targets.to(split.device)):
        x = readout.inputs(hidden)
        logits = readout.logits(x)
        if posterior is None:
            u, answers = _plain(config.rule.signal, logits, target)
        else:
            u, answers = _uncertain(config, posterior, x.cpu(), logits.cpu())
        found.append(torch.stack([u.double().cpu(), (answers.cpu() == target.cpu()).double()]))
    return torch.cat(found, dim=1)


def _chunks(rows: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(part, rows) for part in parts), strict=True)


def _plain(name: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The signal of the readout's own probabilities; the loss in nats, which is ranked among all tokens afterwards."""
    if name == "loss":
        log = logits.double().log_softmax(-1)
        return -log.gather(1, target[:, None])[:, 0], choices(logits)
    reading = ReadoutOutputs(0, logits, logits, target, ())
    return signal(name, Evidence(reading))


def _uncertain(config: TokenWeights, posterior: TokenLaplace, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The signal of Laplace's mean probabilities of the best tokens, and of the rest as one more class."""
    short = shortlist(logits, config.candidates)
    p, rest = candidates.predictive(posterior, x.float(), short)
    answers = short.ids.gather(1, p.argmax(-1, keepdim=True))[:, 0]
    if config.rule.signal == "laplace_margin":
        return margin(p).clamp(0, 1), answers
    parts = torch.cat([p, rest[:, None]], dim=1)
    return (torch.special.entr(parts).sum(-1) / math.log(parts.shape[1])).clamp(0, 1), answers
