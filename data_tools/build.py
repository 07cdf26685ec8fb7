"""Build a data set: a plan first, then a job for every shard, the index last.

```text
OUTPUT/
  000000.tar 000000.parquet ...   the shards (clipscale/data/shards.py says what is in them)
  index.parquet  sizes.json  index.sha256   written when all shards stand: their presence means that the data set is whole
  failures.jsonl                  rows that did not become samples, and why; absent when there are none
  failed.parquet                  these rows themselves, for `retry`
  build.json                      what was built from what, and how
  .build/                         the plan and the marks of finished jobs; removed at the end
```

Whatever kills a build, the same command finishes it, and the shards are byte for byte those of a build nobody killed. Several
nodes share a plan: each builds the shards whose number, divided by the number of nodes, leaves its own number.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipscale.errors import ConfigError, DataError, RunError
from data_tools.claim import check_output, claim, read_about, request
from data_tools.fetch.fetching import Fetching
from data_tools.finish import BuildSummary, finish, marked_results, standing
from data_tools.output import Output, open_output
from data_tools.packing import Packing
from data_tools.plan import Plan, load_plan
from data_tools.pool import run_all, usable_cores
from data_tools.rows import Row, Rows
from data_tools.shard_job import ShardJob, ShardResult, build_shard, standing_shard
from data_tools.tally import Progress

_LOOK_S = 0.5  # how often a node looks whether the plan is there


@dataclass(frozen=True)
class Node:
    """One of several nodes that build a data set together."""

    number: int = 0
    of: int = 1


def build(
    rows: Rows | Iterable[Row],
    output: Path | str,
    *,
    packing: Packing | None = None,
    workers: int | None = None,
    max_bad: float | None = None,
    fetching: Fetching | None = None,
    overwrite: bool = False,
    node: Node | None = None,
    plan_only: bool = False,
    wait_s: float = 3_600.0,
    scratch: Path | None = None,
    show: Callable[[Progress, int], None] | None = None,
) -> BuildSummary:
    """Pack `rows` into the data set `output`; a data set that stands already is left as it is.

    Args:
        output: a folder, or the fsspec address of one.
        packing: shard size and what is done to media.
        workers: processes; None is one a core.
        max_bad: the largest share of rows that may fail; None is 0.01, and all where media are fetched.
        fetching: how media on the web are fetched.
        overwrite: replace another data set that `output` holds.
        node: build this node's share of the shards; the node that ends last writes the index.
        plan_only: write the plan and no shard.
        wait_s: how long a node other than 0 waits for the plan.
        scratch: where shards wait for their upload to a store.
        show: told a few times a second what has been done, and of how many rows.

    Raises:
        DataError: nothing to read, or `output` holds something else; nothing was written.
        RunError: too many rows failed, the disk is full, or a process died. Finished shards are kept for the next try.
    """
    packing, number = packing or Packing(), node.number if node else None
    place = open_output(output, scratch=scratch, node=number or 0)
    check_output(place)
    try:
        with place.claimed(number):
            plan = _plan(place, rows, packing, max_bad, overwrite, node, wait_s)
            there = standing(place)
            if there or plan_only:
                return there or _unfinished(place, plan, [])
            results = _run_jobs(place, plan, packing, node, workers, fetching or Fetching(), show)
            return _end(place, plan, results, plan.most_bad(max_bad))
    except OSError as error:
        raise RunError(f"building {output}: {error}. What is finished is kept: run the same command again") from error


def finish_build(output: Path | str, *, max_bad: float | None = None, scratch: Path | None = None) -> BuildSummary:
    """Write the index of a data set whose shards several nodes have built.

    Raises:
        DataError: there is no build in `output`.
        RunError: shards are missing, or too many rows failed.
    """
    place = open_output(output, scratch=scratch)
    with place.claimed(0):
        there = standing(place)
        if there:
            return there
        if not place.fetch_plan():
            raise DataError(f"output {output}: no build in it to finish, and no data set; run clipscale-shards build")
        plan = load_plan(place.plan)
        summary = _end(place, plan, [], plan.most_bad(max_bad))
        if summary.unfinished:
            missing = sorted(set(range(len(plan.shard_rows))) - place.marks())
            raise RunError(
                f"output {output}: {len(missing)} of {len(plan.shard_rows)} shards are not done ({_listed(missing)}); "
                f"run clipscale-shards build again on the nodes that were to build them"
            )
        return summary


def _end(place: Output, plan: Plan, results: list[ShardResult], max_bad: float) -> BuildSummary:
    """The index, when all shards stand, by whomever they were built; else what has been done here."""
    whole = results if len(results) == len(plan.shard_rows) else marked_results(place, plan)
    try:
        if whole is not None:
            return finish(place, whole, sum(plan.shard_rows), max_bad)
    except FileNotFoundError:
        there = standing(place)  # another node has written the index in between, and removed the marks
        if there is None:
            raise
        return there
    return standing(place) or _unfinished(place, plan, results)


def _unfinished(place: Output, plan: Plan, results: list[ShardResult]) -> BuildSummary:
    shards = [result.shard for result in results if result.shard]
    return BuildSummary(
        output=place.url,
        samples=sum(shard.samples for shard in shards),
        shards=len(shards),
        reused_shards=sum(result.reused for result in results),
        bytes=sum(shard.tar_bytes for shard in shards),
        failures=dict(sum((result.reasons for result in results), Counter[str]())),
        unfinished=len(plan.shard_rows) - len(place.marks()),
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(f"{number:06d}" for number in numbers[:5]) + (", ..." if len(numbers) > 5 else "")


def _plan(
    place: Output, rows: Rows | Iterable[Row], packing: Packing, max_bad: float | None, overwrite: bool, node: Node | None, wait_s: float
) -> Plan:
    """The plan: made here, or that of several nodes, which node 0 makes unless it stands."""
    if node is None:
        return claim(place, rows, packing, max_bad=max_bad, overwrite=overwrite)
    if not 0 <= node.number < node.of:
        raise ConfigError(f"--node {node.number} --of {node.of}: nodes are numbered from 0 to {node.of - 1}")
    plan = _shared_plan(place, rows, packing)
    if plan is None and node.number == 0:
        return claim(place, rows, packing, max_bad=max_bad, overwrite=overwrite)
    deadline = time.monotonic() + wait_s
    while plan is None:
        if time.monotonic() > deadline:
            raise RunError(
                f"output {place.url}: no plan after {wait_s:.0f} s; node 0 writes it, or run the same command with --plan-only first"
            )
        time.sleep(_LOOK_S)
        plan = _shared_plan(place, rows, packing)
    return plan


def _shared_plan(place: Output, rows: Rows | Iterable[Row], packing: Packing) -> Plan | None:
    """The plan that stands in the output; None when there is none yet.

    Raises:
        DataError: it is one for something else.
    """
    about = read_about(place)
    if about is None or not place.fetch_plan():
        return None
    if about.get("request") != request(rows, packing):
        raise DataError(
            f"output {place.url}: it holds the plan of another build, of {about.get('input')} with other settings; give all nodes the "
            f"same command, or another folder"
        )
    plan = load_plan(place.plan)
    return plan if plan.fingerprint == about.get("fingerprint") else None


def _run_jobs(
    place: Output,
    plan: Plan,
    packing: Packing,
    node: Node | None,
    workers: int | None,
    fetching: Fetching,
    show: Callable[[Progress, int], None] | None,
) -> list[ShardResult]:
    jobs = [
        ShardJob(place, number, rows, fingerprint, packing)
        for number, (rows, fingerprint) in enumerate(zip(plan.shard_rows, plan.fingerprints, strict=True))
        if node is None or number % node.of == node.number
    ]
    return run_jobs(jobs, plan, workers=1 if place.url.startswith("memory:") else workers, fetching=fetching, show=show)


def run_jobs(
    jobs: list[ShardJob], plan: Plan, *, workers: int | None, fetching: Fetching, show: Callable[[Progress, int], None] | None
) -> list[ShardResult]:
    """Do these jobs of a plan; their results in the order of their numbers."""
    shown = _Shown(show, sum(job.rows for job in jobs))
    ready = _fetched(jobs, fetching, shown) if plan.addresses else jobs
    processes = min(workers or usable_cores(), max(1, len(jobs)))
    return sorted(run_all(build_shard, ready, workers=processes, show=shown.packing), key=lambda result: result.number)


@dataclass
class _Shown:
    """Progress of packing and of fetching, shown as one."""

    show: Callable[[Progress, int], None] | None
    total: int
    packed: Progress = field(default_factory=Progress)
    doing: str = ""

    def packing(self, progress: Progress) -> None:
        self.packed = progress
        self._tell()

    def fetching(self, doing: str) -> None:
        self.doing = doing
        self._tell()

    def _tell(self) -> None:
        if self.show:
            self.show(replace(self.packed, doing=self.doing), self.total)


def _fetched(jobs: Iterable[ShardJob], fetching: Fetching, shown: _Shown) -> Iterator[ShardJob]:
    from data_tools.fetch.crawl import fetched_ahead

    return fetched_ahead(
        jobs, fetching, stands=lambda job: standing_shard(job) is not None, show=lambda count: shown.fetching(count.line())
    )
