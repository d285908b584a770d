"""Training exits, or a model together with its exits.

One pass of the model gives the states at all exits and after the last layer; every readout's loss is then computed from
the state there alone, a chunk at a time, and what reaches the states goes back through the blocks, if they are trained.

What several processes come to is what one does but for rounding, and but for what each decides by its own windows:
dropout and FREE's choice of deep layers.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.exits import Exits
from offramp.families import SplitModel
from offramp.families.backbone import autocast, rounded
from offramp.families.finite import NotFiniteError, broken_at
from offramp.runs.digests import fingerprint
from offramp.runs.folder import TrainState, opened
from offramp.runs.machine import describe, peak_name
from offramp.runs.results import Result
from offramp.training import consistency
from offramp.training.config import TrainConfig
from offramp.training.consistency import ClassGradients, balanced, classifier_loss_sums
from offramp.training.data import Data, Windows, batch
from offramp.training.drafts import Drafts
from offramp.training.frequent import DRAFTED, Listing, checked, listed
from offramp.training.kept_states import KeptStates, forget
from offramp.training.loop import Loop, StepResult, TrainTask, adamw
from offramp.training.loss_sums import LossSums, chunk_rows, loss_sums
from offramp.training.objectives import OBJECTIVES, layerwise_loss
from offramp.training.passes import dropping, states_behind_prompts, states_of
from offramp.training.schedule import WEIGHTS, weights_at
from offramp.training.trainable import Trainable, check_trainable, save, trainable

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

_LOOKED_AT = 8
"""Windows that a model's pass is gone through on, to see where it first computes NaN or infinity."""

SCHEMA = "offramp/train/2"


@dataclass(frozen=True)
class TrainResult(Result):
    """What training did, one value per exit where there are several.

    Attributes:
        layers: The exits; of a drafter instead how many drafts in a row: 1, 2, ...
        agreement_before: Share of held-out positions at which the exit's most probable token is the last layer's,
            untrained.
        agreement_after: Likewise, trained.
        loss_before: Mean loss at those positions, in nats.
        loss_after: Likewise, trained.
        full_before: Mean cross-entropy of the last layer to the text there, in nats, before training; None: unknown.
        full_after: Likewise, trained; the same, unless the backbone was trained.
        positions: Held-out positions.
        steps: Steps made, those before an interruption included.
        tokens: Positions trained on.
        seconds: Time the steps took.
        exits: Folder of the trained exits.
        model: Folder of the trained model; None if it did not change.
        what: "agreement"; for classifiers "accuracy": there, the two shares say how often their verdict was right.
        frequent: The exits' frequent tokens, in numbers.
        in_a_row: Of a drafter, how often so many drafts in a row are all the last layer's, trained.
        memory: Most bytes that were held, see `offramp.runs.machine.peak`; with several processes, by the first. 0:
            unknown.
        memory_of: What these bytes are of, in words.
    """

    schema = SCHEMA

    layers: tuple[int, ...]
    agreement_before: tuple[float, ...]
    agreement_after: tuple[float, ...]
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]
    full_before: float | None
    full_after: float | None
    positions: int
    steps: int
    tokens: int
    seconds: float
    exits: Path
    model: Path | None = None
    what: str = "agreement"
    frequent: Listing | None = None
    in_a_row: tuple[float, ...] = ()
    memory: int = 0
    memory_of: str = "peak memory"

    def __repr__(self) -> str:
        places = "drafts in a row" if self.in_a_row else "exits after"
        changes = zip(self.layers, self.agreement_before, self.agreement_after, strict=True)
        said = ", ".join(f"{layer} ({before:.3f} -> {after:.3f})" for layer, before, after in list(changes)[-4:])
        said = f"…, {said}" if len(self.layers) > 4 else said
        return (
            f"TrainResult({places} {said}; {self.what} at {self.positions} held-out positions, {self.steps} steps, "
            f"{str(self.exits)!r})"
        )

    def _rows(self) -> Iterable[Any]:
        """A row per exit: layer, agreement_before and _after, loss_before and _after."""
        columns = ("agreement_before", "agreement_after", "loss_before", "loss_after")
        values = zip(self.layers, *(getattr(self, name) for name in columns), strict=True)
        return (dict(zip(("layer", *columns), row, strict=True)) for row in values)

    def table(self) -> str:
        """A small table."""
        head = "draft in a row  " if self.in_a_row else "exit after layer"
        lines = [f"{head}   {self.what:9s} on held-out text   loss (nats)"]
        columns = (self.layers, self.agreement_before, self.agreement_after, self.loss_before, self.loss_after)
        for layer, old, new, worse, better in zip(*columns, strict=True):
            lines.append(f"{layer:16d}   {old:12.3f} -> {new:.3f}{worse:15.3f} -> {better:.3f}")
        if self.in_a_row:
            lines.append(
                f"drafts of {len(self.in_a_row)} tokens: {sum(self.in_a_row):.2f} of them stand, on average, so that a "
                f"pass of the full model gives {1 + sum(self.in_a_row):.2f} tokens"
            )
        if self.model is not None:
            lines.append(f"last layer to the text: {self.full_before:.3f} -> {self.full_after:.3f} nats")
        rate = self.tokens / self.seconds if self.seconds else 0.0
        lines.append(
            f"{self.positions} held-out positions; {self.steps} steps on {self.tokens} positions, {rate:.0f} per second"
        )
        lines += [f"{self.memory_of}: {self.memory / 1e9:.2f} GB"] if self.memory else []
        lines += [] if self.frequent is None else [str(self.frequent)]
        return "\n".join(lines)


