"""Index tars as they are: a sidecar for each says where its samples lie, so that they are read by offset, without repacking.

A tar is read once: its headers say which members are a sample (foreign_tars.py), its bytes give the checksums, and media headers and
captions are looked at as a reader would. What could be paired wrongly, or could not be read, becomes a row of the sidecar whose status
says why; readers pass it over, `failures.jsonl` lists it. Nothing is decoded, unpickled or unpacked.

Every tar is a job of its own. What was indexed is told by size and date or etag of the tar (`indexed.json`), and where these say nothing,
by its sha256: after a kill, or when tars came since, the same command reads the others only. The index is written last.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from clipscale.data.foreign_tars import Contents, read_contents
from clipscale.data.shards import (
    SHARD_NAME,
    SIDECAR,
    ShardInfo,
    read_shard_info,
    write_index,
    write_parquet,
)
from clipscale.errors import DataError, MissingPackage, RunError
from data_tools.output import WORK, Output, open_output
from data_tools.pool import Count, run_all, usable_cores
from data_tools.shard_job import Failure
from data_tools.tally import Progress
from data_tools.tar_rows import tar_rows

INDEXED = "indexed.json"
"""Which tars the sidecars were made of."""
_DATES = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")
_STRAY = re.compile(r"\..+\.(parquet|json|jsonl|sha256)\.tmp-\d+")

Damaged = Literal["refuse", "keep"]
Known = Mapping[str, Sequence[str]]
"""Of a tar that was indexed: what told it then, and the sha256 of its sidecar."""


@dataclass(frozen=True)
class IndexSummary:
    """What indexing came to."""

    output: str
    tars: str
    samples: int
    shards: int
    reused_shards: int
    """Whose sidecars stood already."""
    bytes: int
    failures: dict[str, int]
    """Samples that readers pass over, by reason."""


@dataclass(frozen=True)
class _Job:
    tars: str
    name: str
    """Of the tar, without .tar."""
    size: int
    identity: str
    """Size, and date or etag; empty when the store tells neither."""
    known: Sequence[str]
    output: Output
    damaged: Damaged


@dataclass(frozen=True)
class _Result:
    job: _Job
    info: ShardInfo
    failures: list[Failure]
    reused: bool
    damage: str = ""


def index(
    tars: str,
    sidecars: str | None = None,
    *,
    max_bad: float = 0.01,
    damaged_tars: Damaged = "refuse",
    workers: int | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> IndexSummary:
    """Write sidecars and an index for the tars in a folder, beside them or into another one.

    Args:
        tars: folder, or its fsspec address.
        sidecars: where these go; beside the tars when None.
        max_bad: largest share of samples that may be left out.
        damaged_tars: `keep` takes the samples before a tar's damage, except the last.

    Raises:
        DataError: there are no tars, one cannot be used under its name, or the sidecars cannot be written or would take the place of
            others' files; nothing was written.
        RunError: a tar is damaged, too many samples are left out, or a tar cannot be fetched; whole sidecars stay, and there is no index.
    """
    output = open_output(sidecars or tars)
    found = _tars(tars)
    try:
        with output.claimed(None):
            known = _known(output)
            _check_foreign(output, tars, found.keys() - known.keys())
            _clear(output)
            jobs = [_Job(tars, name, size, identity, known.get(name, ()), output, damaged_tars) for name, (size, identity) in found.items()]
            results = sorted(_run(jobs, workers, show), key=lambda result: result.job.name)
            return _finish(output, tars, results, max_bad)
    except OSError as error:
        raise RunError(f"indexing {tars}: {error}. Sidecars that are whole stay: run the same command again") from error


def _tars(url: str) -> dict[str, tuple[int, str]]:
    """Size and identity of the folder's tars, by name without .tar, in the order of names."""
    store, root = _store(url)
    try:
        entries = store.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"tars {url}: there is no such folder; give the folder that the tars lie in, not a pattern") from None
    except OSError as error:
        raise DataError(f"tars {url}: the folder cannot be listed: {error}") from error
    names = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}
    files = {name.removesuffix(".tar"): entry for name, entry in sorted(names.items()) if name.endswith(".tar") and name[0] != "."}
    if not files:
        raise DataError(f"tars {url}: no .tar lies in the folder itself; it holds {', '.join(sorted(names)[:5]) or 'nothing'}")
    unusable = [name for name in files if not SHARD_NAME.fullmatch(name) or name == "index"]
    if unusable:
        raise DataError(
            f"tars {url}: {len(unusable)} cannot be used under their names, first '{unusable[0]}.tar'; "
            f"names are letters, digits and . _ - = +, and not 'index': rename them"
        )
    return {name: (int(entry["size"] or 0), _identity(entry)) for name, entry in files.items()}


def _store(url: str) -> tuple[Any, str]:
    if url.startswith("pipe:"):
        raise DataError(f"{url}: pipe: addresses run shell commands and are refused; give a folder or an fsspec address of one")
    try:
        store, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise MissingPackage(f"tars {url}: {error}") from error
    except ValueError as error:
        raise DataError(f"tars {url}: {error}") from error
    return store, root.rstrip("/")


