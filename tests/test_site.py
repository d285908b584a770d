"""The documentation's site builds, and every page of it is to be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import offramp

ROOT = Path(__file__).parent.parent


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme's, about the future of mkdocs
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert all(f"offramp.{name}" in page or f".{name}" in page for name in offramp.__all__)
    assert "fonts.googleapis" not in (tmp_path / "index.html").read_text()


def test_the_reference_has_every_public_name():
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    asked = {line.rsplit(".", 1)[-1] for line in lines if line.startswith(":::")}
    assert asked == set(offramp.__all__)
