"""`offramp distill`: classifiers in a grid, or with `--task language-modelling` one language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.options import options_of
from offramp.training.config import TrainConfig

if TYPE_CHECKING:
    from offramp.core.exits import Exits
    from offramp.distillation.language_models import TokenDistillation


def distill(
    student: Annotated[
        str | None,
        typer.Argument(
            metavar="STUDENT",
            help="What is trained: small-cnn:WIDTH (small images), text:LAYERSxWIDTH (new, with the words of the "
            "data), or a pretrained encoder by packaged name, folder or hub id, maybe with :N for its first N layers. "
            "May stand in --config.",
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK|FOLDER|logits:FILE",
            help="A network, described as STUDENT, that is trained here first; a folder with a classifier that was "
            "saved; or logits on disk. May be given several times, but only one network.",
        ),
    ] = None,
    teacher_method: Annotated[
        str, typer.Option(help="How a teacher that is trained here learns: erm, group_dro, group_balanced, jtt, dfr.")
    ] = "erm,group_dro",
    task: Annotated[
        str | None,
        typer.Option(help="Layout of --data: waterbirds, celeba, multinli, snli, civilcomments, groups (CSV, JSONL)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|stand-in:NAME",
            help="A local folder or file as it is published, or a set that is generated: stand-in:digits-on-colour, "
            "stand-in:template-nli, stand-in:template-toxicity, stand-in:mnist-on-colour:FOLDER, …",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Methods with commas between them: erm, jtt, group_balanced, group_dro, lff, dfr, kd, simkd, dett, "
            "dedier, dedier_code, laplace, laplace_entropy, laplace_variance, avcs, avcs_size, nested, nested_size; "
            "controls dedier_permuted, dedier_mean, dedier_gate, dedier_oracle. Switches behind a name: "
            "dedier+alpha=1+fraction=0.5."
        ),
    ] = "erm,kd,dedier",
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Settings as JSON; waterbirds, celeba, multinli and civilcomments come with the published ones, "
            "stand-ins with ours, which are used without asking.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of students and teachers that are trained.")] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="How a run's epoch is chosen: last, val_average, val_worst_class, val_loss (no group labels), "
            "val_group_mean, val_worst_group. One without group labels also chooses teachers' epochs."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    backend: Annotated[str, typer.Option(help="processes, or ray for the machines of a Ray cluster.")] = "processes",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the grid is written; default: runs/distill-DATA.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Distil students by several methods and judge them group by group.

    Each method runs with each teacher and seed; a run is one folder, and an interrupted grid goes on when it is started
    again. Printed are, for each teacher: the worst group by method with paired differences to plain distillation, every
    group with its interval, what distillation cost it, exits by group, how well weights find the minority, what other
    selection rules would have chosen, and where group labels were used. `offramp report` shows the same with pictures.
    """
    import offramp

    chosen: Any = {"task": task, "select": select, "backend": backend}
    with o.progress("distilling") as progress:
        grid = offramp.distill_grid(
            student, data, **chosen, teachers=teacher or [], teacher_methods=o.names(teacher_method),
            methods=o.names(method), settings=config, seeds=range(first_seed, first_seed + seeds), epochs=epochs,
            processes=processes, threads=threads, device=device, out=out, progress=progress,
        )  # fmt: skip
    o.say(grid.table(), json)
    o.note(f"wrote {grid.folder / 'report.md'} and groups.csv; pictures: offramp report {grid.folder}")
    o.write_result(grid.to_dict(), json)


FIELDS = (
    "lora_rank", "steps", "tokens", "batch_size", "micro_batch", "learning_rate", "weight_decay", "warmup", "schedule",
    "validate_every", "save_every", "seed",
)  # fmt: skip


