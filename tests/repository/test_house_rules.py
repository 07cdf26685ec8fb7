"""The repository's text: nothing of one machine, nothing unfinished, names that say something, and every module introduces itself."""

from __future__ import annotations

import ast
import re
from pathlib import PurePosixPath

import pytest
from documents import ROOT, tracked

# Written so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:work|tmp|home|root|mnt)/[\w.]",
    "a package registry's address": r"pypi\.|pythonhosted|(?:extra-)?index-url|https?://[\w.:-]+/simple\b",
    "something left to do": r"\b(?:T[O]DO|F[I]XME|X[X]X|H[A]CK)\b",
}
SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}


def texts() -> dict[str, str]:
    """Every tracked text file but this one."""
    own = "tests/repository/test_house_rules.py"
    found = {}
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if name != own and b"\0" not in data:
            found[name] = data.decode("utf-8")
    return found


def offences(pattern: str, files: dict[str, str]) -> list[str]:
    """Where a pattern occurs: file, line and what was found."""
    found = []
    for name, text in files.items():
        found += [f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in re.finditer(pattern, text)]
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    assert not offences(FORBIDDEN[what], texts())


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path of one machine", "open('/t" + "mp/x')"),
        ("a path of one machine", "cd /wo" + "rk/main"),
        ("a package registry's address", "--index-" + "url https://x/simple"),
        ("something left to do", "# TO" + "DO: later"),
    ],
)
def test_offences_would_be_seen(what: str, text: str) -> None:
    assert offences(FORBIDDEN[what], {"a.py": text})


def test_no_file_or_folder_is_named_after_nothing() -> None:
    assert not [name for name in tracked() if SAY_NOTHING & {PurePosixPath(part).stem for part in PurePosixPath(name).parts}]


def test_every_module_says_what_it_is() -> None:
    mute = [name for name, text in texts().items() if name.endswith(".py") and not ast.get_docstring(ast.parse(text))]
    assert not mute


def test_every_first_line_is_a_sentence_of_its_own() -> None:
    """It also stands in docs/architecture.md."""
    packages = [name for name in tracked() if name.endswith(".py") and name.startswith(("clipscale/", "data_tools/"))]
    firsts = {name: (ast.get_docstring(ast.parse((ROOT / name).read_text())) or "").partition("\n")[0] for name in packages}
    assert not {name: first for name, first in firsts.items() if not first.endswith((".", "?", ":"))}


def test_every_document_begins_with_a_title() -> None:
    untitled = [name for name, text in texts().items() if name.endswith(".md") and not text.startswith("# ")]
    assert untitled in ([], ["tests/contracts/towers/README.md"])
