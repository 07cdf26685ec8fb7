"""Where a run's numbers go: JSON lines always; TensorBoard and Weights & Biases when asked.

`metrics.jsonl` holds what the seed determines (loss, learning rate, temperature, ...) and is the same file every time;
`timings.jsonl` holds what the machine determines; `events.jsonl` what happened when. One JSON object a line, one line a
step; a resumed run first cuts off the lines written after its checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from clipscale.errors import MissingPackage, RunError
from clipscale.settings import Settings


class Logging(Settings):
    """Where numbers go besides the run folder's JSON lines, and how often the terminal shows them."""

    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline keeps it in the run folder)."""
    print_every_steps: int = Field(default=50, gt=0)
    """A line of progress at every n-th step when the output is no terminal."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one device can compute at most in the run's precision, 10¹² FLOPs a second, dense: the measure of `mfu`. None: as its maker
    publishes it, for the GPUs of clipscale/throughput/devices.py; for others there is no `mfu`."""


class JsonLines:
    """An append-only file of JSON objects; every line is whole on disk or will be cut off."""

    def __init__(self, path: Path, *, keep_through_step: int) -> None:
        self.path = path
        _cut_off(path, keep_through_step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; unbuffered, so that a killed process loses nothing it wrote.

        Raises:
            RunError: the disk takes it not at all, or in part.
        """
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}; make room and run the same command again") from error

    def close(self) -> None:
        """Synchronise with the disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSON-lines file; a last line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = [line for line in lines[:-1] if line]
    return [json.loads(line) for line in whole]


def _cut_off(path: Path, keep_through_step: int) -> None:
    """Drop lines of later steps, and a half-written last line, by writing the rest beside and renaming."""
    if not path.exists():
        return
    kept = [record for record in read_json_lines(path) if record.get("step", 0) <= keep_through_step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    aside.replace(path)


class Logger(Protocol):
    """Something that takes a step's numbers."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record named numbers of one step."""

    def close(self) -> None:
        """Write out what is buffered."""


class TensorBoard:
    """Scalars into TensorBoard event files."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record named numbers of one step."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """Scalars to a Weights & Biases run that continues under the same id when training resumes."""

    def __init__(self, project: str, *, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, id=name, dir=str(folder), config=dict(settings), resume="allow")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record named numbers of one step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._run.finish()


def check_packages(logging: Logging) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        MissingPackage: with the line that installs it.
    """
    wanted = {"tensorboard": logging.tensorboard, "wandb": logging.wandb_project is not None}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise MissingPackage(f"logging asks for {package}, which is not installed: pip install {package}")


def open_loggers(logging: Logging, *, name: str, folder: Path, settings: Mapping[str, Any], first_step: int) -> list[Logger]:
    """The loggers asked for, besides JSON lines."""
    loggers: list[Logger] = []
    if logging.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", first_step=first_step))
    if logging.wandb_project is not None:
        loggers.append(WeightsAndBiases(logging.wandb_project, name=name, folder=folder, settings=settings))
    return loggers


def flatten(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Nested numbers as one level, with slashed names; everything that is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix=f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat
