"""One vocabulary of options over all commands: one name for one thing, earlier names, and misspelt ones."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from offramp import __version__
from offramp.cli import EARLIER, app
from offramp.cli.options import field_docs
from offramp.training.config import TrainConfig

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
EARLIER_BY_COMMAND = {
    "distill": ["--engine"],
    "probe": ["--count"],
    "train": ["--count", "--field"],
    "bench": ["--count"],
    "train-classifier": ["--count"],
    "calibrate": ["--thresholds", "--min-layers", "--vocabulary-sizes"],
    "calibrate-classifier": ["--n-mc"],
    "evaluate-classifier": ["--n-mc"],
    "distill-language-model": ["--count", "--field", "--prompt-field", "--group-field"],
}


def options(command):
    return {name for parameter in COMMANDS[command].params for name in parameter.opts}


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_has_a_name_of_its_own_for_what_others_call_otherwise(command):
    assert not options(command) & (set(EARLIER) - {"--engine"})  # that of `distill` was another thing


@pytest.mark.parametrize(("command", "old"), [(c, old) for c, names in EARLIER_BY_COMMAND.items() for old in names])
def test_what_options_were_called_still_works_and_is_not_spoken_of(command, old):
    new = EARLIER[old]
    assert new in options(command)
    _, _, rest = GROUP.resolve_command(None, [command, "x", old, "1", f"{old}=2", "--", old])
    assert rest == ["x", new, "1", f"{new}=2", "--", old]
    assert f"{old} " not in run(command, "--help").output


@pytest.mark.parametrize("arguments", [["-h"], ["generate", "-h"], ["train", "-h", "--task", "text-classification"]])
def test_short_help(arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


def test_options_of_a_config_are_its_fields():
    """By name, default and docs; `train` has two in words of its own, since they are given otherwise."""
    docs, fields = field_docs(TrainConfig), {field.name: field for field in dataclasses.fields(TrainConfig)}
    assert set(docs) == set(fields)
    made = {parameter.name: parameter for parameter in COMMANDS["train"].params if parameter.name in fields}
    assert set(made) == set(fields)
    for name in set(fields) - {"layers", "precision"}:
        assert (made[name].default, made[name].help) == (fields[name].default, docs[name])
    assert docs["rank"] == "Rank of each exit's matrix; default: full; 0: none, which lora and all default to."
    assert docs["curriculum"].endswith("half of the training (lora or all). Default: all exits at every step.")
    assert not any(sign in text for text in docs.values() for sign in '"`')


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"offramp {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat", "smollm2"], "generate"),
        (["generate", "smollm2", "--treshold", "1"], "--threshold"),
        (["evaluate", "smollm2", "--task", "sumarisation", "--data", "x"], "did you mean 'summarisation'?"),
        (["distill", "--data", "stand-in:digits-on-colour", "--method", "dedierr"], "dedier"),
    ],
)
def test_misspelt_names_and_values_get_a_suggestion(arguments, words):
    result = run(*arguments)
    assert result.exit_code != 0
    assert words in (result.output + str(result.exception or ""))


@pytest.mark.parametrize(("given", "taken"), [("bfloat16", "bf16"), ("bf16", "bf16"), ("float32", None), (None, None)])
@pytest.mark.parametrize("command", ["train", "train-classifier", "distill-language-model"])
def test_number_formats_have_one_name(command, given, taken):
    (parameter,) = (p for p in COMMANDS[command].params if p.name == "precision")
    assert parameter.process_value(typer.Context(COMMANDS[command]), given) == taken