def _identity(entry: Mapping[str, Any]) -> str:
    """What tells a tar from another without reading it; its bytes' checksums are the proof, this spares reading them again."""
    date = next((entry[name] for name in _DATES if entry.get(name)), None)
    return "" if date is None else f"{entry['size']} {date}"


def _clear(output: Output) -> None:
    """Remove what kills have left half written."""
    for name in output.sizes():
        if _STRAY.fullmatch(name):
            output.remove(name)


def _known(output: Output) -> Known:
    known: dict[str, Sequence[str]] = {}
    try:
        known.update(json.loads(output.read(INDEXED) or b"{}").get("shards", {}))
        for name in output.work_names(".mark"):
            known[name.removesuffix(".mark")] = json.loads(output.read(f"{WORK}/{name}") or b"[]")
    except (ValueError, AttributeError):
        return {}  # damaged: everything is read again
    return known


def _check_foreign(output: Output, tars: str, names: Collection[str]) -> None:
    """img2dataset writes NNNNN.parquet beside its tars, with addresses that are nowhere else: not ours to write over."""
    there = sorted({f"{name}.parquet" for name in names} & output.sizes().keys())
    foreign = [name for name in there if not _is_sidecar(output.read(name) or b"")]
    if foreign:
        raise DataError(
            f"{output.url}: {len(foreign)} files of others have the names of sidecars, first {foreign[0]} (img2dataset writes such files); "
            f"they stay. Put the sidecars elsewhere: clipscale-shards index {tars} --sidecars {Path(tars).name or 'my'}-sidecars"
        )


def _is_sidecar(data: bytes) -> bool:
    try:
        schema: pyarrow.Schema = pyarrow.parquet.read_schema(pyarrow.BufferReader(data))
    except (OSError, pyarrow.ArrowException):
        return False
    return set(SIDECAR.names) <= set(schema.names)


def _run(jobs: list[_Job], workers: int | None, show: Callable[[Progress, int], None] | None) -> Iterator[_Result]:
    total = sum(job.size for job in jobs)

    def shown(progress: Progress) -> None:
        if show:  # how many samples there are is not known before; what was read tells
            show(progress, round(progress.rows * total / progress.bytes) if progress.bytes else 0)

    return run_all(_index_tar, jobs, workers=min(workers or usable_cores(), len(jobs)), show=shown)


def _index_tar(job: _Job, count: Count) -> _Result:
    with tempfile.TemporaryDirectory(prefix="clipscale-index-") as scratch:
        reused = _reused(job, Path(scratch))
        if reused:
            count(Progress(reused.info.samples, job.size, Counter(failure.reason for failure in reused.failures)))
            return reused
        with _local(job, Path(scratch)) as path:
            contents = Contents([], "it is empty") if not job.size else read_contents(path)
            found = tar_rows(path, contents, count=count)
            if found.bytes != job.size:
                tar = f"{job.tars}/{job.name}.tar"
                raise RunError(f"{tar} had {job.size:,} bytes and now has {found.bytes:,}: it changes while it is indexed")
            return _written(job, found.rows, found.sha256, contents.damage)


def _reused(job: _Job, scratch: Path) -> _Result | None:
    """What stands already for this tar."""
    data = job.output.read(f"{job.name}.parquet")
    if data is None:
        return None
    sidecar = scratch / f"{job.name}.parquet"
    sidecar.write_bytes(data)
    try:
        info, about = read_shard_info(sidecar), pyarrow.parquet.read_schema(sidecar)
        known = bool(job.identity) and tuple(job.known) == (job.identity, info.sidecar_sha256.hex())
        if about.names != SIDECAR.names or info.tar_bytes != job.size or not (known or _sha256(job, scratch) == info.sha256):
            return None
        table = pyarrow.parquet.read_table(sidecar, columns=["key", "status"], use_threads=False)
    except (OSError, pyarrow.ArrowException, KeyError, ValueError):
        return None
    failures = [_failure(job, row) for row in table.to_pylist() if row["status"] != "ok"]
    damage = next((failure.detail for failure in failures if failure.reason == "damaged tar"), "")
    if not known:
        _mark(job, info)
    return _Result(job, info, failures, reused=True, damage=damage)


def _sha256(job: _Job, scratch: Path) -> bytes:
    with _local(job, scratch) as path, path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _local(job: _Job, scratch: Path) -> Iterator[Path]:
    """The tar as a file of this machine."""
    store, root = _store(job.tars)
    remote = f"{root}/{job.name}.tar"
    if isinstance(store, LocalFileSystem):
        yield Path(remote)
        return
    path = scratch / f"{job.name}.tar"
    if not path.exists():
        _fetch(store, remote, path, job.size)
    yield path


