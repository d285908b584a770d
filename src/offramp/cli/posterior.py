"""`offramp calibrate --posterior`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o
from offramp.cli.training_data import documents_of

if TYPE_CHECKING:
    from offramp.calibration import PosteriorConfig

Posterior = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Instead of a policy, fit what these confidences need to the exits: some of laplace,conformal,avcs; of "
        "--task text as well, for plain texts. Writes exits; options from --alpha to --layers belong to it.",
    ),
]
Alpha = Annotated[float, typer.Option(help="Share of tokens whose sets may miss the true one.")]
Candidates = Annotated[int, typer.Option(help="Most probable tokens that are uncertain, or in a set.")]
Draws = Annotated[int, typer.Option(help="Of the posterior of laplace.")]
Evidence = Annotated[
    float, typer.Option(help="What laplace multiplies the number of tokens with: texts are dependent.")
]
ToText = Annotated[
    bool, typer.Option("--to-text", help="True tokens are the text's own; default: those of the full model.")
]
OwnAnswers = Annotated[
    bool, typer.Option("--own-answers", help="Fit on the model's own answers, not on the references of --data.")
]
Layers = Annotated[
    str | None, typer.Option(help="Exits to fit, such as 15,20,25; default: those of --exits, or chosen by the depth.")
]


def fit_posterior(
    model: str, names: str, *, task: str, data: str, target: Path | None, languages: str | None, own_answers: bool,
    limit: int | None, max_new_tokens: int | None, longest: int | None, exits: str | None, layers: str | None,
    dtype: str, device: str | None, out: Path | None, json: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Fit, write the exits with the posterior, and say how good it is."""
    import offramp
    from offramp.calibration import PosteriorConfig
    from offramp.calibration import fit_posterior as run
    from offramp.core.exits import Exits
    from offramp.training.answers import AnswerConfig

    chosen = o.numbers(layers, "--layers", int)
    config = _config(PosteriorConfig, names, {**options, "layers": chosen})
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits)
    if lm.exits is None:
        lm.attach_exits(Exits.fresh(lm.split, chosen, rank=0))
    folder = out or Path("runs") / f"posterior-{Path(model).name}-{task}"
    window, plain = longest or min(512, lm.split.max_positions or 512), task == "text"
    documents = documents_of(
        lm, texts=([Path(data)] if plain else [], ["text"]), task=None if plain else task,
        data=None if plain else [data], target=target, languages=languages,
        own_answers=not plain and (own_answers or task == "prompts"), prompts=None, count=limit,
        answering=AnswerConfig(max_new_tokens=max_new_tokens or _room(task, languages), seed=config.seed),
        window=window, folder=folder,
    )  # fmt: skip
    about = {"data": data, "task": task, "own_answers": own_answers, "limit": limit, "command": o.command_line()}
    with o.progress("fitting") as progress:
        report = run(lm, documents, folder, config, window=window, about=about, progress=progress)
    if str(json) != "-":
        o.say(report.table())
    pruned = "" if config.vocabulary is None else f" --vocabulary {config.vocabulary}"
    pruned += "" if config.vocabulary_size is None else f" --vocabulary-size {config.vocabulary_size}"
    usage = f"offramp generate {model} --exits {folder / 'exits'} --confidence {config.methods[0]}{pruned}"
    o.note(f"wrote {folder / 'exits'}; use them with: {usage}")
    o.write_result(report.to_dict(), json)


def _config(kind: type[PosteriorConfig], names: str, options: dict[str, Any]) -> PosteriorConfig:
    from offramp.uncertainty.candidates import LaplaceConfig

    draws, evidence = options.pop("draws"), options.pop("evidence")
    methods = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    return kind(methods=methods, laplace=LaplaceConfig(draws=draws, evidence=evidence, seed=options["seed"]), **options)


def _room(task: str, languages: str | None) -> int:
    return 64 if task == "text" else o.task_named(task, languages).max_new_tokens
