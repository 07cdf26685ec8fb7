"""Outcomes on disk: the rows behind every figure of an evaluation, in one parquet file beside evaluation.json."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipscale.errors import RunFolderError
from clipscale.evaluators._evaluation import Evaluation, Outcomes

FILE = "outcomes.parquet"
_NAMES = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    [(name, _NAMES) for name in ("evaluation", "figure", "by", "modality", "source")]
    + [("value", pa.float64()), *((name, _NAMES) for name in ("cluster", "key", "truth", "answer"))]
)


def outcomes_file(results: Mapping[str, Evaluation]) -> bytes:
    """The file's bytes; the same for the same results."""
    tables = [
        _table(name, figure.name, figure.outcomes) for name, result in results.items() for figure in result.figures if figure.outcomes
    ]
    file = io.BytesIO()
    pq.write_table(pa.concat_tables(tables or [_SCHEMA.empty_table()]).unify_dictionaries(), file, compression="zstd")
    return file.getvalue()


def read_outcomes(folder: Path) -> dict[tuple[str, str], Outcomes]:
    """What `outcomes_file` wrote, by evaluation and figure.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        table = pq.read_table(folder / FILE, use_threads=False, pre_buffer=False)  # threads: see docs/decisions.md, 2026-11-23
        columns = {name: table.column(name).to_pylist() for name in _SCHEMA.names}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunFolderError(f"{folder / FILE}, the rows behind an evaluation, cannot be read: {error}; evaluate again") from error
    places: dict[tuple[str, str], list[int]] = {}
    for row, place in enumerate(zip(columns["evaluation"], columns["figure"], strict=True)):
        places.setdefault(place, []).append(row)
    return {place: _outcomes(columns, rows) for place, rows in places.items()}


def _table(evaluation: str, figure: str, outcomes: Outcomes) -> pa.Table:
    size = len(outcomes.values)
    constants = (evaluation, figure, outcomes.by, outcomes.modality, outcomes.source)
    columns = [[constant] * size for constant in constants]
    own = [outcomes.values, outcomes.clusters, outcomes.keys, outcomes.truths, outcomes.answers]
    arrays = [pa.array(values, type=field.type) for values, field in zip([*columns, *own], _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _outcomes(columns: Mapping[str, list[Any]], rows: list[int]) -> Outcomes:
    chosen = {name: [columns[name][row] for row in rows] for name in ("value", "cluster", "key", "truth", "answer")}
    constant = {name: columns[name][rows[0]] for name in ("by", "modality", "source")}
    return Outcomes(
        values=chosen["value"], clusters=chosen["cluster"], keys=chosen["key"], truths=chosen["truth"], answers=chosen["answer"], **constant
    )
