"""The beginning of a build: what the output holds is for these rows, or replaced, or the build is refused; then the plan stands."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from clipscale.errors import ConfigError, DataError
from clipscale.settings import did_you_mean
from data_tools.expressions import Condition
from data_tools.finish import bad, enough
from data_tools.output import WORK, FolderOutput, Output
from data_tools.packing import Packing, code
from data_tools.plan import Plan, write_plan
from data_tools.rows import Row, Rows

_OURS = re.compile(
    r"\d{6}\.(tar|parquet)|index\.(parquet|sha256)|sizes\.json|failures\.jsonl|failed\.parquet|build\.json|\.build|\..+\.tmp-\d+"
)
_HEAD = 1_000  # rows whose columns `where` may name


def check_output(output: Output) -> None:
    """Refuse a place that holds what a build does not make.

    Raises:
        DataError: it does.
    """
    names = output.sizes()
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        raise DataError(f"output {output.url}: the folder holds other things ({', '.join(foreign[:3])}); give a new or empty folder")
    if any(name.endswith(".tar") for name in names) and "build.json" not in names:
        raise DataError(f"output {output.url}: the folder holds shards that were not built here; give a new or empty folder")


def claim(output: Output, rows: Rows | Iterable[Row], packing: Packing, *, max_bad: float | None, overwrite: bool) -> Plan:
    """Write the plan, and make sure that the output is for it.

    Raises:
        DataError: there are no rows, too many of them cannot be packed, the disk is too small, or the output holds another data set.
    """
    new = output.plan.with_name("new-plan.parquet")
    try:
        plan = write_plan(new, chosen_rows(rows, packing), packing)
        about = _about(rows, packing, plan)
        _check_rows(rows, packing, plan, plan.most_bad(max_bad))
        found = read_about(output)
        if found and found.get("fingerprint") != plan.fingerprint and not overwrite:
            raise DataError(_difference(output, found, about))
        _check_space(output, plan, packing)
        if found and (found.get("fingerprint"), found.get("dates")) != (plan.fingerprint, plan.dates):
            _clear(output)  # another data set to be replaced; or this one, of files that were changed or written again since
        if found != about:
            output.write_lines("build.json", [json.dumps(about, indent=1)])
        new.replace(output.plan)
        output.publish(f"{WORK}/plan.parquet")
    finally:
        new.unlink(missing_ok=True)
    for stray in [*output.folder.glob(".*.tmp-*"), *output.plan.parent.glob(".*.tmp-*")]:
        stray.unlink()
    return plan


def request(rows: Rows | Iterable[Row], packing: Packing) -> str:
    """Fingerprint of what was asked for, without reading it: nodes of one build ask for the same."""
    asked = rows.model_dump_json() if isinstance(rows, Rows) else ""
    return hashlib.sha256(f"{code()} {packing.model_dump_json()} {asked}".encode()).hexdigest()


def _about(rows: Rows | Iterable[Row], packing: Packing, plan: Plan) -> dict[str, Any]:
    about = {"input": _called(rows), "rows": sum(plan.shard_rows), "packing": packing.model_dump(), "code": code()}
    return about | {"fingerprint": plan.fingerprint, "dates": plan.dates, "request": request(rows, packing)}


def chosen_rows(rows: Rows | Iterable[Row], packing: Packing) -> Iterator[Row]:
    """The rows that `packing.where` asks for; all of them when it asks nothing.

    Raises:
        ConfigError: it names a column that the first rows do not have.
    """
    source = iter(rows.read() if isinstance(rows, Rows) else rows)
    if packing.where is None:
        return source
    condition, head = Condition(packing.where), list(islice(source, _HEAD))
    known = sorted({name for row in head for name in _filter_values(row)})
    for name in condition.names:
        if head and name not in known:
            there_are = f"{did_you_mean(name, known)} (there are: {', '.join(known)})"
            raise ConfigError(f"--where {packing.where}: there is no column '{name}'{there_are}")
    return (row for row in chain(head, source) if row.problem or condition.holds(_filter_values(row)))


def _filter_values(row: Row) -> dict[str, Any]:
    """What `where` sees of a row: fields that are kept, columns of the input, and the captions."""
    captions = row.captions
    return {"name": row.name, "caption": captions[0] if captions else None, "captions": list(captions), **row.record, **row.columns}


def _check_rows(rows: Rows | Iterable[Row], packing: Packing, plan: Plan, max_bad: float) -> None:
    """Refuse before any work what is known to fail."""
    total = sum(plan.shard_rows)
    if not total:
        of_which = f" for which {packing.where}" if packing.where else ""
        raise DataError(f"{_called(rows)} holds no rows{of_which}; nothing was written")
    known = bad(plan.known_failures)
    if known > max_bad * total:
        counts = ", ".join(f"{reason} {number:,}" for reason, number in sorted(plan.known_failures.items()))
        way_out = f"mend them, or say {enough(known / total)} to go on without them" if known < total else "nothing can be packed"
        raise DataError(
            f"{_called(rows)}: {known:,} of {total:,} rows cannot be packed ({counts}); first: {plan.first_failure}. "
            f"That is more than --max-bad {max_bad:g}: {way_out}. Nothing was written"
        )


def _check_space(output: Output, plan: Plan, packing: Packing) -> None:
    """Images that are kept as they are need the space they take now; that of changed images and of recordings is not foreseen."""
    if packing.resizing or packing.quality or packing.image_format != "keep" or not isinstance(output, FolderOutput):
        return
    free = shutil.disk_usage(output.folder).free + sum(size for name, size in output.sizes().items() if name.endswith(".tar"))
    if plan.image_bytes > free:
        raise DataError(
            f"output {output.url}: the images take {plan.image_bytes / 1e6:,.1f} MB, the disk has room for {free / 1e6:,.1f} MB; "
            f"give a folder on a larger disk, or shrink the images with --max-side"
        )


def _called(rows: Rows | Iterable[Row]) -> str:
    return str(rows.input) if isinstance(rows, Rows) else "the input"


def read_about(output: Output) -> dict[str, Any] | None:
    """What the output's build.json says; None when there is none."""
    data = output.read("build.json")
    try:
        return None if data is None else dict(json.loads(data))
    except ValueError:
        return {"input": "something that its damaged build.json does not tell"}


def _difference(output: Output, found: dict[str, Any], asked: dict[str, Any]) -> str:
    differs = next((name for name in ("input", "rows", "code", "packing") if found.get(name) != asked[name]), None)
    if differs == "code":
        return (
            f"output {output.url}: it was begun by other code ({found.get('code', 'older')}; this is {asked['code']}), and its shards "
            f"would differ from those still to be built; use that version, another folder, or --overwrite to build all anew"
        )
    how = _told(differs, found.get(differs), asked[differs]) if differs else "its rows have changed since"
    holds = f"output {output.url}: it holds another data set, of {found.get('input')}"
    return f"{holds} ({how}); give another folder, or --overwrite to replace it"


def _told(what: str, there: Any, asked: Any) -> str:
    """What differs: of settings only those that do."""
    if not isinstance(there, dict):
        return f"{what}: {there}, asked: {asked}"
    names = [name for name in asked if there.get(name) != asked[name]]
    return "; ".join(f"{name}: {there.get(name)}, asked: {asked[name]}" for name in names)


def _clear(output: Output) -> None:
    """Remove another data set; the index first, so that no half of it looks whole."""
    for name in ["index.parquet", *output.sizes(), *(f"{WORK}/{number:06d}.json" for number in output.marks())]:
        output.remove(name)
