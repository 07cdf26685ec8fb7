"""Parquet: a file, or a folder of files of one schema; images and recordings are cells, or files that a column names.

Only the columns beside the media are read while planning; a shard's job reads its own cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from clipscale.errors import DataError
from data_tools.cells import ParquetCell
from data_tools.rows._arrow import ArrowRows, holds_bytes, label_names, plain_values, split_of
from data_tools.rows._media import is_image, is_speech, is_tar, visible_files

_ROWS = 1_024
_CALLED = {"image": "images", "speech": "recordings"}


class Parquet(ArrowRows):
    """Parquet files, in the order of their names."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.is_dir():
            head = [file.name for _, file in zip(range(200), visible_files(path), strict=False)]
            return any(map(_is_parquet, head)) and not any(is_tar(name) or is_image(name) or is_speech(name) for name in head)
        return _is_parquet(path.name) and (path.is_file() or has_magic(str(path)))

    def guesses(self) -> list[str]:
        files, rows = self._files(), 0
        for path in files:
            with self._open(path) as file:
                if not file.schema_arrow.equals(self.table_schema()):
                    raise DataError(
                        f"input {self.input}: {path.name} has other columns than {files[0].name}; build from one kind at a time"
                    )
                rows += file.metadata.num_rows
        cells = self.media_in_cells()
        left_out = [field.name for field in self.table_schema() if holds_bytes(field.type) and field.name not in cells]
        return [
            f"files: {len(files):,} with {rows:,} rows",
            *(f"{_CALLED[kind]}: in the cells of column {name}" for name, kind in cells.items()),
            *([f"not read: column {', '.join(left_out)}, bytes that are neither images nor recordings"] if left_out else []),
            *super().guesses(),
        ]

    def table_schema(self) -> pyarrow.Schema:
        with self._open(self._files()[0]) as file:
            return file.schema_arrow

    def first_bytes(self, column: str) -> bytes | None:
        for path in self._files()[:3]:
            with self._open(path) as file:
                for group in range(min(file.num_row_groups, 3)):
                    batch = next(file.iter_batches(8, row_groups=[group], columns=[column], use_threads=False), None)
                    for value in batch.column(0).to_pylist() if batch else []:
                        data = value.get("bytes") if isinstance(value, dict) else value
                        if data:
                            return bytes(data[:16])
        return None

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        number, schema = 0, self.table_schema()
        for path in self._files():
            with self._open(path) as file:
                cells = [field.name for field in schema if holds_bytes(field.type) and not _all_paths(file.metadata, field.name)]
                columns = [field.name for field in schema if field.name not in cells]
                for group in range(file.num_row_groups):
                    for row, values in enumerate(self._values(file, group, columns)):
                        number += 1
                        rows = file.metadata.num_rows
                        yield number, {**values, **{name: ParquetCell(path, group, row, name, rows) for name in cells}}

    def _values(self, file: pyarrow.parquet.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        names = label_names(file.schema_arrow)
        if not columns:
            yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
            return
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
            yield from plain_values(batch, names)

    def _files(self) -> list[Path]:
        if self.input.is_dir():
            files = [path for path in visible_files(self.input) if _is_parquet(path.name)]
        elif self.input.exists():
            files = [self.input]
        else:
            files = [Path(name) for name in sorted(glob(str(self.input), recursive=True))]  # noqa: PTH207 (absolute patterns)
        if not files:
            raise DataError(f"input {self.input}: there are no parquet files")
        splits = {path: split_of(path) for path in files}
        chosen = self.chosen_split(list(dict.fromkeys(name for name in splits.values() if name)))
        return [path for path in files if chosen is None or splits[path] == chosen]

    def _open(self, path: Path) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"input {self.input}: {path.name} cannot be read as parquet: {error}") from error


def _is_parquet(name: str) -> bool:
    return name.lower().endswith((".parquet", ".pq"))


def _all_paths(metadata: pyarrow.parquet.FileMetaData, column: str) -> bool:
    """Whether a column of `{bytes, path}` holds no bytes at all, by the file's statistics."""
    chunks = [metadata.row_group(group).column(place) for group in range(metadata.num_row_groups) for place in range(metadata.num_columns)]
    of_bytes = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{column}.bytes"]
    return bool(of_bytes) and all(found is not None and found.has_null_count and found.num_values == 0 for found in of_bytes)
