"""Hugging Face: a data set that `save_to_disk` wrote, with its splits; read with pyarrow alone.

`DATASET/state.json data-00000-of-00001.arrow`, or a folder like that for each split beside a `dataset_dict.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from clipscale.errors import DataError
from data_tools.cells import ArrowCell, mapped_table
from data_tools.media import changed_ns
from data_tools.rows._arrow import ArrowRows, holds_bytes, label_names, plain_values

_ROWS = 1_024


class HuggingFace(ArrowRows):
    """A saved data set, in the order of its rows."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_dir() and ((path / "dataset_dict.json").is_file() or _is_dataset(path))

    def guesses(self) -> list[str]:
        tables = [self._table(path) for path in self._files()]
        return [
            f"files: {len(tables):,} with {sum(table.num_rows for table in tables):,} rows",
            *(f"{kind}: in the cells of column {name}" for name, kind in self.media_in_cells().items()),
            *super().guesses(),
        ]

    def table_schema(self) -> pyarrow.Schema:
        return self._table(self._files()[0]).schema

    def first_bytes(self, column: str) -> bytes | None:
        for value in self._table(self._files()[0]).column(column)[:8].to_pylist():
            data = value.get("bytes") if isinstance(value, dict) else value
            if data:
                return bytes(data[:16])
        return None

    def lines(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        number = 0
        for path in self._files():
            table = self._table(path)
            cells = [field.name for field in table.schema if holds_bytes(field.type) and not _all_paths(table.column(field.name))]
            names, rest = label_names(table.schema), table.drop_columns(cells)
            row = 0
            for batch in rest.to_batches(_ROWS) if rest.num_columns else ():
                for values in plain_values(batch, names):
                    plain = {
                        name: value["path"] if isinstance(value, dict) and "path" in value else value for name, value in values.items()
                    }
                    number += 1
                    yield number, {**plain, **{name: ArrowCell(path, row, name, table.num_rows) for name in cells}}
                    row += 1

    def _files(self) -> list[Path]:
        splits = self._splits()
        chosen = self.chosen_split([name for name in splits if name])
        files = [path for name, folder in splits.items() if chosen in (None, name) for path in _data_files(folder)]
        missing = [path for path in files if not path.is_file()]
        if missing or not files:
            raise DataError(f"input {self.input}: " + (f"{missing[0]} is not there" if missing else "it lists no data files"))
        return files

    def _splits(self) -> dict[str, Path]:
        """The folder of each split; under no name when there are none."""
        listed = self.input / "dataset_dict.json"
        if not listed.is_file():
            return {"": self.input}
        try:
            return {str(name): self.input / str(name) for name in json.loads(listed.read_text("utf-8"))["splits"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"input {self.input}: dataset_dict.json does not list the splits ({error!r})") from error

    def _table(self, path: Path) -> pyarrow.Table:
        try:
            return mapped_table(path, changed_ns(path))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"input {self.input}: {path.name} cannot be read as arrow: {error}") from error


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and any(folder.glob("*.arrow"))


def _data_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return [folder / item["filename"] for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"input {folder}: its state.json does not list the data files ({error!r})") from error


def _all_paths(column: pyarrow.ChunkedArray) -> bool:
    """Whether a column of `{bytes, path}` holds no bytes at all."""
    if not pyarrow.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
        return False
    return all(pyarrow.compute.struct_field(chunk, "bytes").null_count == len(chunk) for chunk in column.chunks)
