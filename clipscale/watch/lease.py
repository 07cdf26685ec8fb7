"""Lease: one run folder is written by one run at a time, also where the folder is seen by several machines.

On one machine a lock of the kernel decides (run_folder.py). Across machines locks of shared disks cannot be relied on; there the writer
counts in a file, and whoever finds the count growing leaves the folder alone. No machine's clock is compared with another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from clipscale.errors import RunFolderError
from clipscale.watch.heartbeat import write_whole

COUNT_EVERY_S = 5.0
WAIT_S = 30.0
"""How long a count must stand still before another machine's lease is taken over: disks shared over a network show changes late."""


class Lease:
    """Held from `take` to `give_back`; a thread counts."""

    def __init__(self, path: Path, *, count_every_s: float) -> None:
        self._path, self._every_s = path, count_every_s
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_counting, name="lease", daemon=True)

    @classmethod
    def take(cls, folder: Path, *, count_every_s: float = COUNT_EVERY_S, wait_s: float = WAIT_S) -> Lease:
        """Take a run folder's lease; the caller holds its lock, so that no other process of this machine does.

        Raises:
            RunFolderError: another machine is writing this run; names it.
        """
        path = folder / "lease.json"
        found = _read(path)
        if found is not None and found.get("host") != socket.gethostname():
            _wait_until_still(path, found, wait_s=wait_s)
        lease = cls(path, count_every_s=count_every_s)
        lease._write()
        lease._thread.start()
        return lease

    def give_back(self) -> None:
        """The run is over."""
        self._over.set()
        self._thread.join()
        if self._is_own():
            self._path.unlink(missing_ok=True)

    def _keep_counting(self) -> None:
        while not self._over.wait(self._every_s):
            if not self._is_own():
                print(f"clipscale: {_taken(self._path, _read(self._path) or {})}; this run ends", file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):  # a full disk is the loop's to tell
                self._write()

    def _is_own(self) -> bool:
        """Whether the file is this run's, or at least nobody else's."""
        found = _read(self._path)
        return found is None or found.get("id") == self._own["id"]

    def _write(self) -> None:
        self._count += 1
        write_whole(self._path, {**self._own, "count": self._count})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def _wait_until_still(path: Path, found: dict[str, Any], *, wait_s: float) -> None:
    print(f"clipscale: {path.parent} was written by {found.get('host')}; looking for {wait_s:.0f} s whether it still is", file=sys.stderr)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, wait_s / 10))
        now = _read(path)
        if now is None:
            return
        if now != found:
            raise RunFolderError(f"{_taken(path, now)}; wait for it to end, or give this run another name")


def _taken(path: Path, holder: dict[str, Any]) -> str:
    return f"{path.parent} is being written by process {holder.get('pid')} on {holder.get('host')}"
