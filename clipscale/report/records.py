"""What a run folder holds, read for the report: curves, events, configuration and evaluations.

A run may still be going on, or have been killed: a last line that is cut short, and files that are not there, are fine.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from clipscale.errors import RunFolderError
from clipscale.evaluators import Evaluation

Place = tuple[str, ...]
"""The keys that lead to a number in a line of JSON."""


@dataclass(frozen=True)
class Curve:
    """A number over steps; steps rise."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        """The curve without values that are infinite or not numbers."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class RunRecords:
    """Everything the report shows of one run folder; what is missing is empty."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: dict[Place, Curve] = field(default_factory=dict)
    """By where a line holds the number: `("loss",)`, `("kinds", "image_text", "scale")`, ..."""
    timings: dict[Place, Curve] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        """The run's name, else its folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def trained(self) -> bool:
        """Whether this is a training run, be it one that has not taken a step yet, and not an evaluation alone."""
        return bool(self.config or self.metrics)

    @property
    def kinds(self) -> list[str]:
        """Pair kinds, in the configuration's order."""
        measured = [place[1] for place in self.metrics if place[0] == "kinds" and len(place) > 2]
        return list(dict.fromkeys([*self.config.get("pair_kinds", {}), *measured]))

    @property
    def last_step(self) -> int:
        """The last step with a metrics line; 0 when there is none."""
        return max((int(curve.steps[-1]) for curve in self.metrics.values() if len(curve)), default=0)


def read_run(folder: Path) -> RunRecords:
    """Read a run folder.

    Raises:
        RunFolderError: the folder is missing, holds neither a run nor an evaluation, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise RunFolderError(f"report of {folder}: there is no such folder; give the folder of a run, as in runs/demo")
    known = ("config.yaml", "metrics.jsonl", "evaluation.json")
    if not any((folder / name).is_file() for name in known):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise RunFolderError(f"report of {folder}: it holds neither a run nor an evaluation ({', '.join(known)}); it holds {found}")
    try:
        return _read_files(folder)
    except OSError as error:
        raise RunFolderError(f"report of {folder}: {error.filename} cannot be read: {error.strerror}") from None


def _read_files(folder: Path) -> RunRecords:
    warnings: list[str] = []
    return RunRecords(
        folder=folder,
        config=_read_mapping(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        metrics=_read_curves(folder / "metrics.jsonl", warnings),
        timings=_read_curves(folder / "timings.jsonl", warnings),
        events=list(_read_lines(folder / "events.jsonl", warnings)),
        evaluations=_read_evaluations(folder / "evaluation.json"),
        warnings=warnings,
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds one mapping; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_constant=_refuse) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; restore it, or remove it to have a report without it") from None
    if not isinstance(values, dict):
        raise RunFolderError(f"{path} should hold a mapping, it holds {type(values).__name__}; remove it to have a report without it")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _read_evaluations(path: Path) -> dict[str, Evaluation]:
    values = _read_mapping(path)
    try:
        return {name: Evaluation.from_json(evaluation) for name, evaluation in values.items()}
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path} does not hold evaluations as clipscale writes them: {error!r}; evaluate again") from None


def _read_lines(path: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, one at a time; lines that are none are left out, and told of unless they are the last."""
    if not path.is_file():
        return
    damaged: list[int] = []
    last = 0
    with path.open("rb") as file:
        for last, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            elif line.strip():
                damaged.append(last)
    inside = [str(line) for line in damaged if line != last]
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        warnings.append(f"{path.name}: left out what could not be read: line {', '.join(inside[:5])}{more}")


def _read_curves(path: Path, warnings: list[str]) -> dict[Place, Curve]:
    """Every number in a JSON-lines file as a curve over `step`; of a step that was taken twice the later line holds."""
    columns: dict[Place, tuple[array[int], array[float]]] = {}
    for record in _read_lines(path, warnings):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        for place, value in _numbers(record, ()):
            column = columns.get(place)
            if column is None:
                column = columns[place] = (array("q"), array("d"))
            column[0].append(step)
            column[1].append(value)
    return {place: _rising(np.array(steps, np.int64), np.array(values, np.float64)) for place, (steps, values) in columns.items()}


def _numbers(record: Mapping[str, Any], place: Place) -> Iterator[tuple[Place, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*place, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*place, key), value


def _rising(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Curve:
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last_of_each = np.append(steps[1:] != steps[:-1], True)
    return Curve(steps[last_of_each], values[last_of_each])
