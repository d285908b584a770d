"""Options that several commands share, and the exit policy made of them."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from offramp.core.engine import Engines
from offramp.runs.progress import progress as progress  # for commands, which have all of this module as `o`

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy
    from offramp.tasks import Task

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Packaged name (smollm2), local folder, .gguf file or hub id.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format of the weights: float32, bfloat16, float16, float64, auto (as they were saved); "
        "where --engine native can run, also int8 and int4."
    ),
]
Engine = Annotated[
    Engines,
    typer.Option(
        help="What generates: torch; native, kernels of our own on the CPU, compiled on first use; cuda, captured "
        "graphs on a CUDA GPU; or auto, native on a CPU where it can run, else torch."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, …; default: the first CUDA GPU if there is one, else cpu.")
]


def _writable(path: Path | None) -> Path | None:
    """The path, if it can be written: it is better known before long work than behind it."""
    from offramp.runs.files import require_writable

    if path is not None and str(path) != "-":
        try:
            require_writable(path)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return path


JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="PATH", help="Write everything as one JSON object; - is standard output.", callback=_writable
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Put prompts into the model's chat template; default: if it has one."),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens generated per prompt.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="One prompt per line, or JSON objects with prompt; default: bundled."
    ),
]
Confidence = Annotated[
    str | None,
    typer.Option(
        help="softmax, max, entropy, state, classifier (trained with the exits), contrastive, jsd, laplace, conformal, "
        "avcs (fitted by calibrate --posterior), or static (always leave after --min-layer)."
    ),
]
Threshold = Annotated[float | None, typer.Option(help="Leave when the confidence is above this; 1: never.")]
MinLayer = Annotated[
    int | None,
    typer.Option(
        help="First layer after which a token may leave; default: half the depth. 0: the exits' drafter proposes "
        "tokens (with --skipped verify)."
    ),
]
Vocabulary = Annotated[
    str | None,
    typer.Option(
        help="Prune the readout: fixed, decaying or adaptive, after the first test; frequent: the exits' frequent "
        "tokens from the first one on; frequent-fixed, …: both. Default: all tokens."
    ),
]
VocabularySize = Annotated[int | None, typer.Option(help="Tokens kept after the first test.")]
DRAFTING = "--skipped verify --min-layer 0 --vocabulary frequent --confidence static --draft-length 2"
"""`offramp.core.policy.DRAFTS` on the command line."""
Skipped = Annotated[
    str | None,
    typer.Option(help="Keys and values of skipped layers: propagate (approximate), defer (exact), verify (lossless)."),
]
Draft = Annotated[
    str | None,
    typer.Option(help="Under --skipped verify: fixed (by threshold) or adaptive (while one more is likely to pay)."),
]
DraftLength = Annotated[
    int | None, typer.Option(help="Under --skipped verify: most tokens drafted before a check; default: 8.")
]
Accept = Annotated[
    float | None,
    typer.Option(
        help="Under --skipped verify: a draft also stands that is the full model's second choice with this share of "
        "the first one's probability; default: 1, the full model's text."
    ),
]
Adaptive = Annotated[
    bool | None,
    typer.Option(
        "--adaptive",
        help="Let the threshold follow the deep layers' judgement (FREE); needs --skipped defer, one exit.",
    ),
]
PromptLayer = Annotated[
    int | None,
    typer.Option(
        help="Layers that all of the prompt goes through (approximate; its last token goes on); default: all."
    ),
]
Exits = Annotated[
    str | None,
    typer.Option(
        "--exits",
        metavar="FOLDER",
        help="Read out through exits trained for this model: a folder, a hub id, or bundled (come with offramp).",
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="Policy saved as JSON; the options above override it.")
]


# of the commands that answer examples of a task
AnswerTokens = Annotated[int | None, typer.Option(help="Longest answer; default: the task's.")]
Longest = Annotated[
    int | None, typer.Option(help="Cut examples so that prompt and answer have at most this many tokens.")
]
AnsweredTogether = Annotated[int, typer.Option(help="Examples answered together.")]


# of the commands that train language models
TrainingText = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Train on this text: .json (a list of objects), .jsonl, or plain text, one document per file; may be "
        "given several times.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Use only the first of the texts, prompts or examples.")]
TextColumn = Annotated[
    list[str] | None, typer.Option(help="Column (key of JSON objects) of the text, several are joined; default: text.")
]
OwnAnswerTokens = Annotated[int, typer.Option(help="Longest own answer, in tokens.")]
AnswerTemperature = Annotated[
    float | None, typer.Option(help="Sample own answers at this temperature; default: greedy.")
]


def number_format(name: str | None) -> str | None:
    """The trainers' name of a number format, which is a --dtype's."""
    return {"bfloat16": "bf16", "float32": None}.get(name, name) if name is not None else None


Precision = Annotated[
    str | None,
    typer.Option(
        callback=number_format,
        help="bfloat16: compute in it, faster where the processor can, keep weights as loaded; default: as loaded.",
    ),
]
HeldOut = Annotated[float, typer.Option(help="Share of the documents to judge by, never trained on.")]
ReportTo = Annotated[
    str | None, typer.Option(help="Tracker to log to as well: tensorboard, wandb, … (what accelerate knows).")
]

Languages = Annotated[str | None, typer.Option(help="Source and target of a translation; default: English,German.")]


def task_named(name: str, languages: str | None = None) -> Task:
    """A task by its name, for two languages."""
    from dataclasses import replace

    from offramp.tasks import TASKS
    from offramp.values import listed

    if name not in TASKS:
        raise typer.BadParameter(f"--task {name}: choose one of {listed(name, TASKS)}")
    if languages is None:
        return TASKS[name]
    if name != "translation":
        raise typer.BadParameter(f"--languages {languages}: --task {name} has one language, its data's; leave it out")
    source, _, target = languages.partition(",")
    if not source or not target:
        raise typer.BadParameter(f"--languages {languages}: give two, such as English,German")
    return replace(TASKS[name], languages=(source.strip(), target.strip()))


def numbers(text: str | None, option: str, kind: type, *, none: bool = False) -> tuple[Any, ...] | None:
    """Numbers with commas between them; None of None, and with `none` no numbers of that word."""
    if text is None:
        return None
    if none and text == "none":
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: give numbers with commas between them, such as 15,20,25") from None


def columns_of(columns: list[str] | None, text: Sequence[Path] | None) -> list[str]:
    """The columns of texts, which there must be."""
    from offramp.tasks.rows import kind

    if columns and not any(kind(path) in (".json", ".jsonl") for path in text or ()):
        raise typer.BadParameter("--text-column is of --text in .json or .jsonl; give such, or leave it out")
    return columns or ["text"]


def refuse(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raise a usage error if any of these options was given, rather than leave it aside."""
    given = [f"--{name.replace('_', '-')}" for name in names if _is_given(context, name)]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def policy_from(file: Path | None, **options: Any) -> ExitPolicy | None:
    """The policy of a file and of options that are not None; None if there is neither."""
    from offramp.core.policy import ExitPolicy

    given = {name: value for name, value in options.items() if value is not None}
    if file is None and not given:
        return None
    base = ExitPolicy.load(file).to_dict() if file is not None else {}
    policy = ExitPolicy.from_dict({**base, **given})
    if policy.confidence == "static" and "threshold" in given:
        raise ValueError(
            f"threshold is {policy.threshold}, but a static policy tests nothing: it leaves after layer "
            f"{policy.min_layer}; leave --threshold out, or give another --confidence"
        )
    if policy.skipped != "verify" and "draft_length" in given:
        raise ValueError(
            f"draft_length is {policy.draft_length}, but nothing is drafted with skipped {policy.skipped!r}; add "
            "--skipped verify, or leave --draft-length out"
        )
    return policy


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def policies_of(files: Sequence[str | Path] | None, taken: Collection[str] = ()) -> dict[str, ExitPolicy]:
    """Policies by the names of their files, no two alike, nor one of those that are taken."""
    from offramp.core.policy import ExitPolicy

    found: dict[str, ExitPolicy] = {}
    for file in map(Path, files or ()):
        if file.stem in found or file.stem in taken:
            raise typer.BadParameter(f"--policy {file}: there is another arm {file.stem!r}; rename the file")
        found[file.stem] = ExitPolicy.load(file)
    return found


