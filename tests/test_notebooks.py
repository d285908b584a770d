"""The notebooks of examples/: code that uses public names, saved with what it gives; the quickest is run again."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import offramp

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
DEEP = {"offramp.report.grids"}
"""Modules below a room that notebooks take names from, since no verb gives the tables of a grid of students."""
PRIVATE = re.compile(r"/(home|root|tmp|work|usr|Users|var)/|[A-Z]:\\\\")


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return json.loads((ROOT / "examples" / request.param).read_text())


def code(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_there_are_notebooks():
    assert {"first_five_minutes.ipynb", "certify_your_own_task.ipynb", "fair_distillation.ipynb"} <= set(NOTEBOOKS)


def test_code_is_python_that_uses_public_names(notebook):
    for node in ast.walk(ast.parse("\n".join(code(notebook)))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "offramp":
            assert node.module.count(".") < 2 or node.module in DEEP
            for name in node.names:
                assert not name.name.startswith("_")
                assert hasattr(importlib.import_module(node.module), name.name)
        elif isinstance(node, ast.Import):
            assert {name.name for name in node.names} <= {"offramp", *sys.stdlib_module_names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "offramp":
            assert node.attr in offramp.__all__


def test_outputs_are_there_and_no_errors(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs(notebook)) >= len(cells) / 2
    for output in outputs(notebook):
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        assert "text/plain" in data or not data  # what is a picture or a table is also there in words
        assert not PRIVATE.search(json.dumps(output))


def test_what_is_saved_is_the_same_from_run_to_run(notebook):
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{n}" for n in range(1, len(notebook["cells"]) + 1)]
    assert not any(cell["metadata"] for cell in notebook["cells"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own packages
def test_the_first_one_runs():
    pytest.importorskip("nbclient")
    sys.path.insert(0, str(ROOT / "tools"))
    import notebooks

    again = notebooks.executed(ROOT / "examples" / "first_five_minutes.ipynb")
    assert code(again) == code(json.loads((ROOT / "examples" / "first_five_minutes.ipynb").read_text()))
    assert len(outputs(again)) >= 8
