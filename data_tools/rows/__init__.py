"""Rows: what a data set is built from; one file per kind of input.

A kind of input says which files it recognises, what it takes for what (shown before any work starts), and reads rows in
an order that is the same every time. It reads no image and no recording: that is the shard jobs' work.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from clipscale.errors import ConfigError, DataError
from clipscale.settings import Part, find_part, part_names
from data_tools.media import Medium


@dataclass(frozen=True)
class Row:
    """One sample to be: where its media lie, or their bytes, its captions, and what else is known of it."""

    name: str
    """What to call it in messages: 'cats/1.jpg', 'captions.csv:12'."""
    image: Medium | None = None
    speech: Medium | None = None
    captions: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    """JSON values kept with the sample: label, intent, slots, speaker, transcript, licence, ..."""
    problem: str = ""
    """Why it cannot become a sample, as far as known already: 'reason: detail'; empty when nothing is wrong."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What the input's own columns hold, under their own names: for filters; not kept."""


class Rows(Part):
    """A kind of input."""

    folder: ClassVar[str] = "data_tools.rows"

    general: ClassVar[bool] = False
    """Whether this kind reads whatever no other kind recognises: it is asked last."""

    input: Path
    """The file or folder to read, or a pattern of file names."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether this is a file or folder, or a pattern of file names, of this kind."""

    @abstractmethod
    def guesses(self) -> list[str]:
        """What is taken for what, a line each, for the user to check.

        Raises:
            RequestError: the input is not what was asked for; nothing can be read.
        """

    @abstractmethod
    def read(self) -> Iterator[Row]:
        """Every row, in the same order every time.

        Raises:
            RequestError: as `guesses`, or the input is damaged further down.
        """


def rows_kind(path: Path) -> str:
    """The name of the kind of rows that recognises `path`.

    Raises:
        DataError: there is no such file or folder, or nothing recognises it.
    """
    kinds = {name: find_part(Rows, name) for name in part_names(Rows.folder)}  # type: ignore[type-abstract]
    for name in sorted(kinds, key=lambda name: kinds[name].general):
        if kinds[name].recognises(path):
            return name
    if not path.exists():
        raise DataError(f"input {path}: there is no such file or folder")
    raise DataError(
        f"input {path}: not an input that can be read; give a folder of images or recordings, a .csv, .tsv, .jsonl or .parquet "
        f"file, a .json file in COCO format, a data set that Hugging Face saved, a speech corpus, or webdataset tars"
    )


def open_rows(path: Path, *, kind: str | None = None, **options: Any) -> Rows:
    """The rows of `path`; `options` are settings of its kind, of which None and () mean not given.

    Raises:
        ConfigError: an option that this kind of input does not have, or a kind that does not exist.
        DataError: as `rows_kind`.
    """
    kind = kind or rows_kind(path)
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "." in kind:
        importlib.invalidate_caches()
    try:
        return Rows.model_validate({"name": kind, "input": path, **given})
    except ValidationError as error:
        raise ConfigError(f"input {path}, read as '{kind}': " + "; ".join(_complaint(line) for line in error.errors())) from None


def _complaint(line: Mapping[str, Any]) -> str:
    option = ".".join(str(part) for part in line["loc"])
    return f"{option}: {line['msg']}" if option else str(line["msg"])
