"""Execute the notebooks of examples/ and save them with what they give.

    python tools/notebooks.py                                # all of them
    python tools/notebooks.py examples/fair_distillation.ipynb

Each runs in an empty folder of its own. What is saved names no folder of this machine and no time of its execution: a
notebook is refused, and left as it was, where a cell fails, warns or does so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 1200
"""Most of one cell, on a busy machine."""
NO_WIDGETS = "IProgress not found"
"""What tqdm says where ipywidgets are not installed, which no bar here needs."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with new outputs; an error of a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["TQDM_DISABLE"] = "1"  # bars end with times
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=SECONDS,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
        private = (folder, str(Path.home()) + os.sep, str(EXAMPLES.parent))
        return plain(notebook, private)


def plain(notebook: nbformat.NotebookNode, private: tuple[str, ...]) -> nbformat.NotebookNode:
    """The same without what differs from run to run and from machine to machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if NO_WIDGETS not in output.get("text", "")]
        for output in cell.get("outputs", ()):
            output.pop("transient", None)
            said = str(output)
            if output.output_type == "stream" and output.name == "stderr":
                raise ValueError(f"cell {number} writes to standard error: {output.text.strip()[:200]}")
            if found := next((part for part in private if part in said), None):
                raise ValueError(f"cell {number} shows {found}, a folder of this machine")
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    """Those that are named, else all."""
    for path in map(Path, sys.argv[1:] or sorted(map(str, EXAMPLES.glob("*.ipynb")))):
        notebook = executed(path)
        fresh = path.with_suffix(".ipynb.new")
        nbformat.write(notebook, fresh)
        fresh.replace(path)
        print(f"executed {path}")


if __name__ == "__main__":
    main()
