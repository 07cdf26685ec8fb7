"""Starting a command is quick: neither torch nor anything of its size is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "transformers", "open_clip", "pyarrow", "sklearn", "pandas")


def heavy_after(program: str) -> set[str]:
    """Which heavy packages a fresh interpreter has imported after running a program."""
    told = f"{program}\nimport sys; print('\\nLOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("module", ["clipscale", "clipscale.cli", "data_tools", "data_tools.cli"])
def test_importing_a_command_line_imports_no_torch(module: str) -> None:
    assert not heavy_after(f"import {module}")


@pytest.mark.parametrize(
    ("module", "arguments"), [("clipscale", []), ("clipscale", ["train"]), ("data_tools", []), ("data_tools", ["build"])], ids=str
)
def test_help_is_shown_without_torch(module: str, arguments: list[str]) -> None:
    program = (
        f"import sys\nfrom {module}.cli import main\nsys.argv = ['it', *{arguments!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nelse:\n    raise AssertionError"
    )
    assert not heavy_after(program)


def test_a_heavy_import_would_be_seen() -> None:
    assert heavy_after("import pyarrow") >= {"pyarrow"}


@pytest.mark.parametrize("module", ["clipscale", "data_tools"])
def test_commands_also_run_as_modules(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], text=True, capture_output=True, check=False)
    assert (done.returncode, "Usage" in done.stdout) == (0, True), done.stderr
