"""Common Voice: a release's train.tsv, validated.tsv, ...; its recordings lie in `clips` beside it.

The caption is the sentence; `speaker` is the client's id, `lang` the locale; age, gender, accents and votes are kept.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.rows._columns import Columns
from data_tools.rows._tables import TableRows, column_names


class CommonVoice(TableRows):
    """A tsv of Common Voice; quotes in it are part of the sentences."""

    quoting: ClassVar[Literal[0, 3]] = csv.QUOTE_NONE
    known_columns: ClassVar[Columns | None] = Columns(None, "path", ("sentence",), None, None, "client_id", ())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.suffix.lower() == ".tsv" and {"client_id", "path", "sentence"} <= column_names(path)

    def record(self, values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
        record = super().record(values, columns)
        if record.get("locale"):
            record["lang"] = record.pop("locale")
        return record
