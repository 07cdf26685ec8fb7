"""Stores that fail: a real web server on this machine stalls, lies and breaks off, and the batches are the same."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from making_data import write_dataset
from unreliable_server import FAULTS, UnreliableServer, unreliable_server

from clipscale.data.dataset import DatasetIndex
from clipscale.data.opening import open_dataset
from clipscale.data.sample import Sample
from clipscale.data.shard_cache import Cache, ShardCache
from clipscale.data.store import Block, Reading, Store, join
from clipscale.errors import DataError, ShardError

SIZES = [24, 15, 1]
PATIENT = Reading(timeout_s=0.3, tries=14, pause_s=0.001, gap_bytes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("served"), SIZES)


@pytest.fixture
def server(folder: Path) -> Iterator[UnreliableServer]:
    pytest.importorskip("aiohttp", reason="reading over http needs aiohttp: pip install 'clipscale[http]'")
    with unreliable_server(folder) as about:
        yield about


def all_samples(opened: DatasetIndex) -> list[list[Sample | ShardError]]:
    """Every sample, a few at a time, out of order."""
    batches = [(shard, list(range(first, SIZES[shard], 7))) for shard in range(len(SIZES)) for first in range(7)]
    random.Random(1).shuffle(batches)
    return [opened.read(shard, rows) for shard, rows in batches]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_thing_that_goes_wrong_often_costs_no_sample(fault: str, server: UnreliableServer, folder: Path) -> None:
    server.faults, server.share, server.stall_s = [fault], 0.2, 0.5
    opened = open_dataset(server.url, reading=PATIENT)
    assert all_samples(opened) == all_samples(open_dataset(folder))
    assert server.sent[fault] > 0
    assert opened.counters["retries"] > 0


@pytest.mark.parametrize("cached", [False, True])
def test_everything_that_goes_wrong_at_times_costs_no_sample(cached: bool, server: UnreliableServer, folder: Path, tmp_path: Path) -> None:
    server.faults, server.share, server.stall_s = FAULTS, 0.25, 0.4
    cache = Cache(folder=str(tmp_path), max_bytes=300_000) if cached else None
    opened = open_dataset(server.url, reading=PATIENT.model_copy(update={"block_bytes": 20_000}), cache=cache)
    expected = all_samples(open_dataset(folder))
    assert all(all_samples(opened) == expected for _ in range(3))
    assert cached or len(server.sent) > 6  # kinds of answers
    if cached:
        assert (opened.counters["cache_misses"], sum(opened.counters[name] for name in ("cache_hits", "cache_misses"))) == (3, 63)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "after 3 tries: ClientResponseError: 500"),
        ("close", "after 3 tries: ServerDisconnectedError"),
        ("stall", r"after 3 tries: no answer in 0\.2 s"),
        ("short", "after 3 tries: .* were asked for, .* came; the store must answer byte ranges"),
        ("whole", "after 3 tries: .* were asked for, .* came; the store must answer byte ranges"),
        ("shifted", "sample '00000[02]' is not the one that was written"),
        ("flipped", "sample '00000[02]' is not the one that was written"),
    ],
)
def test_what_is_never_right_is_an_error_that_says_what_came(fault: str, message: str, server: UnreliableServer, tmp_path: Path) -> None:
    reading = Reading(timeout_s=0.2, tries=3, pause_s=0.001, gap_bytes=0)
    opened = open_dataset(server.url, reading=reading)
    opened.key(0, 0)  # the sidecar is there
    cached = open_dataset(server.url, reading=reading, cache=Cache(folder=str(tmp_path)))
    cached.key(0, 0)
    server.faults, server.share, server.stall_s = [fault], 1.0, 0.6
    for sample in opened.read(0, [0, 2]):
        with pytest.raises(ShardError, match=f"000000.tar.*{message}"):
            raise sample  # type: ignore[misc]
    if fault == "whole":  # which is what a cache wants
        assert cached.read(0, [0, 2]) == open_dataset(server.folder).read(0, [0, 2])
        return
    for sample in cached.read(0, [0, 2]):
        with pytest.raises(ShardError, match=message if "sample" not in message else "the store sent other bytes"):
            raise sample  # type: ignore[misc]
    assert not [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_missing_file_is_not_asked_for_again(server: UnreliableServer) -> None:
    store = Store(server.url, reading=PATIENT)
    with pytest.raises(FileNotFoundError):
        store.read("nothing.tar")
    assert "is gone since" in str(store.ranges("nothing.tar", [(0, 5)])[0])
    assert server.asked["nothing.tar"] == 2
    with pytest.raises(DataError, match=r"no index\.parquet; there is no such file"):
        open_dataset(f"{server.url}/nowhere")


def test_lengths_come_from_as_many_sidecars_at_a_time_as_there_may_be_connections(tmp_path: Path) -> None:
    """A gate that opens when five requests have come lets all of them through; one for eight never opens."""
    pytest.importorskip("aiohttp", reason="reading over http needs aiohttp: pip install 'clipscale[http]'")
    write_dataset(tmp_path, [1] * 40)
    with unreliable_server(tmp_path) as server:
        opened = open_dataset(server.url, reading=PATIENT.model_copy(update={"connections": 5, "timeout_s": 20.0}))
        server.asked.clear()
        for number, opens in ((5, True), (8, False)):
            server.gate = threading.Barrier(number, timeout=10 if opens else 0.5)
            assert np.concatenate(list(opened.lengths(range(40), "text"))).tolist() == [1] * 10 + [2] * 30  # "0" to "39"
            assert server.gate.broken is not opens
        assert server.asked == {f"{number:06d}.parquet": 2 for number in range(40)}
        server.gate, server.faults, server.share, server.stall_s = None, FAULTS, 0.3, 0.4
        flaky = open_dataset(server.url, reading=PATIENT)
        assert np.concatenate(list(flaky.lengths(range(40), "text"))).tolist() == [1] * 10 + [2] * 30
        assert flaky.counters["retries"] > 0
        (tmp_path / "000030.parquet").unlink()
        with pytest.raises(ShardError, match=r"000030\.parquet is gone since"):
            list(flaky.lengths(range(40), "text"))


def test_neighbours_are_read_in_one_request(server: UnreliableServer, folder: Path) -> None:
    assert join([(700, 100), (0, 100), (100, 50), (2000, 9), (210, 90)], gap_bytes=60, block_bytes=500) == [
        Block(0, 300, [1, 2, 4]),
        Block(700, 100, [0]),
        Block(2000, 9, [3]),
    ]
    assert join([(0, 100), (100, 100), (200, 600)], gap_bytes=0, block_bytes=200) == [Block(0, 200, [0, 1]), Block(200, 600, [2])]
    opened = open_dataset(server.url)
    opened.key(0, 0)
    before = dict(opened.counters)
    assert opened.read(0, range(5, 15)) == open_dataset(folder).read(0, range(5, 15))
    assert server.asked["000000.tar"] == 1
    spans = opened.sidecar(0).columns
    size = int(spans["offset"][14] + spans["bytes"][14] - spans["offset"][5])
    assert (opened.counters["reads"] - before["reads"] - 1, opened.counters["retries"]) == (1, 0)  # one more is sidecar()'s
    assert opened.counters["bytes"] - before["bytes"] - (folder / "000000.parquet").stat().st_size == size


def read_in_process(url: str, cache: Cache, results: multiprocessing.SimpleQueue[object]) -> None:
    opened = open_dataset(url, reading=PATIENT, cache=cache)
    results.put((len(all_samples(opened)), dict(opened.counters)))


def test_processes_of_a_node_fetch_each_tar_once(server: UnreliableServer, tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path / "cache"))
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    processes = [context.Process(target=read_in_process, args=(server.url, cache, results)) for _ in range(3)]
    for process in processes:
        process.start()
    told = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [server.asked[f"{shard:06d}.tar"] for shard in range(3)] == [1, 1, 1]
    assert sum(counters["cache_misses"] for _, counters in told) == 3  # type: ignore[misc,attr-defined]
    assert all(read == 21 for read, _ in told)  # type: ignore[misc]


def test_a_forked_reader_goes_on_where_its_parent_read(server: UnreliableServer, folder: Path) -> None:
    opened = open_dataset(server.url, reading=PATIENT)
    expected = opened.read(0, [3])
    child = os.fork()
    if child == 0:
        os._exit(0 if opened.read(0, [3]) == expected and opened.read(1, [0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert expected == open_dataset(folder).read(0, [3])


# the cache


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def cached(cache: ShardCache, data: bytes, fetched: list[bytes]) -> bytes:
    def fetch(write: Callable[[bytes], object]) -> None:
        fetched.append(data)
        write(data[:5])
        write(data[5:])

    before = len(fetched)
    with cache.opened(digest(data), len(data), fetch) as (descriptor, hit):
        assert hit == (len(fetched) == before)
        return os.pread(descriptor, len(data) + 1, 0)


def test_the_least_recently_used_tar_makes_room(tmp_path: Path) -> None:
    cache, fetched = ShardCache(Cache(folder=str(tmp_path), max_bytes=30)), list[bytes]()
    first, second, third, fourth = (bytes([number]) * 10 for number in range(4))
    for data in (first, second, third, first, fourth):
        assert cached(cache, data, fetched) == data
    assert fetched == [first, second, third, fourth]
    assert {path.stem for path in tmp_path.glob("*.tar")} == {digest(data).hex() for data in (first, third, fourth)}
    assert cached(cache, second, fetched) == second
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) == 30


def test_what_is_removed_can_be_read_to_its_end(tmp_path: Path) -> None:
    cache, fetched = ShardCache(Cache(folder=str(tmp_path), max_bytes=10)), list[bytes]()
    with cache.opened(digest(b"0123456789"), 10, lambda write: write(b"0123456789")) as (descriptor, hit):
        assert not hit
        assert cached(cache, b"9876543210", fetched) == b"9876543210"
        assert os.pread(descriptor, 10, 0) == b"0123456789"


def test_a_tar_that_the_disk_damages_or_cuts_is_fetched_again(tmp_path: Path, folder: Path) -> None:
    opened = open_dataset(folder, cache=Cache(folder=str(tmp_path)))
    expected = open_dataset(folder).read(0, range(24))
    assert opened.read(0, range(24)) == expected
    kept = next(tmp_path.glob("*.tar"))
    kept.write_bytes(kept.read_bytes()[:9_000] + b"?" * 900 + kept.read_bytes()[9_900:])
    assert opened.read(0, range(24)) == expected
    os.truncate(kept, 500)
    assert opened.read(0, range(24)) == expected
    assert opened.counters["cache_misses"] == 3


def test_what_a_killed_process_left_half_fetched_takes_no_room(tmp_path: Path) -> None:
    left = tmp_path / f"{digest(b'left').hex()}.part"
    left.write_bytes(bytes(95))
    cache, fetched = ShardCache(Cache(folder=str(tmp_path), max_bytes=100)), list[bytes]()
    assert cached(cache, bytes(50), fetched) == bytes(50)
    assert not left.exists()


def test_a_cache_that_cannot_hold_a_tar_or_be_written_is_refused(tmp_path: Path, folder: Path) -> None:
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    with pytest.raises(DataError, match=f"the largest tar has {largest:,} bytes; allow more"):
        open_dataset(folder, cache=Cache(folder=str(tmp_path), max_bytes=largest - 1))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        open_dataset(folder, cache=Cache(folder=str(tmp_path / "file")))