def _fetch(store: Any, remote: str, path: Path, size: int) -> None:
    for last in (False, False, True):
        try:
            store.get_file(remote, str(path))
            if path.stat().st_size == size:
                return
            problem = f"{path.stat().st_size:,} of {size:,} bytes came"
        except FileNotFoundError:
            raise RunError(f"{remote} is gone since the folder was listed; run the same command again") from None
        except OSError as error:
            problem = str(error)
        if last:
            path.unlink(missing_ok=True)
            raise RunError(f"{remote} cannot be fetched, after 3 tries: {problem}")


def _written(job: _Job, rows: list[dict[str, Any]], sha256: bytes, damage: str) -> _Result:
    """The sidecar, published; of a damaged tar that is refused, none."""
    failures = [_failure(job, row) for row in rows if row["status"] != "ok"]
    if damage and job.damaged == "refuse":
        nothing = ShardInfo(job.name, 0, job.size, sha256, b"", 0, 0, 0, 0.0)
        return _Result(job, nothing, failures, reused=False, damage=damage)
    job.output.remove("index.parquet")  # it would describe another sidecar
    sidecar = job.output.folder / f"{job.name}.parquet"
    about = {"sha256": sha256.hex(), "bytes": str(job.size)}
    write_parquet(sidecar, pyarrow.Table.from_pylist(rows, schema=SIDECAR.with_metadata(about)))
    info = read_shard_info(sidecar)
    job.output.publish(sidecar.name)
    _mark(job, info)
    return _Result(job, info, failures, reused=False, damage=damage)


def _mark(job: _Job, info: ShardInfo) -> None:
    job.output.write_lines(f"{WORK}/{job.name}.mark", [json.dumps([job.identity, info.sidecar_sha256.hex()])])


def _failure(job: _Job, row: Mapping[str, Any]) -> Failure:
    reason, _, detail = row["status"].partition(": ")
    return Failure(f"{job.name}.tar:{row['key']}", reason, detail)


def _finish(output: Output, tars: str, results: list[_Result], max_bad: float) -> IndexSummary:
    failures = [failure for result in results for failure in result.failures]
    reasons = Counter(failure.reason for failure in failures)
    if output.read("build.json") is None:  # whose own list of failures says more
        output.write_lines("failures.jsonl", (json.dumps(asdict(failure), ensure_ascii=False) for failure in failures))
    damaged = [result for result in results if result.damage and result.job.damaged == "refuse"]
    if damaged:
        first = damaged[0]
        raise RunError(
            f"{len(damaged)} of {len(results)} tars in {tars} are damaged, first {first.job.name}.tar: {first.damage}. Make them again, "
            f"move them away, or take what is before the damage with --damaged-tars keep. The other sidecars are whole and stay"
        )
    _check_share(tars, output, results, failures, max_bad)
    shards = [result.info for result in results if result.info.samples]
    _remove_others(output, results)
    known = {result.job.name: [result.job.identity, result.info.sidecar_sha256.hex()] for result in results}
    elsewhere = output.url.rstrip("/") != tars.rstrip("/")
    output.write_lines(INDEXED, [json.dumps({"tars": tars, "shards": known}, indent=1)])
    _write_index(output, shards, {"tars": tars} if elsewhere else {})
    total, size = sum(shard.samples for shard in shards), sum(shard.tar_bytes for shard in shards)
    return IndexSummary(output.url, tars, total, len(shards), sum(result.reused for result in results), size, dict(reasons))


def _write_index(output: Output, shards: list[ShardInfo], about: Mapping[str, str]) -> None:
    """The index, unless the same stands already."""
    with tempfile.TemporaryDirectory(prefix="clipscale-index-") as scratch:
        write_index(Path(scratch), shards, about=about)
        names = ("sizes.json", "index.sha256", "index.parquet")
        if all(output.read(name) == (Path(scratch) / name).read_bytes() for name in names):
            return
    write_index(output.folder, shards, about=about)
    output.publish(*names)


def _check_share(tars: str, output: Output, results: list[_Result], failures: list[Failure], max_bad: float) -> None:
    good = sum(result.info.samples for result in results)
    counts = ", ".join(f"{reason} {number:,}" for reason, number in Counter(failure.reason for failure in failures).most_common())
    first = f"; first: {failures[0].row}: {failures[0].reason}: {failures[0].detail}" if failures else ""
    listed = f"All are listed in {output.url.rstrip('/')}/failures.jsonl"
    if not good:
        raise RunError(f"none of the {len(results)} tars in {tars} holds a usable sample ({counts or 'they are empty'}){first}. {listed}")
    share = len(failures) / (good + len(failures))
    if share > max_bad:
        raise RunError(
            f"{len(failures):,} of {good + len(failures):,} samples in {tars} cannot be used ({counts}){first}. {listed}. "
            f"That is more than --max-bad {max_bad:g}; allow more to go on without them"
        )


def _remove_others(output: Output, results: list[_Result]) -> None:
    """Sidecars of tars that are there no more."""
    try:
        before = json.loads(output.read(INDEXED) or b"{}").get("shards", {})
    except (ValueError, AttributeError):
        return
    for name in before.keys() - {result.job.name for result in results}:
        if SHARD_NAME.fullmatch(name):
            output.remove("index.parquet")
            output.remove(f"{name}.parquet")
