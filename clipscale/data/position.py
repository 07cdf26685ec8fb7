"""Where a run stands in its data, as a few numbers for the checkpoint; and whether the data are still the same.

```text
{"recipe": sha256 of all that decides the order, "seed": 0, "global_batch": 4096, "lanes": null, "bucket_batches": 32, "block": 65536,
 "sources": {"photos": [start of its index's hash, samples, shards, weight, rows taken]},
 "schedule": {"10000": {"photos": 0.5}},              weights from that global batch on
 "batches": 12000, "rows": 49152000,                  taken so far
 "start": {"batch": 9000, "taken": {"photos": 36864000}}}   only after a change of the data: where the present order began
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from clipscale.data.mix import Mix, Shares
from clipscale.data.order import BLOCK, Start
from clipscale.data.sources import OpenSource, ShardStream, Source
from clipscale.errors import ConfigError, DataError

_HASH = 12  # hexadecimal digits: enough to tell data sets of one run apart
_MEANING = ("index", "samples", "shards", "weight", "taken")

Recipe = dict[str, Any]


def make_recipe(
    sources: Mapping[str, Source],
    opened: Mapping[str, OpenSource | ShardStream],
    *,
    seed: int,
    global_batch: int,
    lanes: int | None,
    bucket_batches: int,
) -> Recipe:
    """All that decides the order; where the data lie makes no difference."""
    schedule = later_weights(sources)
    recipe: Recipe = {
        "seed": seed,
        "global_batch": global_batch,
        "lanes": lanes,
        "bucket_batches": bucket_batches,
        "block": BLOCK,
        "sources": {
            name: [opened[name].fingerprint[:_HASH], int(opened[name].totals.get("samples", 0)), len(opened[name].shards), source.weight]
            for name, source in sources.items()
        },
        **({"schedule": {str(batch): changed for batch, changed in schedule.items()}} if schedule else {}),
    }
    fingerprints = {name: source.fingerprint for name, source in opened.items()}
    return {"recipe": hashlib.sha256(json.dumps([recipe, fingerprints]).encode()).hexdigest(), **recipe}


def later_weights(sources: Mapping[str, Source]) -> dict[int, dict[str, float]]:
    """From which global batch on which sources have another weight."""
    batches = sorted({batch for source in sources.values() for batch in source.later_weights})
    return {
        batch: {name: source.later_weights[batch] for name, source in sources.items() if batch in source.later_weights} for batch in batches
    }


def check_weights(sources: Mapping[str, Source]) -> None:
    """Refuse weights that leave a global batch without any source.

    Raises:
        ConfigError: all weights are zero from some global batch on.
    """
    weights = {name: source.weight for name, source in sources.items()}
    for batch, changed in {0: {}, **later_weights(sources)}.items():
        weights |= changed
        if not any(weights.values()):
            raise ConfigError(f"every source has weight 0 from global batch {batch} on; one of {', '.join(weights)} must have more")


def shares(sources: Mapping[str, Source], *, global_batch: int) -> Shares:
    """How rows are shared out among the sources, from the first row on."""
    weights = {name: source.weight for name, source in sources.items()}
    stretches = {0: weights}
    for batch, changed in later_weights(sources).items():
        weights = {**weights, **changed}
        stretches[batch] = weights
    mixes = [Mix.of(stretch) for stretch in stretches.values()]
    return Shares(begins=[batch * global_batch for batch in stretches], mixes=mixes, taken=[0] * len(weights))


def state(recipe: Recipe, taken: Mapping[str, int], *, batches: int, start: Start | None) -> dict[str, Any]:
    """What the checkpoint keeps: at most 4 kB for up to about 40 sources."""
    began = {"start": {"batch": start.batch, "taken": dict(start.taken)}} if start is not None else {}
    sources = {name: [*values, taken[name]] for name, values in recipe["sources"].items()}
    return {**recipe, "sources": sources, "batches": batches, "rows": batches * recipe["global_batch"], **began}


def check(saved: Mapping[str, Any], recipe: Recipe, *, kind: str, allow_change: bool) -> None:
    """Refuse a checkpoint of other data, unless a change is allowed.

    Raises:
        DataError: the data, or what decides their order, are not those of the checkpoint; says which and how.
    """
    if not isinstance(saved, Mapping) or "recipe" not in saved:
        raise DataError(f"pair kind '{kind}': the checkpoint is of an earlier version and does not say where it stands in the data")
    if saved["recipe"] != recipe["recipe"] and not allow_change:
        raise DataError(
            f"pair kind '{kind}' was trained on other data than there are now:\n"
            + "".join(f"  {line}\n" for line in differences(saved, recipe))
            + "restore the data, name a new run, or go on with data.allow_change=true: unchanged sources then go on where they stand"
        )
    if ("finished" in saved) != any(not values[1] for values in recipe["sources"].values()):
        raise DataError(f"pair kind '{kind}': tars that were streamed were indexed since, or the other way round; name a new run")


def take_up(saved: Mapping[str, Any], recipe: Recipe) -> tuple[int, Start | None]:
    """Global batches taken, and where the order began if not at the first of them.

    After a change, sources that are as they were go on where they stand; those that changed begin an epoch, and so do new ones.
    """
    batches = int(saved["batches"])
    if saved["recipe"] == recipe["recipe"]:
        began = saved.get("start")
        return batches, Start(began["batch"], began["taken"]) if began else None
    return batches, Start(batches, {name: _goes_on_at(saved["sources"].get(name), now) for name, now in recipe["sources"].items()})


def _goes_on_at(saved: list[Any] | None, now: list[Any]) -> int:
    """Rows of a source that count as taken: as many as were, in an unchanged one; whole epochs of what it holds now in another."""
    if saved is None:
        return 0
    if saved[:3] == now[:3]:
        return int(saved[4])
    return -(-int(saved[4]) // int(saved[1])) * int(now[1])


def finished_shards(saved: Mapping[str, Any] | None, recipe: Recipe) -> tuple[int, dict[str, dict[str, Any]]]:
    """Of streamed tars: global batches taken, and the finished shards of the sources that are as they were."""
    if saved is None:
        return 0, {}
    same = {name: saved["sources"][name][:3] == now[:3] for name, now in recipe["sources"].items() if name in saved["sources"]}
    return int(saved["batches"]), {name: saved["finished"][name] for name, unchanged in same.items() if unchanged}


def differences(saved: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What is not as it was, a line each."""
    before, after = saved["sources"], recipe["sources"]
    lines = [f"source '{name}' is gone" for name in before if name not in after]
    lines += [f"source '{name}' is new" for name in after if name not in before]
    for name in before:
        if name in after:
            lines += _source_differences(
                name, dict(zip(_MEANING, before[name], strict=False)), dict(zip(_MEANING, after[name], strict=False))
            )
    lines += [
        f"{name} was {json.dumps(saved.get(name))}, is {json.dumps(recipe.get(name))}"
        for name in ("seed", "global_batch", "lanes", "bucket_batches", "block", "schedule")
        if saved.get(name) != recipe.get(name)
    ]
    return lines or ["the sources are listed in another order, or bytes differ that the short hashes do not show"]


def _source_differences(name: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    if before["index"] != after["index"]:
        held = [
            f"{values['samples']:,} samples in {values['shards']:,} shards" if values["samples"] else f"{values['shards']:,} tars"
            for values in (before, after)
        ]
        how = f"held {held[0]}, holds {held[1]}" if held[0] != held[1] else f"holds {held[1]} as before, but other bytes"
        lines.append(f"source '{name}' {how} (index {before['index']}, now {after['index']})")
    if before["weight"] != after["weight"]:
        lines.append(f"source '{name}' had weight {before['weight']:g}, has {after['weight']:g}")
    return lines
