"""Evaluate: put a checkpoint to every question of its configuration and write down what came back.

`evaluation.json` holds one `Evaluation` (clipscale/evaluators) by the name it has in the configuration, `evaluation.csv` one line a
figure, and `outcomes.parquet` one row for every row that a figure is the mean of. None holds a time, so the same checkpoint and
data give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipscale import checkpoints
from clipscale.config import Run, merge, read_layers, read_yaml, validate
from clipscale.errors import ConfigError, DataError, RequestError, RunFolderError
from clipscale.evaluators import Evaluation, Evaluator
from clipscale.evaluators._outcomes import outcomes_file
from clipscale.foreign import foreign_format, open_foreign
from clipscale.inputs import Modality
from clipscale.parallel.failures import raised_together
from clipscale.run_model import build_model
from clipscale.settings import Settings

if TYPE_CHECKING:
    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh

_COLUMNS = ("evaluation", "kind", "figure", "value", "n", "hits", "low", "high", "interval", "chance", "unit")


class Evaluations(Settings):
    """What is asked of a model that brings no settings of its own."""

    evaluations: dict[str, Evaluator] = {}
    """Evaluations by a name of your own."""


def check(evaluators: Mapping[str, Evaluator], modalities: Sequence[Modality]) -> None:
    """Everything that can be known to be wrong before a sample is read.

    Raises:
        RequestError: no evaluator, one that needs a tower the model lacks, or data that is not there; all of them in one message.
    """
    if not evaluators:
        raise ConfigError("nothing to evaluate: `evaluations` is empty; add one to the run's settings, or give a file with some")
    problems = []
    for name, evaluator in evaluators.items():
        missing = sorted(evaluator.modalities() - set(modalities))
        if missing:
            problems.append(f"evaluations.{name} needs a tower for {' and '.join(missing)}; the model encodes {', '.join(modalities)}")
        try:
            evaluator.check()
        except DataError as error:
            problems.append(f"evaluations.{name}: {error}")
    if problems:
        raise DataError("\n".join(problems))


def evaluate(
    evaluators: Mapping[str, Evaluator], model: Encoders, mesh: Mesh, *, folder: Path, provenance: Mapping[str, Any]
) -> dict[str, Evaluation]:
    """Run every evaluator on all ranks, and write evaluation.json and evaluation.csv into `folder`.

    Args:
        provenance: What is known of the model (checkpoint, step, hash); goes into every evaluation.

    Raises:
        RequestError: what `check` refuses, or records that lack a field; nothing is written.
        RunError: a sample cannot be read, or an embedding is not finite; nothing is written.
    """
    with raised_together(mesh):
        check(evaluators, model.modalities)
        _check_writable(folder)
    results: dict[str, Evaluation] = {}
    for name, evaluator in evaluators.items():
        result = evaluator.evaluate(model, mesh)
        results[name] = replace(result, name=name, provenance={**provenance, **result.provenance})
        if mesh.is_main:
            print(_headline(name, result), file=sys.stderr, flush=True)
    with raised_together(mesh):
        if mesh.is_main:
            write(folder, results)
    return results


def _headline(name: str, result: Evaluation) -> str:
    figure = result.figures[0]
    return f"{name}: {figure.name} {figure.value:.3f} ({figure.low:.3f}–{figure.high:.3f}), n {figure.n:,}"


def evaluate_checkpoint(
    address: str | Path,
    mesh: Mesh,
    *,
    files: Sequence[Path],
    overrides: Sequence[str],
    output: Path | None,
    average: bool = False,
    architecture: str | None = None,
) -> Path:
    """Evaluate a run's newest whole checkpoint, one checkpoint folder, or a model of open_clip's or transformers'.

    Returns the folder that was written into.

    Args:
        address: of either, here or in a store.
        files: Layers over the run's own settings, as `overrides` are; their `evaluations` replace the run's.
        output: Where to write; None: the run folder, which must be here.
        average: Take the weights' moving average, not the weights.
        architecture: open_clip's name for a file of weights that does not tell it.

    Raises:
        RequestError: there is no such checkpoint, or the evaluations cannot be served.
        RunError: as `evaluate`.
    """
    if foreign_format(address) is not None:
        return _evaluate_foreign(address, mesh, files=files, overrides=overrides, output=output, architecture=architecture)
    with checkpoints.Opening() as opening:
        with raised_together(mesh):
            _check_output(address, output)
            found = opening.find(address) if mesh.is_main else ""
        place = mesh.gather_objects(found)[0]  # rank 0's answer: training may be writing the next one
        with raised_together(mesh):
            saved = opening.load(place)
            run = _settings(saved.folder / "config.yaml", files, overrides)
            check(run.evaluations, list(run.towers))
            model = build_model(run)
            checkpoints.load_weights(model, saved.averaged() if average else saved.tensors["model"])
    provenance = {"checkpoint": saved.folder.name, "checkpoint_sha256": saved.sha256, "step": saved.step}
    if average:
        provenance["weights"] = "average"
    written = output or saved.folder.parent.parent
    evaluate(run.evaluations, model.to(mesh.device), mesh, folder=written, provenance=provenance)
    return written


def _evaluate_foreign(
    address: str | Path, mesh: Mesh, *, files: Sequence[Path], overrides: Sequence[str], output: Path | None, architecture: str | None
) -> Path:
    with raised_together(mesh):
        if output is None:
            raise RunFolderError(f"{address} belongs to no run, into whose folder the figures could go; give --output FOLDER")
        asked = validate(Evaluations, read_layers(files, overrides))
        opened = open_foreign(address, architecture=architecture)
        check(asked.evaluations, opened.model.modalities)
    evaluate(asked.evaluations, opened.model.to(mesh.device), mesh, folder=output, provenance=opened.provenance)
    return output


def write(folder: Path, results: Mapping[str, Evaluation]) -> None:
    """Write evaluation.json, evaluation.csv and outcomes.parquet; each stands under its name only when it is whole on disk.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(_COLUMNS)
    for name, result in results.items():
        for figure in result.figures:
            values = asdict(figure)
            lines.writerow([name, result.kind, figure.name, *(values[column] for column in _COLUMNS[3:])])
    text = json.dumps({name: result.to_json() for name, result in results.items()}, indent=1, ensure_ascii=False) + "\n"
    files = {"outcomes.parquet": outcomes_file(results), "evaluation.csv": table.getvalue().encode(), "evaluation.json": text.encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _write_whole(folder / name, data)
    except OSError as error:
        raise RunFolderError(f"the evaluation cannot be written into {folder}: {error}") from error


def _write_whole(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _check_writable(folder: Path) -> None:
    """Before minutes of work, not after."""
    place = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise RunFolderError(f"the evaluation cannot be written into {folder}: {place} is no writable folder")


def _check_output(address: str | Path, output: Path | None) -> None:
    if output is None and checkpoints.is_remote(address):
        raise RequestError(f"{address} lies in a store, and the evaluation is written here: say where by --output FOLDER")


def _settings(saved: Path, files: Sequence[Path], overrides: Sequence[str]) -> Run:
    """The run's settings with layers over them; evaluations that the files name are evaluated instead of the run's."""
    own, layers = read_yaml(saved), read_layers(files)
    if "evaluations" in layers:
        own["evaluations"] = {}
    return validate(Run, merge(merge(own, layers), read_layers([], overrides)))
