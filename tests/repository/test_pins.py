"""Versions: constraints.txt pins every package that pyproject.toml asks for, within its range; what is installed follows the pins."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from documents import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for texts in OPTIONAL.values() for text in texts)]]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LINES}


def test_every_line_of_the_constraints_is_one_exact_version() -> None:
    assert not [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert len(PINS) == len(LINES), "a package is pinned twice"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_direct_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pin)


def test_what_runs_here_is_what_is_pinned() -> None:
    """Not of another pinned version; packages that are not installed are not asked for."""
    wrong = {}
    for name, pin in PINS.items():
        try:
            if (found := version(name)) != pin:
                wrong[name] = (found, pin)
        except PackageNotFoundError:
            continue
    assert not wrong


def test_installs_that_the_makefile_and_the_image_do_follow_the_pins() -> None:
    lines = [line for name in ("Makefile", "docker/Dockerfile") for line in re.findall(r".*pip install .*", (ROOT / name).read_text())]
    assert len(lines) == 3
    assert not [line for line in lines if "--constraint constraints.txt" not in line and "--no-deps" not in line]


def test_no_dependency_comes_from_an_address() -> None:
    assert not [str(requirement) for requirement in REQUIREMENTS if requirement.url]
