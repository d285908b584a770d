"""A language model that learns from another one with the same tokens, watched by an early readout of its own.

Distillation as in Hinton et al. (2015), token by token, on fixed texts or on the student's own answers; tokens are
weighted by what a readout of the student's early layers says (`offramp.distillation.token_weights`), and everything is
judged by groups of prompts. The steps, their order, processes and checkpoints are those of `offramp.training.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.distillation.objectives import TokenLoss, TokenSums, token_losses
from offramp.distillation.texts import OwnAnswers
from offramp.distillation.token_report import SCHEMA, TokenDistillResult, summary
from offramp.distillation.token_weights import TokenWeights, new_token_weights
from offramp.families.backbone import autocast, evaluating
from offramp.families.finite import name_of, require_finite
from offramp.metrics.group_effects import weight_diagnostics
from offramp.metrics.groups import Groups
from offramp.runs.digests import fingerprint
from offramp.runs.folder import TrainState, opened
from offramp.runs.machine import describe
from offramp.training.config import TrainConfig
from offramp.training.data import Data, Windows, batch
from offramp.training.loop import Loop, StepResult, adamw
from offramp.training.loss_sums import chunk_rows
from offramp.training.objectives import OBJECTIVES, SOFTENED
from offramp.training.passes import dropping, states_of
from offramp.training.trainable import check_trainable, save_model, trainable

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel


def _training() -> TrainConfig:
    return TrainConfig(trainable="all")


@dataclass(frozen=True)
class TokenDistillation:
    """How a language model learns from another one.

    Attributes:
        training: Steps, learning rate and so on. `trainable` is "all" or "lora"; `objective` is "forward-kl",
            KL(teacher || student), or "reverse-kl"; `temperature` is T. Whatever is about exits does not apply.
        fraction: λ of the divergence, 1 - λ of the cross-entropy to the text. Must be 1 for own answers.
        weights: How tokens are weighted; None: all weights are 1.

    Raises:
        ValueError: A value out of range, or one that does not apply.
    """

    training: TrainConfig = field(default_factory=_training)
    fraction: float = 0.9
    weights: TokenWeights | None = None

    def __post_init__(self) -> None:
        training = self.training
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it is the share of the teacher in the loss, in [0, 1]")
        if training.objective not in SOFTENED:
            raise ValueError(
                f"objective is {training.objective!r}; choose {' or '.join(SOFTENED)} to learn from a teacher"
            )
        if not training.backbone:
            raise ValueError(f"trainable is {training.trainable!r}, but a student is trained; give 'all' or 'lora'")
        of_exits = (training.layers, training.hidden_loss, training.prompt_layer, training.curriculum, training.rank)
        if any(of_exits) or training.weights != "uniform":
            raise ValueError(
                "layers, rank, weights, hidden_loss, curriculum and prompt_layer are for exits; leave them out, and "
                "train exits of the finished student with offramp train"
            )
        steps, weights = training.steps, self.weights
        if weights is not None and steps is not None and not weights.started(steps - 1):
            raise ValueError(
                f"tokens are first weighted after {weights.first} steps, and training ends after {steps}, so none ever "
                "is; weigh earlier (weigh_every, or start), or take more steps"
            )

    @property
    def loss(self) -> TokenLoss:
        """The loss of tokens."""
        on = "both" if self.weights is None else self.weights.rule.weight_on
        return TokenLoss(OBJECTIVES[self.training.objective], self.training.temperature, self.fraction, on)


def distil(
    student: LanguageModel,
    teacher: LanguageModel,
    data: Data | OwnAnswers,
    config: TokenDistillation,
    folder: Path,
    *,
    groups: Sequence[str] = (),
    progress: Callable[..., None] | None = None,
    report_to: Any = None,
    about: Mapping[str, Any] | None = None,
) -> TokenDistillResult:
    """Distil a student, or go on where an earlier call in the same folder was interrupted.

    Args:
        student: Its weights change.
        teacher: With the same vocabulary; does not change.
        data: Fixed texts from `offramp.training.data.prepare`, whose documents may have an `attribute`, or prompts.
        config: How.
        folder: Where everything is written, see `offramp.runs.folder`; own answers as answers-STEP.jsonl.
        groups: Names of the groups that attributes are numbers of, G.
        progress: Called with the steps (or tokens) done and to do, and the loss.
        report_to: Trackers, see `offramp.training.trainer.train`.
        about: What else config.json should say, as JSON values; nobody compares it.

    Returns:
        What was reached, by group.

    Raises:
        ValueError: The vocabularies differ; a group has no text in one of the parts; options do not go together; or the
            folder holds a run with other options.
        NotFiniteError: The teacher computes NaN or infinity.
        TrainingError: The loss is not finite.
    """
    from accelerate import Accelerator

    require_same_vocabulary(student, teacher)
    own = isinstance(data, OwnAnswers)
    _check(student, teacher, config, own=own)
    _require_groups(data, groups)
    workers = Accelerator(cpu=student.split.device.type == "cpu", log_with=report_to, project_dir=folder)
    with opened(folder, writes=workers.is_main_process) as run:
        record = _record(student, teacher, data, config, groups)
        run.check(record, about={**(about or {}), **describe(student.split.device)})
        source = _Texts(student, data, run.path, f"{record['student']['fingerprint']} in this run", progress)
        exits = student.split.exits
        with trainable(student, config.training) as learns, evaluating(teacher.model):
            student.split.attach(exits)  # by which an early readout looks; for training there were others
            parameters = {name: p for name, p in learns.parameters.items() if name.startswith("model.")}
            weights = torch.empty(0)
            kept = {} if config.weights is None else {"token_weights": weights}
            schedule, device = config.training.run_schedule, student.split.device
            optimizer = adamw(parameters.values(), schedule.learning_rate, config.training.weight_decay)
            loop = Loop(parameters, optimizer, schedule, run, device, workers, columns=groups, kept=kept)
            work = _Tokens(student, teacher, source, config, groups, weights, loop)
            if report_to is not None:
                workers.init_trackers("offramp", config={})
            clock = loop.go(work, progress)
            for tracker in workers.trackers:
                tracker.finish()
        if workers.is_main_process:
            save_model(student, run.model)
        workers.wait_for_everyone()
        return summary(run.rows(), groups, clock, run.model)


def require_same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> None:
    """Raise a ValueError that names the first token id which does not mean the same to both models."""
    ours, theirs = (
        {} if lm.tokenizer is None else {i: token for token, i in lm.tokenizer.get_vocab().items()}
        for lm in (student, teacher)
    )
    if ours and theirs:
        strange = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
        if strange:
            first = strange[0]
            raise ValueError(
                f"token id {first} is {ours.get(first)!r} to the student and {theirs.get(first)!r} to the teacher; "
                "distillation needs models that share a tokenizer"
            )
    if student.vocabulary != teacher.vocabulary:
        first = min(student.vocabulary, teacher.vocabulary)
        raise ValueError(
            f"the student's head has {student.vocabulary} tokens and the teacher's {teacher.vocabulary}, so token id "
            f"{first} is known to one only; if the rest is padding, call resize_token_embeddings({first}) on the "
            "larger model"
        )


def _check(student: LanguageModel, teacher: LanguageModel, config: TokenDistillation, *, own: bool) -> None:
    if student.model is teacher.model:
        raise ValueError("student and teacher are the same object, which would follow itself; load the model twice")
    if student.split.is_encoder_decoder or teacher.split.is_encoder_decoder:
        raise ValueError("distillation of language models is for decoder-only models; an encoder-decoder is given")
    if student.num_layers < 2:
        raise ValueError("the student has one layer; a model with early exits has two at least")
    check_trainable(student, config.training)
    if config.weights is not None:
        config.weights.readout.at(student.split)
    if own and config.fraction != 1:
        raise ValueError(f"fraction is {config.fraction}, but own answers are no labels to learn; give fraction 1")
    if own and config.weights is not None and config.weights.target == "text":
        raise ValueError("own answers are no labels for a readout; give target 'teacher' to the token weights")


def _require_groups(data: Data | OwnAnswers, groups: Sequence[str]) -> None:
    """Refuse, before prompts are answered, groups that one of the parts has none of."""
    if isinstance(data, OwnAnswers):
        known = None if data.attributes is None else torch.tensor(data.attributes)
        numbers = [None if known is None else known[part] for part in data.parts()]
    else:
        numbers = [data.train.attributes, data.held_out.attributes]
    for name, part in zip(("training", "held-out"), numbers, strict=True):
        if groups and part is not None:
            Groups.by_number(part, groups).require_rows(name)


def _record(
    student: LanguageModel,
    teacher: LanguageModel,
    data: Data | OwnAnswers,
    config: TokenDistillation,
    groups: Sequence[str],
) -> dict[str, Any]:
    """What a run is."""
    who = {
        name: {
            "name": lm.name,
            "fingerprint": fingerprint(lm.model),
            "dtype": f"{lm.model.dtype}".removeprefix("torch."),
        }
        for name, lm in (("student", student), ("teacher", teacher))
    }
    content = {} if isinstance(data, OwnAnswers) else {"train": data.train.digest(), "held_out": data.held_out.digest()}
    made = {
        "schema": SCHEMA,
        **who,
        "config": asdict(config),
        "data": {**data.settings, **content},
        "groups": [*groups],
    }
    return made if config.weights is None or student.exits is None else {**made, "exits": fingerprint(student.exits)}


class _Texts:
    """What is learnt from: fixed windows, or own answers given anew."""

    def __init__(self, lm: LanguageModel, data: Data | OwnAnswers, folder: Path, by: str, progress: Any) -> None:
        self.lm, self.data, self.folder, self.by, self.progress = lm, data, folder, by, progress

    def at(self, step: int) -> Windows:
        """What is learnt from after so many steps."""
        if not isinstance(self.data, OwnAnswers):
            return self.data.train
        began = self.data.round(step) * self.data.every
        return self._answers(self.data, 0, f"answers-{began:06d}.jsonl", began)

    def held_out(self) -> Windows:
        """What is judged by; own answers must first be asked for before training begins."""
        if not isinstance(self.data, OwnAnswers):
            return self.data.held_out
        return self._answers(self.data, 1, "answers-held-out.jsonl", 0)

    def renewed(self, step: int) -> bool:
        """Whether there are other windows from this step on than before it."""
        return isinstance(self.data, OwnAnswers) and step > 0 and step % self.data.every == 0

    def _answers(self, own: OwnAnswers, part: int, file: str, step: int) -> Windows:
        by = f"{self.by} after {step} steps"
        return own.answered(self.lm, own.parts()[part], self.folder / file, by, self.progress)


class _Tokens:
    """The losses of a student's tokens, and their weights, which the loop keeps."""

    unit = "tokens"

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel,
        texts: _Texts,
        config: TokenDistillation,
        groups: Sequence[str],
        weights: Tensor,
        loop: Loop,
    ) -> None:
        self.student, self.teacher, self.texts, self.config, self.groups = student, teacher, texts, config, groups
        self.loss, self.weights, self.loop = config.loss, weights, loop
        self.rows = chunk_rows(student.vocabulary)

    # ------------------------------------------------------------ what is learnt from

    def begin(self, clock: TrainState) -> None:
        """Find the windows where the run stands, and the weights they have."""
        self.held_out = self.texts.held_out()
        self._learn_from(self.texts.at(clock.step))
        for name, part in (("training", self.train), ("held-out", self.held_out)):
            if self.groups:
                Groups.by_number(self._groups_of(part), self.groups).require_rows(name)

    def _groups_of(self, windows: Windows) -> Tensor:
        """Of the tokens, [M]; -1 where they are unknown, or nobody asks."""
        known = windows.attributes if self.groups else None
        return windows.of_tokens(torch.full((len(windows),), -1) if known is None else known)

    def _learn_from(self, windows: Windows) -> None:
        known = self.weights.shape == windows.ids.shape
        self.train = replace(windows, weights=self.weights if known else None)

    def settle(self, clock: TrainState) -> None:
        """Answer anew and weight anew, where it is time; only at the end nothing needs to be new."""
        config, step = self.config, clock.step
        if self.loop.schedule.ended(clock):
            return
        renewed = self.texts.renewed(step)
        if renewed:
            self.weights.data = torch.empty(0)
            self._learn_from(self.texts.at(step))
        rule = config.weights
        if rule is None or not (rule.due(step) or (renewed and rule.started(step))):
            return
        self.weights.data = new_token_weights(
            self.student.split, self.teacher.split, self.train, rule, step=step, seed=config.training.seed,
            size=config.training.micro_batch or config.training.batch_size, loop=self.loop,
        )  # fmt: skip
        self._learn_from(self.train)
        self._log_weights(clock)

    def _log_weights(self, clock: TrainState) -> None:
        of_tokens = self.train.of_tokens
        groups = Groups.by_number(self._groups_of(self.train), self.groups) if self.groups else None
        found = weight_diagnostics(of_tokens(self.weights), groups)
        assert self.config.weights is not None
        alike = self.config.weights.rule.control == "mean-matched"  # on purpose, so it is no share to be warned of
        lists = {"weight": list(found.by_group.values()), "group_tokens": groups.counts.tolist()} if groups else {}
        self.loop.log({
            "kind": "weights", "step": clock.step, "reweighted": None if alike else found.reweighted,
            "mean": found.mean, "largest": found.quantiles[-1], **lists,
        })  # fmt: skip

    # ------------------------------------------------------------ a step

    def learn(self, step: int) -> StepResult:
        """Losses of a step, and their gradients."""
        training = self.config.training
        windows = batch(self.train, step, training.batch_size, training.seed, training.positions)
        return self._done(self._sums(windows, training.micro_batch, windows.positions))

    @torch.no_grad()
    def judge(self) -> StepResult:
        """Losses of all held-out tokens, unweighted, without dropout."""
        training = self.config.training
        with evaluating(self.student.model):
            sums = self._sums(self.held_out, training.micro_batch or training.batch_size, None)
        done = self._done(sums)
        lists = {f"group_{name}": sums.by_group(name) for name in ("kd", "ce", "agreement", "accuracy")}
        tokens = sums.values[:-1, 0].long().tolist()
        shortened = self.train.shortened + self.held_out.shortened
        row = {"positions": done.count, **done.row, **(lists | {"group_tokens": tokens} if self.groups else {})}
        return replace(done, row=row | ({"shortened": shortened} if shortened else {}))

    def _sums(self, windows: Windows, size: int | None, count: int | None) -> TokenSums:
        sums = TokenSums.nothing(len(self.groups), self.student.split.device)
        for places in self.loop.mine(len(windows), size):
            sums = sums + self._of(windows[places], count)
        flat = self.loop.summed(torch.cat([sums.values.flatten(), sums.loss[None]]))
        return TokenSums(flat[:-1].view_as(sums.values), flat[-1])

    def _of(self, windows: Windows, count: int | None) -> TokenSums:
        """Of some windows; with `count`, the gradient goes back through the student's blocks."""
        mine, other = self.student.split, self.teacher.split
        with (
            autocast(self.student.split.device, self.config.training.precision),
            torch.set_grad_enabled(count is not None),
        ):
            edit = dropping(mine, self.config.training.layer_dropout)
            (hidden,), labels = states_of(mine, windows, (mine.num_layers,), edit=edit)
        with torch.no_grad():
            (guide,), _ = states_of(other, windows, (other.num_layers,))
            require_finite(guide, f"the teacher {name_of(other)}", f"after layer {other.num_layers}")
        weights = None
        if windows.weights is not None and count is not None:
            weights = windows.of_tokens(windows.weights).to(labels.device)
        leaf = hidden.detach().requires_grad_(count is not None)
        with autocast(self.student.split.device, self.config.training.precision):
            sums = token_losses(
                (leaf, mine.readout), (guide, other.readout), labels, self._groups_of(windows),
                self.loss, rows=self.rows, names=len(self.groups), weights=weights, count=count,
            )  # fmt: skip
        if count is not None:
            hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return sums

    def _done(self, sums: TokenSums) -> StepResult:
        loss = float(sums.loss) / max(sums.tokens, 1)
        row = {"objective": loss, **{name: sums.mean(name) for name in ("kd", "ce", "agreement", "accuracy")}}
        strange = None if math.isfinite(loss) else "the loss, by the student or by the teacher's head"
        return StepResult(loss, sums.tokens, row, strange)
