"""Where a run stands in its data: a few numbers, refused for other data with the difference, taken up after a wanted change."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from making_data import write_dataset

from clipscale.data.sources import Source
from clipscale.data.sources.shards import Shards
from clipscale.data.stream import TrainingStream, resume_batches
from clipscale.errors import ConfigError, DataError
from clipscale.inputs import ImageInput, Input, Modality

INPUTS: dict[Modality, Input] = {"image": ImageInput(size=8)}


def stream(sources: dict[str, Source], saved: dict[str, Any] | None = None, **changes: Any) -> TrainingStream:
    settings: dict[str, Any] = {"seed": 0, "global_batch": 6, "lanes": None, "bucket_batches": 1, "allow_change": False, **changes}
    return resume_batches(saved, sources, kind="pairs", modalities=("image", "image"), inputs=INPUTS, **settings)


def saved_state(stream: TrainingStream) -> dict[str, Any]:
    """As it comes back out of a checkpoint."""
    return dict(json.loads(json.dumps(stream.state())))


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Source]:
    return {"photos": Shards(url=str(write_dataset(tmp_path / "photos", [5, 7])))}


def test_the_state_says_where_it_stands_and_the_place_of_the_data_makes_no_difference(tmp_path: Path, photos: dict[str, Source]) -> None:
    first = stream(photos)
    keys = [batch.keys for batch in itertools.islice(first, 3)]
    state = saved_state(first)
    assert (state["batches"], state["rows"], state["seed"]) == (3, 18, 0)
    index, samples, shards, weight, taken = state["sources"]["photos"]
    assert (samples, shards, weight, taken) == (12, 2, 1.0, 18)
    assert photos["photos"].open().fingerprint.startswith(index)
    moved: dict[str, Source] = {"photos": Shards(url=str(write_dataset(tmp_path / "moved", [5, 7])))}
    rest = [batch.keys for batch in itertools.islice(stream(moved, state), 1)]
    assert Counter(key for batch in [*keys, *rest] for key in batch) == dict.fromkeys((f"{number:06d}" for number in range(12)), 2)


def test_forty_sources_fit_into_4_kb(tmp_path: Path) -> None:
    url = str(write_dataset(tmp_path, [3]))
    sources: dict[str, Source] = {f"source_{number:03d}": Shards(url=url, weight=0.25 + number) for number in range(40)}
    later = stream(sources)
    later.taken = 10**9
    assert len(json.dumps(later.state())) <= 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [5, 8]}, r"source 'photos' held 12 samples in 2 shards, holds 13 samples in 2 shards \(index \w{12}, now \w{12}\)"),
        ({"sizes": [12]}, "held 12 samples in 2 shards, holds 12 samples in 1 shards"),
        ({"weight": 2.0}, "source 'photos' had weight 1, has 2"),
        ({"later_weights": {5: 2.0}}, r'schedule was null, is \{"5": \{"photos": 2.0\}\}'),
        ({"name": "pictures"}, "source 'photos' is gone\n  source 'pictures' is new"),
        ({"order": {"bucket_batches": 4}}, "bucket_batches was 1, is 4"),
        ({"order": {"lanes": 2}}, "lanes was null, is 2"),
        ({"order": {"seed": 1}}, "seed was 0, is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_data_are_refused_with_what_changed_and_how(
    tmp_path: Path, photos: dict[str, Source], change: dict[str, Any], message: str
) -> None:
    state = saved_state(stream(photos))
    folder = write_dataset(tmp_path / "now", change.get("sizes", [5, 7]))
    settings = {name: value for name, value in change.items() if name in ("weight", "later_weights")}
    now: dict[str, Source] = {change.get("name", "photos"): Shards(url=str(folder), **settings)}
    with pytest.raises(DataError, match=message) as refused:
        stream(now, state, **change.get("order", {}))
    assert "data.allow_change=true" in str(refused.value)
    assert stream(now, state, allow_change=True, **change.get("order", {})).taken == 0


def test_after_a_wanted_change_unchanged_sources_go_on_and_others_begin_an_epoch(tmp_path: Path, photos: dict[str, Source]) -> None:
    """Photos has given 8 of its 12 samples, and art 4 of its 6, when art grows to 9 and maps come along."""
    art = Shards(url=str(write_dataset(tmp_path / "art", [6])), weight=0.5)
    before = stream({**photos, "art": art}, global_batch=12)
    first = [row for batch in itertools.islice(before, 1) for row in zip(batch.keys, batch.reading, strict=False)]
    assert len(first) == 2
    now: dict[str, Source] = {
        **photos,
        "art": Shards(url=str(write_dataset(tmp_path / "art", [9])), weight=1.0),
        "maps": Shards(url=str(write_dataset(tmp_path / "maps", [4])), weight=1.0),
    }
    after = stream(now, saved_state(before), global_batch=12, allow_change=True)
    rows = [after.order.batch(number) for number in (1, 2)]
    told = {name: [(int(e), int(s)) for row in rows for e, s, of in zip(row.epoch, row.sample, row.source, strict=True) if of == place]
            for place, name in enumerate(now)}  # fmt: skip
    already = before.order.batch(0)
    left = set(range(12)) - set(already.sample[already.source == 0].tolist())
    assert sorted(sample for epoch, sample in told["photos"] if epoch == 0) == sorted(left)
    assert {epoch for epoch, _ in told["art"]} == {1}  # the epoch under way is left, a whole one begins
    assert sorted(sample for epoch, sample in told["maps"] if epoch == 0) == list(range(4))
    again = stream(now, saved_state(after), global_batch=12)  # once taken up, it is the data of the run
    assert again.state() == after.state()
    assert again.order.batch(2).sample.tolist() == rows[1].sample.tolist()


def test_weights_that_leave_nothing_are_refused(photos: dict[str, Source]) -> None:
    idle = photos["photos"].model_copy(update={"later_weights": {4: 0.0}})
    with pytest.raises(ConfigError, match="every source has weight 0 from global batch 4 on"):
        stream({"photos": idle})
