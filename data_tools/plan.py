"""The plan: which row goes into which shard, written down as parquet before any shard is.

Shard i is row group i of the plan, so any process can build any shard alone, and no process holds more than one shard's
rows. Each shard's fingerprint says what it must hold: the rows, the sizes of their files, and the packing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_tools.cells import ArrowCell, ParquetCell
from data_tools.media import Address, Medium, MediumState, StoredMedium, TarMember, medium_state
from data_tools.packing import Packing, code
from data_tools.rows import Row

_KINDS: dict[str, type[StoredMedium]] = {kind.__name__: kind for kind in (TarMember, ParquetCell, ArrowCell, Address)}
_PLAN = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("image", pyarrow.string()),  # JSON: where it lies
        ("image_bytes", pyarrow.binary()),  # or what it is
        ("speech", pyarrow.string()),
        ("speech_bytes", pyarrow.binary()),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("record", pyarrow.string()),  # JSON
        ("problem", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    path: Path
    shard_rows: list[int]
    """Rows of each shard."""
    fingerprints: list[str]
    """Of each shard; the same wherever and whenever the input was copied."""
    image_bytes: int
    """Of all image files: what a data set that keeps them as they are will need at least."""
    dates: str
    """Fingerprint of when the files were changed last."""
    known_failures: dict[str, int]
    """Rows that cannot become samples, as far as known without reading media, by reason."""
    first_failure: str
    """The first of them."""
    addresses: int = 0
    """Media that must be fetched."""

    def most_bad(self, asked: float | None) -> float:
        """The share of rows that may fail: as asked, else 0.01, and any share where media must be fetched."""
        return (1.0 if self.addresses else 0.01) if asked is None else asked

    @property
    def fingerprint(self) -> str:
        """Of the whole data set."""
        return hashlib.sha256("\n".join(self.fingerprints).encode()).hexdigest()


def write_plan(path: Path, rows: Iterable[Row], packing: Packing) -> Plan:
    """Write the plan of `rows`; memory holds one shard's rows at a time."""
    shard_rows, fingerprints, image_bytes, dates = list[int](), list[str](), 0, hashlib.sha256()
    failures, first, addresses = Counter[str](), "", 0
    salt = f"{code()} {packing.model_dump_json()}".encode()
    source = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, _PLAN, compression="zstd", write_statistics=False) as writer:
        while shard := list(islice(source, packing.samples_per_shard)):
            digest = hashlib.sha256(salt)
            columns: list[tuple[Any, ...]] = []
            for row in shard:
                image, speech = medium_state(row.image), medium_state(row.speech)
                values = _values(row)
                digest.update(_identity(values, image, speech))
                image_bytes += image.size
                addresses += isinstance(row.image, Address) + isinstance(row.speech, Address)
                dates.update(b"%d %d " % (image.changed, speech.changed))
                columns.append(values)
                if row.problem or image.missing or speech.missing:
                    missing = row.image if image.missing else row.speech
                    problem = row.problem or f"missing file: {missing!s}"
                    failures[problem.partition(": ")[0]] += 1
                    first = first or _clean(f"{row.name}: {problem}")
            fingerprints.append(digest.hexdigest())
            arrays = [pyarrow.array(column, kind.type) for column, kind in zip(zip(*columns, strict=True), _PLAN, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=_PLAN), row_group_size=len(shard))
            shard_rows.append(len(shard))
        plan = Plan(path, shard_rows, fingerprints, image_bytes, dates.hexdigest(), dict(failures), first, addresses)
        writer.add_key_value_metadata({"plan": json.dumps({item.name: getattr(plan, item.name) for item in fields(plan)[1:]})})
    return plan


def load_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        OSError: it is not there, or no plan.
    """
    try:
        metadata = pyarrow.parquet.read_metadata(path).metadata
        return Plan(path, **json.loads(metadata[b"plan"]))
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise OSError(f"{path} is not a whole plan: {error}") from error


def read_plan(path: Path, shard: int) -> Iterator[Row]:
    """The rows of one shard."""
    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read_row_group(shard, use_threads=False)
    for batch in table.to_batches(max_chunksize=256):
        for values in batch.to_pylist():
            yield Row(
                values["name"],
                _medium(values["image"], values["image_bytes"]),
                _medium(values["speech"], values["speech_bytes"]),
                tuple(values["captions"]),
                json.loads(values["record"]),
                values["problem"],
            )


def _values(row: Row) -> tuple[Any, ...]:
    """The row as the plan holds it."""
    return (
        _clean(row.name),
        *_place(row.image),
        *_place(row.speech),
        [_clean(caption) for caption in row.captions],
        _clean(json.dumps(dict(row.record), sort_keys=True, ensure_ascii=False)),
        _clean(row.problem),
    )


def _clean(text: str) -> str:
    """The text without half characters, which file names and JSON can hold but UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _place(medium: Medium | None) -> tuple[str | None, bytes | None]:
    """Where the medium lies as JSON, and its bytes; one of them at most."""
    if medium is None or isinstance(medium, bytes):
        return None, medium
    if isinstance(medium, Path):
        return json.dumps(str(medium.absolute())), None
    values = {item.name: getattr(medium, item.name) for item in fields(medium)}  # type: ignore[arg-type]
    plain = {name: {"path": str(value.absolute())} if isinstance(value, Path) else value for name, value in values.items()}
    return json.dumps({"kind": type(medium).__name__, **plain}), None


def _medium(place: str | None, data: bytes | None) -> Medium | None:
    if place is None:
        return data
    values = json.loads(place)
    if isinstance(values, str):
        return Path(values)
    kind = _KINDS[values.pop("kind")]
    return kind(**{name: Path(value["path"]) if isinstance(value, dict) else value for name, value in values.items()})


def _identity(values: tuple[Any, ...], image: MediumState, speech: MediumState) -> bytes:
    """What a sample is made of, without where its files lie."""
    name, *_, captions, record, problem = values
    return json.dumps([name, image.identity, speech.identity, captions, record, problem]).encode()
