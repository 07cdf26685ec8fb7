"""Fluent Speech Commands: data/train_data.csv and its kin; 248 phrasings of 31 intents (Lugosch et al. 2019, arXiv:1904.03670).

The caption is the transcription. An intent is the corpus's own triple, `activate_lights_kitchen`, with the three as `slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from data_tools.rows._columns import Columns
from data_tools.rows._tables import TableRows, column_names

_SLOTS = ("action", "object", "location")


class FluentSpeechCommands(TableRows):
    """A table of Fluent Speech Commands; its recordings are named from the folder above it."""

    known_columns: ClassVar[Columns | None] = Columns(None, "path", ("transcription",), None, None, "speakerId", _SLOTS)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return {"path", "speakerId", "transcription", *_SLOTS} <= column_names(path)

    def guesses(self) -> list[str]:
        return [*super().guesses(), "intent: action, object and location together, for instance activate_lights_kitchen"]

    def record(self, values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
        record = super().record(values, columns)
        return {**record, "intent": "_".join(str(values.get(slot) or "none") for slot in _SLOTS)}
