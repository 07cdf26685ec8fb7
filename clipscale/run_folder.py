"""The run folder: claimed by one run at a time, and by one configuration for good.

```text
runs/NAME/
  config.yaml        resolved settings: a folder belongs to the run that wrote this first
  environment.json   versions, commit, device, ranks
  metrics.jsonl      what the seed determines; timings.jsonl what the machine does; events.jsonl what happened when
  checkpoints/       clipscale/checkpoints       save   asks for one, when somebody makes it
  heartbeats/, hangs/, lease.json      clipscale/watch
  evaluation.json    clipscale/evaluate.py         report.html   clipscale/report
```
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from clipscale.config import Run, to_yaml
from clipscale.credentials import redacted
from clipscale.errors import RunFolderError
from clipscale.watch.lease import Lease

_MAY_CHANGE = frozenset(
    {
        "folder",
        "checkpoints",
        "contrast",
        "data",
        "device",
        "engine",
        "evaluations",
        "guard",
        "logging",
        "max_bad_fraction",
        "memory_gb",
        "micro_batch",
        "timeout_s",
        "watch",
        "workers",
    }
)
"""Settings that change how a run is carried out, not what it computes (beyond rounding): a resume may change them."""
_TOWER = ("compile", "recompute")
"""The same of a tower."""
_DATA = ("sources", "bucket_batches")
"""Settings of a pair kind that a resume may change with data.allow_change."""
_PACKAGES = ("clipscale", "torch", "torchvision", "open_clip_torch", "transformers", "webdataset", "numpy", "pyarrow", "fsspec")


def check(run: Run, *, needed_bytes: int = 0) -> None:
    """Refuse a run folder that holds another run, cannot be written or has no room; writes nothing.

    Raises:
        RunFolderError: says what differs, or how many bytes are missing.
    """
    folder = run.run_folder
    config = folder / "config.yaml"
    if config.exists():
        check_same(run, config.read_text(encoding="utf-8"), where=str(folder))
    if not config.exists() and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty and holds no config.yaml: not a run folder; give the run another name or folder")
    place = _existing_parent(folder)
    try:
        tempfile.TemporaryFile(dir=place).close()  # leaves nothing, and knows of read-only disks what permissions do not tell
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error}") from None
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise RunFolderError(
            f"{folder}: the checkpoints need about {needed_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "make room, or lower checkpoints.keep_last, keep_best or raise keep_every"
        )


def check_same(run: Run, settings: str, *, where: str) -> None:
    """Refuse to go on from what another run left.

    Args:
        settings: that run's, as YAML.

    Raises:
        RunFolderError: says what differs.
    """
    before, now = (_fixed(yaml.safe_load(text), run.data.allow_change) for text in (settings, to_yaml(run)))
    if differs := _difference(before, now):
        raise RunFolderError(f"{where} holds another run:\n{differs}\ngive this one another name (name=...), or remove what is there")


def _existing_parent(folder: Path) -> Path:
    return next(place for place in [folder, *folder.absolute().parents] if place.exists())


def _fixed(settings: dict[str, Any], data_may_change: bool) -> dict[str, Any]:
    """Settings that no resume may change; how and where it runs may."""
    fixed = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
    fixed["towers"] = {tower: _without(own, _TOWER) for tower, own in fixed.get("towers", {}).items()}
    if data_may_change:
        fixed.pop("lanes", None)
        kinds = fixed.get("pair_kinds", {})
        fixed["pair_kinds"] = {kind: _without(own, _DATA) for kind, own in kinds.items()}
    return fixed


def _without(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What would make it another run."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "\n".join(f"  {line}" for name in names for line in _describe(name, old.get(name), new.get(name)))


def _describe(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in {**old, **new}
            if old.get(key) != new.get(key)
            for line in _describe(f"{path}.{key}", old.get(key), new.get(key))
        ]
    return [f"{path} is {old} there, {new} here"]


@contextmanager
def claim(run: Run) -> Iterator[None]:
    """Make the folder and hold it.

    Raises:
        RunFolderError: another process, of this machine or another, is writing this run.
    """
    folder = run.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RunFolderError(f"another process is writing {folder}; wait for it to end, or give this run another name") from None
    with lock:
        try:
            lease = Lease.take(folder)
            _write_whole(folder / "config.yaml", to_yaml(run))
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be written: {error}") from None
        try:
            yield
        finally:
            lease.give_back()


def write_environment(folder: Path, *, seed: int, device: str, world: int, command: list[str]) -> None:
    """Record versions, commit, device and ranks of the process that first starts the run."""
    record = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        **_commit(),
        "seed": seed,
        "device": device,
        "world": world,
        "command": [redacted(word) for word in command],
        "started": now(),
    }
    _write_whole(folder / "environment.json", json.dumps(record, indent=1))


def now() -> str:
    """The time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> dict[str, Any]:
    """The commit this code was checked out at, when it was."""
    place = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(place), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
