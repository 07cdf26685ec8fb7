"""Tars without an index: nothing is lost over restarts with other ranks, what is damaged is named, and what is dangerous refused."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making_data import png, write_dataset

from clipscale.data.sample import BadSample, Batch
from clipscale.data.sources import Source
from clipscale.data.sources.shards import Shards
from clipscale.data.sources.tars import Tars
from clipscale.data.stream import TrainingStream, resume_batches
from clipscale.data.streamed import Finished
from clipscale.data.unindexed import UnindexedTars
from clipscale.errors import ConfigError, DataError, ShardError
from clipscale.inputs import ImageInput, Input, Modality

INPUTS: dict[Modality, Input] = {"image": ImageInput(size=8)}
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]


def stream(sources: dict[str, Source], saved: dict[str, Any] | None = None, **changes: Any) -> TrainingStream:
    settings: dict[str, Any] = {"seed": 0, "global_batch": 6, "lanes": None, "bucket_batches": 1, "allow_change": False, **changes}
    return resume_batches(saved, sources, kind="pairs", modalities=("image", "image"), inputs=INPUTS, **settings)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> dict[str, Source]:
    """Seven tars, 40 samples."""
    return {"web": Tars(url=str(write_dataset(tmp_path / "web", [9, 1, 7, 3, 8, 8, 4])), shuffle_samples=5)}


def keys(batches: list[Batch]) -> Counter[str]:
    return Counter(key for batch in batches for key in batch.keys)


def test_one_reader_goes_through_exact_epochs_in_an_order_of_its_own(tars: dict[str, Source]) -> None:
    one = stream(tars, global_batch=5, seed=3)
    drawn = list(itertools.islice(one, 24))
    seeds = [seed for batch in drawn for seed in batch.seeds.tolist()]
    assert len(set(seeds)) == len(seeds)  # every sample augmented anew in every epoch
    assert set(keys(drawn).values()) <= {2, 3, 4}  # 120 of 40 samples; the buffer reaches over the ends of epochs
    assert [batch.keys for batch in itertools.islice(stream(tars, global_batch=5, seed=3), 24)] == [batch.keys for batch in drawn]
    assert one.epochs()["web"] == pytest.approx(3, abs=0.7)


@pytest.mark.parametrize("case", range(3))
def test_restarts_with_other_ranks_and_workers_lose_no_sample(tars: dict[str, Source], case: int) -> None:
    """Every tar is finished in every epoch that is; samples of tars that were begun come again, and no others."""
    rng = np.random.default_rng(case)
    state: dict[str, Any] | None = None
    drawn: list[Batch] = []
    for _ in range(4):
        world = int(rng.choice([1, 2, 3]))
        ranks = [stream(tars, state, rank=rank, world=world, workers=int(rng.integers(0, 3))) for rank in range(world)]
        for _ in range(int(rng.integers(1, 8))):
            taken = [next(rank) for rank in ranks]
            drawn += taken
            for rank, batch in itertools.product(ranks, taken):
                rank.note(batch.finished)
        states = [json.loads(json.dumps(rank.state())) for rank in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
        for rank in ranks:
            rank.close()
    assert state is not None
    finished = Finished(**state["finished"]["web"])
    times = keys(drawn)
    whole = finished.before // 7  # epochs of which every tar was finished
    assert min(times[f"{number:06d}"] for number in range(40)) >= whole
    last = list(itertools.islice(stream(tars, state), 40))
    again = Counter(place for batch in last for place in batch.finished.get("web", []))
    assert set(again.values()) == {1}
    assert all(place >= finished.before and place not in finished.besides for place in again)


def test_finished_shards_are_told_in_few_numbers() -> None:
    finished = Finished()
    for place in (0, 2, 3, 4, 1, 9, 7, 8, 20):
        finished.add(place)
    assert finished.state() == {"before": 5, "besides": "7-9,20"}
    assert finished.total == 9
    again = Finished(**finished.state())
    assert list(itertools.islice(again.left(), 5)) == [5, 6, 10, 11, 12]
    again.add(3)
    assert again.state() == finished.state()


def test_every_rank_takes_its_share_of_every_source(tmp_path: Path, tars: dict[str, Source]) -> None:
    more = {**tars, "more": Tars(url=str(write_dataset(tmp_path / "more", [4, 4])), weight=2.0, shuffle_samples=2)}
    batches = [next(stream(more, rank=rank, world=2)) for rank in range(2)]
    assert [{name: took["rows"] for name, took in batch.reading.items()} for batch in batches] == [{"web": 1, "more": 2}] * 2


def test_what_is_lost_is_said_once(tars: dict[str, Source], capsys: pytest.CaptureFixture[str]) -> None:
    stream(tars, rank=0, world=2)
    stream(tars, rank=1, world=2)
    told = capsys.readouterr().err
    assert told.count("'web' (7 tars) have no index and are streamed") == 1
    assert "samples of tars that were begun come again" in told
    assert "clipscale-shards index" in told


def test_what_cannot_be_read_keeps_its_slot_and_is_named(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "good.png": png(1), "good.json": b'{"caption": "a caption of the record"}',
            "alone.txt": b"no picture",
            "torn.png": png(2)[:40], "torn.txt": b"t",
            "mute.png": png(3),
            "twice.png": png(4), "twice.txt": b"t",
        },
    )  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        header = tarfile.TarInfo("twice.txt")
        tar.addfile(header, io.BytesIO())
    batch = next(stream({"web": Tars(url=str(tmp_path), shuffle_samples=12)}, global_batch=12))
    reasons = {bad.key: bad.reason for bad in batch.bad}
    assert {key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid} == {"good", "twice"}
    assert "no image" in reasons["alone"]
    assert "png picture is damaged" in reasons["torn"]
    assert "no usable caption" in reasons["mute"]
    assert "more than once" in reasons["twice.txt"]
    assert {bad.source for bad in batch.bad} == {"web"}
    assert batch.captions[batch.keys.index("good")] == "a caption of the record"


def test_a_tar_that_ends_too_early_loses_its_rest_and_says_so(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [5])
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:6000])  # inside the second sample
    samples = list(UnindexedTars(str(folder)).read_shard(0))
    assert samples[0].key == "000000"
    assert isinstance(samples[-1], BadSample)
    assert "damaged tar, whatever followed in it is lost" in samples[-1].reason


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "went off",))  # type: ignore[return-value]

    members = {"a.png": png(1), "a.txt": b"one", "a.pyd": pickle.dumps(Bomb()), "a.pickle": pickle.dumps(Bomb()), "a.pth": b"x"}
    write_tar(tmp_path / "data" / "a.tar", members)
    (sample,) = UnindexedTars(str(tmp_path / "data")).read_shard(0)
    assert sample.key == "a"
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat x.tar", "run shell commands and are refused"),
        ("data/../../secret", r"without '\.\.'"),
        ("nowhere", "there is no such folder"),
        ("no-such-scheme://x", "no-such-scheme"),
    ],
)
def test_addresses_that_are_not_read(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        UnindexedTars(url)


def test_what_needs_an_index_is_refused(tmp_path: Path, tars: dict[str, Source]) -> None:
    with pytest.raises(ConfigError, match="bucket_batches needs lengths"):
        stream(tars, bucket_batches=4)
    indexed = Shards(url=str(write_dataset(tmp_path / "indexed", [6])))
    with pytest.raises(DataError, match="web are tars without an index, the other sources have one"):
        stream({**tars, "indexed": indexed})
    state = json.loads(json.dumps(stream(tars).state()))
    (tmp_path / "web" / "000006.tar").unlink()
    with pytest.raises(DataError, match=r"source 'web' held 7 tars, holds 6 tars"):
        stream(tars, state)
    with pytest.raises(DataError, match=r"indexed since"):
        stream({"web": indexed}, state, allow_change=True)


def test_tars_without_samples_end_a_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"read.me": b"nothing here"})
    with pytest.raises(ShardError, match="no sample in 2 tars one after the other"):
        next(stream({"web": Tars(url=str(tmp_path))}))
