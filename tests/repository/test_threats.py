"""Every line of the threat model names tests, and they exist."""

from __future__ import annotations

import re

from documents import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("### Threat model")[2].partition("\n### ")[0]
LINES = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")][1:]


def test_every_threat_has_what_stands_against_it_and_tests() -> None:
    assert len(LINES) >= 12
    assert not [cells[0] for cells in LINES if len(cells) != 3 or not cells[1].strip() or not re.search(r"\.py::test_\w+", cells[2])]


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", PAGE)
    assert len(named) > 20
    assert not [(file, name) for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
