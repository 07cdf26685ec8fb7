"""Build a data set: a plan first, then a job for every shard, the index last.

```text
OUTPUT/
  000000.tar 000000.parquet ...   the shards (clipscale/data/shards.py says what is in them)
  index.parquet  sizes.json  index.sha256   written when all shards stand: their presence means that the data set is whole
  failures.jsonl                  rows that did not become samples, and why; absent when there are none
  build.json                      what was built from what, and how
  .build/                         the plan and the state of the jobs; removed at the end
```

Whatever kills a build, the same command finishes it, and the shards are byte for byte those of a build nobody killed.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from clipscale.data.shards import ShardInfo, open_dataset, write_index
from clipscale.errors import ConfigError, DataError, RunError
from clipscale.settings import did_you_mean
from data_tools.expressions import Condition
from data_tools.packing import LIMITS, Packing
from data_tools.plan import Plan, write_plan
from data_tools.pool import Progress, run_all, usable_cores
from data_tools.rows import Row, Rows
from data_tools.shard_job import Failure, ShardJob, ShardResult, build_shard, read_failures, write_lines

_OURS = re.compile(r"\d{6}\.(tar|parquet)|index\.(parquet|sha256)|sizes\.json|failures\.jsonl|build\.json|\.build|\..+\.tmp-\d+")

_HEAD = 1_000  # rows whose columns `where` may name


@dataclass(frozen=True)
class BuildSummary:
    """What a build came to."""

    output: Path
    samples: int
    shards: int
    reused_shards: int
    """Shards that stood already."""
    bytes: int
    failures: dict[str, int]
    """How many rows failed, by reason."""


def build(
    rows: Rows | Iterable[Row],
    output: Path,
    *,
    packing: Packing | None = None,
    workers: int | None = None,
    max_bad: float = 0.01,
    overwrite: bool = False,
    show: Callable[[Progress, int], None] | None = None,
) -> BuildSummary:
    """Pack `rows` into the data set `output`; a data set that stands already is left as it is.

    Args:
        packing: shard size and what is done to media.
        workers: processes; None is one a core.
        max_bad: the largest share of rows that may fail.
        overwrite: replace another data set that `output` holds.
        show: told a few times a second what has been done, and of how many rows.

    Raises:
        DataError: nothing to read, or `output` holds something else; nothing was written.
        RunError: too many rows failed, the disk is full, or a process died. Finished shards are kept for the next try.
    """
    output, packing = Path(output), packing or Packing()
    _check_output(output)
    try:
        with _work_folder(output) as work:
            plan = _claim(output, work, rows, packing, overwrite)
            standing = _standing(output)
            if standing:
                return standing
            jobs = [
                ShardJob(output, work, number, *what, packing)
                for number, what in enumerate(zip(plan.shard_rows, plan.fingerprints, strict=True))
            ]
            total = sum(plan.shard_rows)
            processes = min(workers or usable_cores(), len(jobs))
            results = list(run_all(build_shard, jobs, workers=processes, show=lambda progress: show(progress, total) if show else None))
            return _finish(output, work, sorted(results, key=lambda result: result.number), total, max_bad)
    except OSError as error:
        raise RunError(f"building {output}: {error}. What is finished is kept: run the same command again") from error


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise DataError(f"output {output}: a file is in the way; give a new folder")
    foreign = sorted(path.name for path in output.iterdir() if not _OURS.fullmatch(path.name)) if output.exists() else []
    if foreign:
        raise DataError(f"output {output}: the folder holds other things ({', '.join(foreign[:3])}); give a new or empty folder")
    if output.exists() and any(output.glob("*.tar")) and not (output / "build.json").exists():
        raise DataError(f"output {output}: the folder holds shards that were not built here; give a new or empty folder")


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """`.build` in the output, locked; gone afterwards unless the build has begun and can go on."""
    created = not output.exists()
    work = output / ".build"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise DataError(f"output {output}: cannot be written ({error}); give another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"output {output}: another build is at work on it; wait for its end") from None
        try:
            yield work
        finally:
            if (output / "index.parquet").exists() or not (output / "build.json").exists():
                shutil.rmtree(work)
            if created and not any(output.iterdir()):
                output.rmdir()


def _claim(output: Path, work: Path, rows: Rows | Iterable[Row], packing: Packing, overwrite: bool) -> Plan:
    """Write the plan, and make sure that the output is for it."""
    new = work / "new-plan.parquet"
    try:
        plan = write_plan(new, chosen_rows(rows, packing), packing)
        if not plan.shard_rows:
            of_which = f" for which {packing.where}" if packing.where else ""
            raise DataError(f"{_called(rows)} holds no rows{of_which}; nothing was written")
        about = {"input": _called(rows), "rows": sum(plan.shard_rows), "packing": packing.model_dump()}
        about |= {"fingerprint": plan.fingerprint, "dates": plan.dates}
        found = _read_about(output)
        if found and found.get("fingerprint") != plan.fingerprint and not overwrite:
            raise DataError(_difference(output, found, about))
        _check_space(output, plan, packing)
        if found and (found.get("fingerprint"), found.get("dates")) != (plan.fingerprint, plan.dates):
            _clear(output, work)  # another data set to be replaced; or this one, of files that were changed or written again since
        if found != about:
            write_lines(output / "build.json", [json.dumps(about, indent=1)])
        new.replace(work / "plan.parquet")
    finally:
        new.unlink(missing_ok=True)
    for stray in [*output.glob(".*.tmp-*"), *work.glob(".*.tmp-*")]:
        stray.unlink()
    return plan


def chosen_rows(rows: Rows | Iterable[Row], packing: Packing) -> Iterator[Row]:
    """The rows that `packing.where` asks for; all of them when it asks nothing.

    Raises:
        ConfigError: it names a column that the first rows do not have.
    """
    source = iter(rows.read() if isinstance(rows, Rows) else rows)
    if packing.where is None:
        return source
    condition, head = Condition(packing.where), list(islice(source, _HEAD))
    known = sorted({name for row in head for name in filter_values(row)})
    for name in condition.names:
        if head and name not in known:
            raise ConfigError(
                f"--where {packing.where}: there is no column '{name}'{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )
    return (row for row in chain(head, source) if row.problem or condition.holds(filter_values(row)))


def filter_values(row: Row) -> dict[str, Any]:
    """What `where` sees of a row: fields that are kept, columns of the input, and the captions."""
    captions = row.captions
    return {"name": row.name, "caption": captions[0] if captions else None, "captions": list(captions), **row.record, **row.columns}


def _check_space(output: Path, plan: Plan, packing: Packing) -> None:
    """Images that are kept as they are need the space they take now; that of shrunk images and of recordings is not foreseen."""
    if packing.resizing or packing.quality or packing.image_format != "keep":
        return
    free = shutil.disk_usage(output).free + sum(path.stat().st_size for path in output.glob("*.tar"))
    if plan.image_bytes > free:
        raise DataError(
            f"output {output}: the images take {plan.image_bytes / 1e6:,.1f} MB, the disk has room for {free / 1e6:,.1f} MB; "
            f"give a folder on a larger disk, or shrink the images with --max-side"
        )


def _called(rows: Rows | Iterable[Row]) -> str:
    return str(rows.input) if isinstance(rows, Rows) else "the input"


def _read_about(output: Path) -> dict[str, Any] | None:
    path = output / "build.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else None
    except ValueError:
        return {"input": "something that its damaged build.json does not tell"}


def _difference(output: Path, found: dict[str, Any], asked: dict[str, Any]) -> str:
    differs = next((name for name in ("input", "rows", "packing") if found.get(name) != asked[name]), None)
    how = f"{differs}: {found.get(differs)}, asked: {asked[differs]}" if differs else "its rows have changed since"
    return f"output {output}: it holds another data set, of {found.get('input')} ({how}); give another folder, or --overwrite to replace it"


def _clear(output: Path, work: Path) -> None:
    """Remove another data set; the index first, so that no half of it looks whole."""
    for path in [output / "index.parquet", *output.iterdir(), *work.glob("*.json")]:
        if path != work:
            path.unlink(missing_ok=True)


def _standing(output: Path) -> BuildSummary | None:
    """The summary of the data set when it is whole already."""
    if not (output / "index.parquet").exists():
        return None
    try:
        index = open_dataset(output)
    except DataError:
        (output / "index.parquet").unlink()
        return None
    failures = output / "failures.jsonl"
    reasons = Counter(json.loads(line)["reason"] for line in failures.read_text().splitlines()) if failures.exists() else Counter[str]()
    shards = len(index.shards)
    return BuildSummary(output, int(index.totals["samples"]), shards, shards, int(index.totals["tar_bytes"]), dict(reasons))


def _finish(output: Path, work: Path, results: list[ShardResult], total: int, max_bad: float) -> BuildSummary:
    shards: list[ShardInfo] = [result.shard for result in results if result.shard]
    reasons = sum((result.reasons for result in results), Counter[str]())
    first = _write_failures(output / "failures.jsonl", work, len(results))
    bad = sum(number for reason, number in reasons.items() if reason not in LIMITS)
    if not shards or bad > max_bad * total:
        assert first is not None
        raise RunError(_too_many(output, first, reasons, total, max_bad))
    write_index(output, shards)
    return BuildSummary(
        output=output,
        samples=sum(shard.samples for shard in shards),
        shards=len(shards),
        reused_shards=sum(result.reused for result in results),
        bytes=sum(shard.tar_bytes for shard in shards),
        failures=dict(reasons),
    )


def _write_failures(path: Path, work: Path, num_shards: int) -> Failure | None:
    """Gather the failures of all shards, a shard at a time; the first of them, or None when there are none."""
    failures = (failure for number in range(num_shards) for failure in read_failures(work, number) or [])
    first = next(failures, None)
    if first is None:
        path.unlink(missing_ok=True)
    else:
        write_lines(path, (json.dumps(asdict(failure), ensure_ascii=False) for failure in chain([first], failures)))
    return first


def _too_many(output: Path, first: Failure, reasons: Counter[str], total: int, max_bad: float) -> str:
    counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    share = sum(number for reason, number in reasons.items() if reason not in LIMITS) / total
    lines = (
        f"{reasons.total()} of {total} rows failed ({counts}); first: {first.row}: {first.detail}. "
        f"All are listed in {output / 'failures.jsonl'}"
    )
    if share == 1.0 or share <= max_bad:
        return lines
    enough = math.ceil(share * 1_000) / 1_000
    return f"{lines}. That is more than --max-bad {max_bad:g}: mend them, or run again with --max-bad {enough:g} to go on without them"
