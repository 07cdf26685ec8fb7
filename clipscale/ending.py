"""How a run ended: a small JSON file for whatever started it, because torchrun keeps no exit code of its ranks.

Rank 0 leaves ended.json in the run folder, and the first rank of every node leaves the same where CLIPSCALE_ENDED says (launcher.py
sets it). Both are removed when a run starts: no file means that it goes on, or was killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

PLACE = "CLIPSCALE_ENDED"
"""The environment variable that names a node's own file."""


@dataclass(frozen=True)
class Ending:
    """How a run ended, and where."""

    how: Literal["finished", "stopped", "failed"]
    """`stopped`: behind a checkpoint; the same command goes on."""
    step: int | None = None
    signal: int | None = None
    """The signal that stopped it; None when `--stop-after` did."""
    error: str | None = None
    """Why it failed."""

    @property
    def exit_code(self) -> int:
        """0 finished or stopped as asked, 1 failed, 128 + n stopped by signal n."""
        if self.how == "failed":
            return 1
        return 0 if self.signal is None else 128 + self.signal


class EndingFiles(AbstractContextManager["EndingFiles"]):
    """Leaves an ending in every file; without one told it is the exception that ended the run."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._ending: Ending | None = None
        for file in files:
            file.unlink(missing_ok=True)

    def tell(self, ending: Ending) -> None:
        """What the files will say."""
        self._ending = ending

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ending = self._ending or Ending("failed", error=f"{type(error).__name__}: {error}")
        text = json.dumps({**asdict(ending), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1)
        for file in self._files:
            aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
            try:
                aside.write_text(text, encoding="utf-8")
                aside.replace(file)
            except OSError as problem:  # a full disk, which has been told already where it ended the run
                print(f"clipscale: {file} could not be written: {problem}", file=sys.stderr)
                aside.unlink(missing_ok=True)


def places(run_folder: Path, *, rank: int, local_rank: int) -> list[Path]:
    """The files that this rank writes."""
    own = os.environ.get(PLACE)
    files = [run_folder / "ended.json"] if rank == 0 else []
    return [*files, Path(own)] if own and local_rank == 0 else files


def read(file: Path) -> Ending | None:
    """What a file says, or None if there is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Ending(**{name: value for name, value in record.items() if name != "time"})
