"""The end of a build: all shards stand, their failures are gathered, and the index is written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from clipscale.data.shards import ShardInfo, aside, open_dataset, write_index
from clipscale.errors import DataError, RunError
from data_tools.output import Output
from data_tools.packing import LIMITS, Packing
from data_tools.plan import Plan, read_plan, write_plan
from data_tools.rows import Row
from data_tools.shard_job import Failure, ShardResult, read_mark

FAILED = "failed.parquet"
"""The rows that failed, as a plan: what `retry` tries again."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build came to."""

    output: str
    samples: int
    shards: int
    reused_shards: int
    """Shards that stood already."""
    bytes: int
    failures: dict[str, int]
    """How many rows failed, by reason."""
    unfinished: int = 0
    """Shards that other nodes have still to build; the data set is whole when there are none."""


def standing(output: Output) -> BuildSummary | None:
    """The summary of the data set when it is whole already."""
    if "index.parquet" not in output.sizes():
        return None
    try:
        index = open_dataset(output.url)
    except DataError:
        output.remove("index.parquet")
        return None
    lines = (output.read("failures.jsonl") or b"").splitlines()
    reasons = Counter(json.loads(line)["reason"] for line in lines)
    shards = len(index.shards)
    return BuildSummary(output.url, int(index.totals["samples"]), shards, shards, int(index.totals["tar_bytes"]), dict(reasons))


def marked_results(output: Output, plan: Plan) -> list[ShardResult] | None:
    """What all jobs came to, by the marks that they have left; None when some are not done."""
    if len(output.marks()) < len(plan.shard_rows):
        return None
    results = []
    for number, fingerprint in enumerate(plan.fingerprints):
        mark = read_mark(output, number)
        if mark is None or mark.plan != fingerprint:
            return None
        results.append(mark.result(number, reused=False))
    return results


def finish(output: Output, results: list[ShardResult], total: int, max_bad: float) -> BuildSummary:
    """Write the list of failures and the index.

    Raises:
        RunError: more rows failed than may, or all.
    """
    shards: list[ShardInfo] = [result.shard for result in results if result.shard]
    reasons = sum((result.reasons for result in results), Counter[str]())
    first = _write_failures(output, results)
    if not shards or bad(reasons) > max_bad * total:
        assert first is not None
        raise RunError(_too_many(output, first, reasons, total, max_bad))
    _write_failed_rows(output, results)
    for name in output.sizes():  # of a build that had more shards, or that `retry` has added to
        if re.fullmatch(r"\d{6}\.(tar|parquet)", name) and int(name[:6]) >= len(results):
            output.remove(name)
    write_index(output.folder, shards)
    output.publish("sizes.json", "index.sha256", "index.parquet")
    return BuildSummary(
        output=output.url,
        samples=sum(shard.samples for shard in shards),
        shards=len(shards),
        reused_shards=sum(result.reused for result in results),
        bytes=sum(shard.tar_bytes for shard in shards),
        failures=dict(reasons),
    )


def bad(reasons: dict[str, int]) -> int:
    """How many rows failed that were not left out as asked."""
    return sum(number for reason, number in reasons.items() if reason not in LIMITS)


def _write_failures(output: Output, results: list[ShardResult]) -> Failure | None:
    """Gather the failures of all shards, a shard at a time; the first of them, or None when there are none."""
    failures = _failures(output, [result.number for result in results if result.reasons])
    first = next(failures, None)
    if first is None:
        output.remove("failures.jsonl")
    else:
        output.write_lines("failures.jsonl", (json.dumps(asdict(failure), ensure_ascii=False) for failure in chain([first], failures)))
    return first


def _write_failed_rows(output: Output, results: list[ShardResult]) -> None:
    """Keep the rows that failed, as a plan for `retry`."""
    failed = (row for result in results if bad(result.reasons) for row in _failed_rows(output, result.number))
    if write_failed_rows(output.folder / FAILED, failed):
        output.publish(FAILED)
    else:
        output.remove(FAILED)


def _failed_rows(output: Output, shard: int) -> Iterator[Row]:
    mark = read_mark(output, shard)
    return failed_rows(read_plan(output.plan, shard), mark.failures if mark else [])


def failed_rows(rows: Iterable[Row], failures: Sequence[Failure]) -> Iterator[Row]:
    """The rows that these failures are about, both in the same order; rows left out as asked did not fail."""
    waiting = deque(failures)
    for row in rows:
        if waiting and waiting[0].row == row.name and waiting.popleft().reason not in LIMITS:
            yield row


def write_failed_rows(path: Path, rows: Iterator[Row]) -> bool:
    """Write rows as a plan; False when there are none."""
    first = next(rows, None)
    if first is None:
        return False
    temporary = aside(path)
    try:
        write_plan(temporary, chain([first], rows), Packing())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _failures(output: Output, shards: list[int]) -> Iterator[Failure]:
    for number in shards:
        mark = read_mark(output, number)
        if mark is None:
            raise FileNotFoundError(f"the mark of shard {number:06d} is gone")
        yield from mark.failures


def _too_many(output: Output, first: Failure, reasons: Counter[str], total: int, max_bad: float) -> str:
    counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    share = bad(reasons) / total
    lines = (
        f"{reasons.total()} of {total} rows failed ({counts}); first: {first.row}: {first.detail}. "
        f"All are listed in {output.url.rstrip('/')}/failures.jsonl"
    )
    if share == 1.0 or share <= max_bad:
        return lines
    return f"{lines}. That is more than --max-bad {max_bad:g}: mend them, or run again with {enough(share)} to go on without them"


def enough(share: float) -> str:
    """The option that tolerates this share of failures."""
    return f"--max-bad {math.ceil(share * 1_000) / 1_000:g}"