def standard_input(what: str) -> str:
    """All of standard input, which is to hold `what`, without the last line end; a ValueError if it is empty."""
    from offramp.runs.bounded import decoded, whole

    if sys.stdin.isatty():
        note(f"reading {what} from standard input, end it with Ctrl-D")
    text = decoded(whole(sys.stdin.buffer, "standard input"), "standard input")
    if not text.strip():
        raise ValueError(f"standard input is empty; give {what} there, or as an argument")
    return text.removesuffix("\n")


def write_result(values: dict[str, Any], path: Path | None) -> None:
    """Write a command's JSON where `--json` says."""
    import json

    from offramp.runs.files import write_json

    if path is None:
        return
    if str(path) == "-":
        sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        write_json(path, values)
        note(f"wrote {path}")


def dtype_of(lm: LanguageModel) -> str:
    """What the weights are in, for the record: `--dtype auto` is settled by the model's files."""
    return str(lm.model.dtype).removeprefix("torch.")


def command_line() -> str:
    """The command as it was given, for the record of a run."""
    return shlex.join(["offramp", *sys.argv[1:]])


def say(text: str, json: Path | None = None) -> None:
    """A result on standard output, unless JSON goes there; its tables fit the terminal, or COLUMNS, but in a file."""
    from offramp.runs.tables import fitted

    if str(json) == "-":
        return
    narrow = "COLUMNS" in os.environ or sys.stdout.isatty()
    typer.echo(fitted(text, shutil.get_terminal_size().columns if narrow else None))


