"""The locks hold what `pyproject.toml` asks for: the newest releases of its ranges, and the oldest."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = {"tested": "dev", "oldest": "contract"}


def needs(extra):
    """What an extra needs, those that it names and the library itself included."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for requirement in map(Requirement, EXTRAS[extra]):
        own = requirement.name == "offramp"
        found += [part for name in sorted(requirement.extras) for part in needs(name)] if own else [requirement]
    return found


def lock(name):
    """Requirements of a lock by package, each `==` one version."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for requirement in map(Requirement, (line for line in lines if line and not line.startswith("#"))):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.mark.parametrize("name", ["tested", "oldest"])
def test_a_lock_holds_all_that_is_asked_for(name):
    locked = lock(name)
    for requirement in needs(LOCKED[name]):
        if requirement.name == "torch":
            continue
        versions = locked[canonicalize_name(requirement.name)]
        assert len(versions) == 1, requirement.name
        assert versions[0] in requirement.specifier, f"{requirement}: run make lock"
    assert {"hatchling", "setuptools"} <= set(locked)  # builds are not isolated, so that they are locked, too
    assert not [version for versions in locked.values() for version in versions if version.local]


@pytest.mark.parametrize("name", ["tested", "oldest"])
def test_torch_is_the_makefiles_to_choose(name):
    assert not [package for package in lock(name) if re.match(r"torch$|triton|nvidia-|cuda-", package)]
    default = Requirement(
        re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    )
    asked = next(requirement for requirement in needs("dev") if requirement.name == "torch")
    (pin,) = default.specifier
    assert pin.version in asked.specifier
    assert Version(f"{pin.version}+cpu") in default.specifier  # builds for other devices are the same release


def test_the_oldest_are_the_lower_bounds():
    locked = lock("oldest")
    for requirement in needs("contract"):
        if requirement.name in ("torch", "ray"):
            continue
        lower = min(Version(each.version) for each in requirement.specifier if each.operator == ">=")
        (version,) = locked[canonicalize_name(requirement.name)]
        assert version.release[:2] == (lower.release + (0,))[:2], requirement  # the first of it that is not withdrawn


def test_transformers_is_bounded_by_what_is_tested():
    """The next release may change what `families/` uses; it is admitted once the contract has passed with it."""
    asked = next(requirement for requirement in needs("dev") if requirement.name == "transformers")
    (version,) = lock("tested")["transformers"]
    assert f"{version.major}.{version.minor + 1}" not in asked.specifier