@options_of(TrainConfig, FIELDS, before="precision")
def distill_language_model(
    context: typer.Context,
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="What is trained: packaged name (smollm2), local folder or hub id.")
    ],
    teacher: Annotated[
        str, typer.Option(metavar="TEACHER", help="A model with the same tokenizer: packaged name, folder or hub id.")
    ],
    text: o.TrainingText = None,
    text_column: o.TextColumn = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="Key of what stands before the text and is not learnt; default: nothing. Of --prompts: prompt."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Learn on the student's own answers to these prompts instead (on-policy): one per line, or JSON "
            "objects.",
        ),
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Key of the group in JSON objects; results are then told apart by group.")
    ] = None,
    limit: o.Limit = None,
    max_new_tokens: o.OwnAnswerTokens = 128,
    answer_temperature: o.AnswerTemperature = None,
    answer_every: Annotated[int, typer.Option(help="Steps between own answers, which are then given anew.")] = 100,
    chat: o.Chat = None,
    window: Annotated[int | None, typer.Option(help="Longest piece of a document, in tokens; default: 256.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="kd: every token weighs the same. dedier, dedier_code, laplace, laplace_entropy, dedier_gate, "
            "dedier_permuted, dedier_mean: tokens are weighted by what an early readout of the student says. Switches "
            "stand behind a name: kd+temperature=1+fraction=0.5, dedier+alpha=1+normalise=mean."
        ),
    ] = "kd+temperature=1",
    objective: Annotated[
        str, typer.Option(help="forward-kl: the teacher's whole distribution; reverse-kl: its main mode.")
    ] = "forward-kl",
    layer: Annotated[
        int | None, typer.Option(help="Layer of the early readout; default: a sixth of the student's depth.")
    ] = None,
    readout: Annotated[
        str,
        typer.Option(
            help="head: the student's own head, through the lens of --exits if it has one there. lens: one that is "
            "taught each time, and does not change the student."
        ),
    ] = "head",
    fit: Annotated[str, typer.Option(help="What a lens is taught: labels, forward-kl or teacher-argmax.")] = "labels",
    target: Annotated[
        str | None,
        typer.Option(
            help="What a readout should say: the text's token, or the teacher's; default: text, with --prompts teacher."
        ),
    ] = None,
    weigh_every: Annotated[int, typer.Option(help="Steps between two readouts.")] = 100,
    exits: Annotated[
        str | None, typer.Option("--exits", metavar="FOLDER", help="Exits of the student, for --readout head.")
    ] = None,
    trainable: Annotated[
        str, typer.Option(help="all: every weight. lora: low-rank adapters, merged in the end.")
    ] = "all",
    precision: o.Precision = None,
    held_out: o.HeldOut = 0.1,
    report_to: o.ReportTo = None,
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/distill-STUDENT.")
    ] = None,
    json: o.JsonPath = None,
    **fields: Any,
) -> None:
    """Distil a language model from one with the same tokenizer: also offramp distill --task language-modelling.

    Printed are divergence from the teacher, agreement with it and cross-entropy to the text on held-out tokens, for
    each group of --group-column. Started again with the same options, an interrupted run goes on. `accelerate launch -m
    offramp distill …` divides each step among processes.
    """
    import offramp
    from offramp.hub.pretrained import process_device
    from offramp.lm.given import run_folder
    from offramp.training.answers import AnswerConfig

    columns = o.columns_of(text_column, text)
    if prompts is None:
        answered = ("max_new_tokens", "answer_temperature", "answer_every", "chat")
        o.refuse(context, answered, "only for the student's own answers; give --prompts, or leave it out")
    training = partial(TrainConfig, trainable=trainable, objective=objective, precision=precision, **fields)
    target = target or ("text" if prompts is None else "teacher")
    config = _settings(
        method, training, own=prompts is not None,
        readout={"layer": layer, "kind": readout, "fit": fit}, weights={"target": target, "every": weigh_every},
    )  # fmt: skip
    if config.weights is None:
        weighing = ("layer", "readout", "fit", "target", "weigh_every", "exits")
        o.refuse(context, weighing, f"only for methods that weigh tokens, as dedier, not for {method}; leave it out")
    if readout == "head":
        o.refuse(context, ("fit",), "only for --readout lens, which is taught; give that, or leave it out")
    else:
        o.refuse(context, ("exits",), "only for --readout head, which looks through them; give that, or leave it out")
    state, place = process_device(device)
    lm = offramp.load(student, dtype=dtype, device=place, exits=exits)
    if config.weights is not None and lm.exits is not None:
        _require_lens(lm.exits, config.weights.readout.at(lm.split))
    guide = offramp.load(teacher, dtype=dtype, device=place)
    folder = out or run_folder("distill", lm)
    answering = AnswerConfig(max_new_tokens, answer_temperature, chat=chat, seed=fields["seed"])
    with o.progress("distilling", answers="answering") as progress:
        result = offramp.distill(
            lm, guide, text or None, columns=columns, prompts=prompts, prompt_column=prompt_column,
            group_column=group_column, limit=limit, config=config, window=window, held_out=held_out,
            answering=answering, answer_every=answer_every, report_to=report_to, about={"command": o.command_line()},
            out=folder, progress=progress if state.is_main_process else None,
        )  # fmt: skip
    if not state.is_main_process:
        return
    o.say(result.table(), json)
    o.note(f"wrote {result.model}; train its exits with: offramp train {result.model}")
    o.note(f"pictures: offramp report {folder}")
    named = {"name": student, "teacher": teacher, "method": method, "dtype": o.dtype_of(lm)}
    o.write_result({**result.to_dict(), **named}, json)


def _require_lens(exits: Exits, layer: int) -> None:
    """Refuse exits that a readout after that layer does not look through."""
    if exits.lens(layer) is None:
        have = ", ".join(str(other) for other in exits.layers if exits.lens(other) is not None) or "none"
        raise typer.BadParameter(
            f"--exits: no lens is after layer {layer}, which is read (they are after {have}); give --layer, or leave "
            "--exits out"
        )


def _settings(
    method: str, training: Callable[..., TrainConfig], *, own: bool, readout: dict[str, Any], weights: dict[str, Any]
) -> TokenDistillation:
    """What a method's name means for tokens; of own answers the teacher is all there is to learn."""
    from offramp.distillation.language_models import TokenDistillation
    from offramp.distillation.methods import method as named
    from offramp.distillation.readout import ReadoutConfig, TokenReadoutConfig
    from offramp.distillation.token_weights import TokenWeights

    found = named(method)
    if found.loss != "kd" or found.errors is not None or found.balanced or found.refit:
        raise typer.BadParameter(
            f"--method {method} is for classifiers; language models learn by kd, dedier, laplace, …"
        )
    plain = found.weights is None or found.weights.readout == ReadoutConfig()
    if not plain or (found.learning_rate, found.weight_decay) != (None, None):
        raise typer.BadParameter(
            f"--method {method} sets depth, a readout or an optimiser of classifiers; for language models there are "
            "--layer, --readout, --fit, --learning-rate and --weight-decay"
        )
    fraction = 1.0 if own and "fraction" not in method else found.fraction
    if found.weights is None:
        return TokenDistillation(training(temperature=found.temperature), fraction)
    watched = TokenWeights(found.weights, TokenReadoutConfig(**readout), **weights)
    return TokenDistillation(training(temperature=found.temperature), fraction, watched)