def train(
    lm: LanguageModel,
    data: Data,
    config: TrainConfig,
    folder: Path,
    progress: Callable[..., None] | None = None,
    report_to: Any = None,
    about: Mapping[str, Any] | None = None,
    coverage: float | None = None,
) -> TrainResult:
    """Train exits, or the model with them, or go on where an earlier call in the same folder was interrupted.

    Args:
        lm: The model. Its weights change with `trainable` "lora" and "all" only.
        data: From `offramp.training.data.prepare`.
        config: What to do.
        folder: Where everything is written, see `offramp.runs.folder`.
        progress: Called with the steps (or tokens) done and to do, and the loss.
        report_to: Trackers as `accelerate.Accelerator(log_with=...)` takes them: "tensorboard", "wandb", "all", a
            `GeneralTracker`, or a list; they get what metrics.jsonl gets.
        about: What else config.json should say, as JSON values, beside hardware and versions; nobody compares it.
        coverage: Share of the predicted tokens that the exits' frequent tokens cover; None: 0.995, or exits that get
            classifiers keep the list they have. It changes nothing about training, and nobody compares it.

    Returns:
        What was reached.

    Raises:
        ValueError: The folder holds a run with other options or data, or a layer is no possible exit.
        TrainingError: The loss is not finite.
    """
    from accelerate import Accelerator

    check_trainable(lm, config)
    coverage, config = None if coverage is None else checked(coverage), _computing(lm, config)
    workers = Accelerator(cpu=lm.split.device.type == "cpu", log_with=report_to, project_dir=folder)
    with opened(folder, writes=workers.is_main_process) as run:
        with trainable(lm, config) as learns, rounded(lm.model, config.precision):
            record = _record(lm, learns.exits, data, config)
            columns = range(1, config.unroll + 1) if config.drafter else learns.exits.layers
            schedule = config.run_schedule
            optimizer = adamw(learns.parameters.values(), schedule.learning_rate, config.weight_decay)
            loop = Loop(learns.parameters, optimizer, schedule, run, lm.split.device, workers, columns=columns)
            if config.drafter:
                learns.exits.frequent = listed(lm, learns.exits, data, coverage, DRAFTED)[0].frequent
                work: TrainTask = Drafts(lm.split, learns.exits, data, config, loop)
            else:
                work = _Exits(lm.split, learns, data, config, loop)
            changed = run.check(record, about={**(about or {}), **describe(lm.split.device)})
            if report_to is not None:
                parts = ("model", "config", "data")
                flat = {f"{part}.{name}": str(value) for part in parts for name, value in record[part].items()}
                workers.init_trackers("offramp", config=flat)
            state = loop.go(work, progress)
            forget(run.path)
            for tracker in workers.trackers:  # `end_training` would also part the processes, which go on
                tracker.finish()
        exits, listing = listed(lm, learns.exits, data, coverage)
        if workers.is_main_process:
            record |= {"frequent": asdict(listing), **({"changed": changed} if changed else {})}
            record |= {"memory": {"bytes": state.memory, "of": peak_name(lm.split.device)}} if state.memory else {}
            save(lm, exits, run.exits, record, model=run.model if config.backbone else None)
        workers.wait_for_everyone()
        judged = [row for row in run.rows() if row["kind"] == "validation"]
    before, after = judged[0], judged[-1]
    return TrainResult(
        layers=tuple(columns),
        agreement_before=tuple(before["agreement"]),
        agreement_after=tuple(after["agreement"]),
        loss_before=tuple(before["loss"]),
        loss_after=tuple(after["loss"]),
        full_before=before.get("full_loss"),
        full_after=after.get("full_loss"),
        positions=data.held_out.positions,
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        exits=run.exits,
        model=run.model if config.backbone else None,
        what="accuracy" if config.classifiers else "agreement",
        frequent=listing,
        in_a_row=tuple(after.get("in_a_row", ())),
        memory=state.memory,
        memory_of=peak_name(lm.split.device),
    )


