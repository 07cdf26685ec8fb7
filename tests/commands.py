"""The command `clipscale` in the process of a test: importing torch anew each time would take seconds."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from clipscale.cli import main


def clipscale(*arguments: str | Path) -> tuple[int, str]:
    """The command's exit code, and all that it printed."""
    said, status = io.StringIO(), 0
    argv, sys.argv = sys.argv, ["clipscale", *map(str, arguments)]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = argv
    return status, said.getvalue()
