"""`offramp calibrate --posterior`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import options as o

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
Draws = Annotated[int, typer.Option(help="Draws of the posterior of laplace.")]
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
    dtype: str, device: str | None, out: Path | None, json: Path | None, draws: int, evidence: float, seed: int,
    candidates: int, alpha: float, vocabulary: str | None, vocabulary_size: int | None, to_text: bool,
) -> None:  # fmt: skip
    """Fit, write the exits with the posterior, and say how good it is."""
    import offramp
    from offramp.calibration import PosteriorConfig
    from offramp.lm.given import run_folder
    from offramp.training.answers import AnswerConfig
    from offramp.uncertainty.candidates import LaplaceConfig

    methods = tuple(dict.fromkeys(o.names(names)))
    config = PosteriorConfig(
        methods, candidates, alpha, LaplaceConfig(draws, seed, evidence), vocabulary, vocabulary_size, to_text,
        o.numbers(layers, "--layers", int), seed,
    )  # fmt: skip
    what = None if task == "text" else o.task_named(task, languages)
    given: dict[str, Any] = {"texts": Path(data)} if what is None else {"task": what, "data": data, "target": target}
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits)
    folder = out or run_folder("posterior", lm, task)
    with o.progress("fitting", answers="answering") as progress:
        report = offramp.fit_posterior(
            lm, **given, own_answers=own_answers and what is not None, limit=limit, config=config, window=longest,
            answering=None if max_new_tokens is None else AnswerConfig(max_new_tokens, seed=seed),
            about={"command": o.command_line()}, out=folder, progress=progress,
        )  # fmt: skip
    if str(json) != "-":
        o.say(report.table())
    pruned = "" if vocabulary is None else f" --vocabulary {vocabulary}"
    pruned += "" if vocabulary_size is None else f" --vocabulary-size {vocabulary_size}"
    usage = f"offramp generate {model} --exits {folder / 'exits'} --confidence {methods[0]}{pruned}"
    o.note(f"wrote {folder / 'exits'}; use them with: {usage}")
    o.write_result(report.to_dict(), json)