def next_steps(steps: Mapping[str, Sequence[str | None]]) -> None:
    """What to do with a result, on standard error: commands by what they are for; parts that are None are left out."""
    for purpose, words in steps.items():
        note(f"{purpose}: {shlex.join(['offramp', *(word for word in words if word is not None)])}")


def note(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


Command = TypeVar("Command", bound=Callable[..., None])


def options_of(
    kind: type, only: Collection[str] = (), *, but: Collection[str] = (), before: str
) -> Callable[[Command], Command]:
    """Give a command, which takes them as its last, `**fields`, an option for each field of a dataclass.

    Args:
        kind: The dataclass; its docstring has `Attributes:`.
        only: Fields; empty: all.
        but: Fields that are left out, since the command has options of its own for them.
        before: The command's parameter that they stand before in its help.

    Returns:
        A decorator, which changes what the command's signature says.
    """
    hints, told = get_type_hints(kind), field_docs(kind)
    made = [
        Parameter(
            field.name, Parameter.POSITIONAL_OR_KEYWORD, default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(*_names(field), help=told[field.name])],
        )
        for field in dataclasses.fields(kind) if field.name in (only or hints) and field.name not in but
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        place = [parameter.name for parameter in own].index(before)
        parameters = [*own[:place], *made, *own[place:]]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _names(field: dataclasses.Field[Any]) -> list[str]:
    """What is off by default is a flag without an opposite; all else is called as the field."""
    return [f"--{field.name.replace('_', '-')}"] if field.default is False else []


def field_docs(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field, in words of the command line: None is a default there."""
    section = inspect.getdoc(kind).partition("Attributes:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    found: dict[str, str] = {}
    for name, words in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
        plain = re.sub(r'["`]', "", " ".join(words.split()))
        found[name] = plain.replace(". None: ", ". Default: ").replace("None: ", "default: ")
    return found
