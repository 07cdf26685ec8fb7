"""Requests: somebody wants a checkpoint now, by a file called `save` in the run folder."""

from __future__ import annotations

from pathlib import Path

NAME = "save"


class Requests:
    """What the run has been asked. Only rank 0 looks for the file."""

    def __init__(self, run_folder: Path, *, watches_file: bool) -> None:
        self._file = run_folder / NAME if watches_file else None

    def pending(self) -> bool:
        """Whether a checkpoint is wanted."""
        return self._file is not None and self._file.exists()

    def met(self) -> None:
        """A checkpoint is being taken: what was asked before now is done.

        Raises:
            OSError: the file cannot be removed.
        """
        if self._file is not None:
            self._file.unlink(missing_ok=True)
