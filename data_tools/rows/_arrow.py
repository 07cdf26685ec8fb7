"""Rows of arrow tables, in parquet or on disk: which columns are media, and what the others hold, as JSON values.

Hugging Face's features are read from the schema: Image and Audio say what a column is, ClassLabel gives numbers names.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from clipscale.errors import ConfigError, DataError
from clipscale.settings import did_you_mean
from data_tools.rows._columns import ColumnRows

_FEATURES = {"Image": "image", "Audio": "speech"}
_BEGINNINGS = {
    "image": (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"),
    "speech": (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"FORM", b".snd"),
}


class ArrowRows(ColumnRows):
    """Rows of one or more arrow tables of one schema."""

    split: str | None = None
    """The split to read, where there are several; 'all' reads them together."""

    @abstractmethod
    def table_schema(self) -> pyarrow.Schema:
        """Of all tables."""

    @abstractmethod
    def first_bytes(self, column: str) -> bytes | None:
        """The first of a column's media that are bytes."""

    def media_in_cells(self) -> dict[str, str]:
        features = hugging_face_features(self.table_schema())
        kinds: dict[str, str] = {}
        for field in self.table_schema():
            if holds_bytes(field.type):
                kind = _FEATURES.get(str(features.get(field.name, {}).get("_type"))) or _kind_of(self.first_bytes(field.name))
                kinds |= {field.name: kind} if kind else {}
        return kinds

    def chosen_split(self, splits: Sequence[str]) -> str | None:
        """The split to read; None for all of them.

        Raises:
            ConfigError: there is none of that name.
            DataError: there are several, and none was said.
        """
        return choose_split(self.input, self.split, splits)


def choose_split(path: Path, asked: str | None, splits: Sequence[str]) -> str | None:
    """The split to read; None for all of them. See `ArrowRows.chosen_split`."""
    listed = ", ".join(splits)
    if asked is None and len(splits) > 1:
        raise DataError(f"input {path}: it has the splits {listed}; say which with --split, or --split all")
    if asked in (None, "all"):
        return None
    if asked not in splits:
        has = f"it has {listed}" if splits else "it has no splits"
        raise ConfigError(f"--split {asked}: input {path} has no such split{did_you_mean(str(asked), splits)}; {has}")
    return asked


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether cells of this type may be media: bytes, or a struct with bytes in it."""
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_bytes(kind.field(index).type)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def hugging_face_features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """The features that Hugging Face noted in a schema, by column; empty when there are none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)} if isinstance(features, dict) else {}


def label_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """What the numbers of ClassLabel columns mean."""
    features = hugging_face_features(schema)
    return {
        name: list(feature["names"]) for name, feature in features.items() if feature.get("_type") == "ClassLabel" and "names" in feature
    }


def plain_values(batch: pyarrow.RecordBatch, names: dict[str, list[str]]) -> Iterable[dict[str, Any]]:
    """The rows of a batch as JSON values; numbers of classes become their names."""
    for values in batch.to_pylist():
        plain = {name: _plain(value) for name, value in values.items()}
        for column, labels in names.items():
            number = plain.get(column)
            if isinstance(number, int) and 0 <= number < len(labels):
                plain[column] = labels[number]
        yield plain


def split_of(path: Path) -> str | None:
    """The split that Hugging Face's file names tell: train-00000-of-00007.parquet."""
    found = re.fullmatch(r"(.+?)-\d{4,}(-of-\d{4,})?(-[0-9a-f]+)?", path.stem)
    return found[1] if found else None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # JSON has neither nan nor inf
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["path"]  # Hugging Face's Image and Audio, where no bytes are stored
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, bytes) else str(value)


def _kind_of(data: bytes | None) -> str | None:
    if data is None:
        return None
    if data[:4] == b"RIFF":
        return "speech" if data[8:12] == b"WAVE" else "image"
    return next((kind for kind, beginnings in _BEGINNINGS.items() if data.startswith(beginnings)), None)