def _computing(lm: LanguageModel, config: TrainConfig) -> TrainConfig:
    """The config, in a format that blocks of the exits' own, whose weights are float32, can be computed in."""
    return replace(config, precision="bf16") if config.blocks and lm.model.dtype == torch.bfloat16 else config


def _record(lm: LanguageModel, exits: Exits, data: Data, config: TrainConfig) -> dict[str, Any]:
    """What a run is, for its folder and for those who read its exits."""
    model = {"name": lm.name, "fingerprint": exits.fingerprint, "dtype": str(lm.model.dtype).removeprefix("torch.")}
    if config.classifiers:
        model["lenses"] = fingerprint(exits.adapters)  # which the classifiers look through
    return {
        "schema": SCHEMA,
        "model": model,
        "config": {**asdict(config), "layers": exits.layers},
        "data": {**data.settings, "train": data.train.digest(), "held_out": data.held_out.digest()},
    }  # fmt: skip


class _Exits:
    """The losses of exits and, where the backbone is trained, of the last layer."""

    unit = "tokens"

    def __init__(self, split: SplitModel, learns: Trainable, data: Data, config: TrainConfig, loop: Loop) -> None:
        self.split, self.exits, self.data, self.config, self.loop = split, learns.exits, data, config, loop
        layers = (*self.exits.layers, split.num_layers) if config.backbone else self.exits.layers
        self.weights = WEIGHTS[config.weights](layers)
        if config.prompt_layer is not None and int(data.train.first.max()) < 2:
            raise ValueError(
                f"prompt_layer is {config.prompt_layer}, but nothing that is trained on has a prompt before the first "
                "word to learn, as answers have; give prompts or a task, or leave it out"
            )
        self.share = 0.0
        self.kept: KeptStates | None = None

    # ------------------------------------------------------------ a step

    def begin(self, state: TrainState) -> None:
        """Make the place for states, which a run that was refused before must not leave behind."""
        split, loop, read = self.split, self.loop, (*self.exits.layers, self.split.num_layers)
        self.kept = KeptStates.of(split, self.data.train, read, self.config, loop.run.path, loop.workers)
        self.settle(state)

    def settle(self, state: TrainState) -> None:
        """How far the run is, for a curriculum."""
        self.share = self.loop.schedule.share(state)

    def learn(self, step: int) -> StepResult:
        """Losses of a step, and their gradients."""
        config = self.config
        windows = batch(self.data.train, step, config.batch_size, config.seed, config.positions)
        count, weights = windows.positions, weights_at(config.curriculum, self.weights, step, self.share)
        if config.weights == "last":
            weights = [weight or None for weight in weights]  # exits that are not read out cost nothing
        if config.classifiers:
            result = self._learn_classifiers(windows)
        else:
            result = self._shared(windows, config.micro_batch, lambda part: self._learn(part, count, weights))
        return self._done(result, windows, weights)

    def _done(self, result: LossSums, windows: Windows, weights: Sequence[float | None]) -> StepResult:
        strange = [layer for layer, loss in zip(self.exits.layers, result.loss, strict=True) if not math.isfinite(loss)]
        where = f"the exit after layer {strange[0]}" if strange else None
        if len(strange) == len(self.exits.layers) > 1 or not math.isfinite(result.last_loss):
            where = f"every exit ({self._broken(windows) or 'so perhaps in the model itself'})"
        loss = sum((w or 0) * value for w, value in zip(weights, [*result.loss, result.last_loss], strict=False))
        lists = {"loss": result.loss, "agreement": result.agreement}
        row: dict[str, Any] = {
            name: [None if w is None else value for w, value in zip(weights, values, strict=False)]
            for name, values in lists.items()
        }
        row["full_loss"] = result.last_loss
        return StepResult(loss, result.positions, row, where)

    def _broken(self, windows: Windows) -> NotFiniteError | None:
        """What is wrong with the model itself, if it is that; an encoder-decoder is not gone through."""
        if self.split.is_encoder_decoder:
            return None
        with autocast(self.split.device, self.config.precision):
            return broken_at(self.split, windows.ids[:_LOOKED_AT].to(self.split.device))

    def _learn(self, windows: Windows, count: int, weights: Sequence[float | None]) -> LossSums:
        """Losses of some windows of the step; adds their gradient, divided by the `count` of the whole step."""
        config, depth = self.config, len(self.exits.layers) + 1
        hidden, labels = self._states(windows)
        leaves = [h.detach().requires_grad_(h.requires_grad) for h in hidden[:depth]]
        result = self._loss_sums(leaves, labels, weights=weights, count=count)
        read = [(state, leaf.grad) for state, leaf in zip(hidden, leaves, strict=False) if leaf.grad is not None]
        if read:
            roots = [state for state, _ in read]
            gradients: list[Tensor | None] = [gradient for _, gradient in read]
            if config.hidden_loss:
                (layer,), others = self.exits.layers, hidden[depth:]
                term = layerwise_loss(others[:layer], others[layer:]) * config.hidden_loss * len(labels) / count
                roots, gradients = [*roots, term], [*gradients, None]
            torch.autograd.backward(roots, gradients)
        return result

    def _learn_classifiers(self, windows: Windows) -> LossSums:
        """The same for classifiers and all windows of the step, whose classes are balanced over all of them."""
        gradients = ClassGradients(self.exits, self.weights)
        parts = self._shared(
            windows, self.config.micro_batch, lambda part: self._loss_sums(*self._states(part), gradients=gradients)
        )
        result, shares = balanced(parts)
        gradients.settle(shares, result.positions)
        return result

    def _states(self, windows: Windows) -> tuple[list[Tensor], Tensor]:
        """States from which counted tokens are predicted, and these tokens.

        Returns:
            One [N, D] per exit, one for layer L, with `hidden_loss` one for every layer besides; and labels [N].
        """
        config, split = self.config, self.split
        every = range(1, split.num_layers + 1) if config.hidden_loss else ()
        layers = (*self.exits.layers, split.num_layers, *every)
        gradients = (config.backbone or config.blocks > 0) and torch.is_grad_enabled()
        with autocast(split.device, config.precision), torch.set_grad_enabled(gradients):
            if self.kept is not None and windows.rows is not None:
                return self.kept.read(windows)
            if config.prompt_layer is not None:
                return states_behind_prompts(split, windows, layers, config.prompt_layer)
            return states_of(split, windows, layers, edit=dropping(split, config.layer_dropout))

    def _loss_sums(self, states: list[Tensor], labels: Tensor, **gradient: Any) -> LossSums:
        split, name, rows = self.split, self.config.objective, chunk_rows(self.split.shape.vocabulary)
        with autocast(split.device, self.config.precision):
            if self.config.classifiers:
                kind = consistency.OBJECTIVES[name]
                return classifier_loss_sums(split, self.exits, states, labels, rows=rows, kind=kind, **gradient)
            return loss_sums(
                self.exits, split.readout, states, labels, OBJECTIVES[name], rows=rows,
                temperature=self.config.temperature, **gradient,
            )  # fmt: skip

    def _shared(self, windows: Windows, size: int | None, work: Callable[[Windows], LossSums]) -> LossSums:
        """The sum of `work` over all windows, of which each process takes its share, `size` at a time."""
        width, device = (2 if self.config.classifiers else 1) * len(self.exits.layers) + 1, self.split.device
        nothing = LossSums(torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(width, device=device), 0)
        mine = (windows[places] for places in self.loop.mine(len(windows), size))
        own = functools.reduce(operator.add, map(work, mine), nothing)
        sums = torch.cat([own.losses, own.agreed.double(), own.losses.new_tensor([own.positions])])
        sums = self.loop.summed(sums)
        return LossSums(sums[:width], sums[width : 2 * width], int(sums[-1]))

    # ------------------------------------------------------------ judging

    @torch.no_grad()
    def judge(self) -> StepResult:
        """Losses and agreement over all held-out windows, without dropout."""

        def look(part: Windows) -> LossSums:
            hidden, labels = self._states(part)
            return self._loss_sums(hidden[: len(self.exits.layers) + 1], labels)

        training = self.split.model.training
        self.split.model.eval()
        try:
            result = self._shared(self.data.held_out, self.config.micro_batch or self.config.batch_size, look)
        finally:
            self.split.model.train(training)
        result = balanced(result)[0] if self.config.classifiers else result
        done = self._done(result, self.data.held_out, self.weights)
        return replace(done, row={"positions": done.count, **done.row, "full_accuracy": result.last_accuracy})
