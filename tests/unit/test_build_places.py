"""Builds by several nodes, and into stores: the same bytes as on one node into a folder, whatever ends when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from making_data import png
from PIL import Image

from clipscale.data.shards import open_dataset
from clipscale.errors import ConfigError, DataError, RunError
from data_tools.build import Node, build, finish_build
from data_tools.packing import Packing
from data_tools.rows import Rows, open_rows
from data_tools.tally import Progress

PACKING = Packing(samples_per_shard=3)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """A table of 20 pictures, one of which cannot be read: 7 shards."""
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png(number) if number != 7 else b"broken")
    lines = [f"{number}.png,picture {number}" for number in range(20)]
    (tmp_path / "in.csv").write_text("\n".join(["file,caption", *lines]))
    return open_rows(tmp_path / "in.csv")


@pytest.fixture
def store() -> Iterator[str]:
    """An empty store in memory."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://bucket/photos"
    MemoryFileSystem.store.clear()


def whole(rows: Rows, tmp_path: Path) -> dict[str, bytes]:
    """What one node makes of the rows in a folder."""
    build(rows, tmp_path / "whole", packing=PACKING, workers=1, max_bad=0.1)
    return {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_store(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(root + "/"): files.cat_file(name) for name in files.find(root)}


def test_nodes_build_disjoint_shards_and_the_last_one_writes_the_index(rows: Rows, tmp_path: Path) -> None:
    expected, out = whole(rows, tmp_path), tmp_path / "out"
    for number, unfinished in ((0, 4), (1, 2)):
        summary = build(rows, out, packing=PACKING, workers=1, max_bad=0.1, node=Node(number, 3))
        assert (summary.shards, summary.unfinished) == (3 - (number > 0), unfinished)
        assert not (out / "index.parquet").exists()
    assert sorted(path.stem for path in out.glob("*.tar")) == ["000000", "000001", "000003", "000004", "000006"]
    with pytest.raises(RunError, match=r"2 of 7 shards are not done \(000002, 000005\)"):
        finish_build(out)
    assert build(rows, out, packing=PACKING, workers=1, max_bad=0.1, node=Node(2, 3)).samples == 19
    assert in_folder(out) == expected
    assert finish_build(out).samples == 19


def test_nodes_wait_for_the_plan_and_end_in_any_order(rows: Rows, tmp_path: Path) -> None:
    expected, out, unfinished = whole(rows, tmp_path), tmp_path / "out", []

    def work(number: int) -> None:
        time.sleep(0.3 * (number == 0))  # the one who plans comes last
        unfinished.append(build(rows, out, packing=PACKING, workers=1, max_bad=0.1, node=Node(number, 3), wait_s=30).unfinished)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(unfinished)[0] == 0
    assert in_folder(out) == expected


def test_a_node_without_a_plan_gives_up_and_one_with_another_request_is_refused(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no plan after 0 s; node 0 writes it, or run the same command with --plan-only"):
        build(rows, tmp_path / "out", packing=PACKING, node=Node(1, 2), wait_s=0.2)
    assert build(rows, tmp_path / "out", packing=PACKING, plan_only=True).unfinished == 7
    assert not list((tmp_path / "out").glob("*.tar"))
    with pytest.raises(DataError, match="it holds the plan of another build"):
        build(rows, tmp_path / "out", packing=Packing(samples_per_shard=4), node=Node(1, 2))
    with pytest.raises(ConfigError, match="numbered from 0 to 1"):
        build(rows, tmp_path / "out", packing=PACKING, node=Node(2, 2))
    with pytest.raises(RunError, match=r"7 of 7 shards are not done \(000000, 000001, 000002, 000003, 000004, \.\.\.\)"):
        finish_build(tmp_path / "out")
    with pytest.raises(DataError, match="no build in it to finish"):
        finish_build(tmp_path / "none")


def test_a_store_gets_the_bytes_of_a_folder_and_nothing_else(rows: Rows, tmp_path: Path, store: str) -> None:
    expected = whole(rows, tmp_path)
    assert build(rows, store, packing=PACKING, max_bad=0.1, scratch=tmp_path / "scratch").samples == 19
    assert in_store(store) == expected
    assert not list((tmp_path / "scratch").iterdir())
    assert open_dataset(store).totals["samples"] == 19
    assert build(rows, store, packing=PACKING, max_bad=0.1, scratch=tmp_path / "scratch").reused_shards == 7


def test_a_build_into_a_store_that_stopped_goes_on_and_never_shows_half_a_shard(rows: Rows, tmp_path: Path, store: str) -> None:
    expected, uploads = whole(rows, tmp_path), []
    put = MemoryFileSystem.put_file

    def fail_at(number: int, left: list[str]) -> None:
        def failing(self: MemoryFileSystem, here: str, there: str, **options: object) -> None:
            left.append(there)
            if len(left) == number:
                raise OSError("the network is gone")
            put(self, here, there, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryFileSystem, "put_file", failing)
            build(rows, store, packing=PACKING, max_bad=0.1, scratch=tmp_path / "scratch")

    fail_at(0, uploads)
    names = [name.rpartition("/photos/")[2] for name in uploads]
    assert names.index("000003.tar") < names.index("000003.parquet") < names.index(".build/000003.json") < names.index("sizes.json")
    assert names[-1] == "index.parquet"
    for number in range(1, len(uploads) + 1):
        MemoryFileSystem.store.clear()
        with pytest.raises(RunError, match="the network is gone"):
            fail_at(number, [])
        shown = in_store(store)
        assert "index.parquet" not in shown
        assert all(shown[name] == expected[name] for name in shown if name.endswith((".tar", ".parquet")) and name in expected)
        assert build(rows, store, packing=PACKING, max_bad=0.1, scratch=tmp_path / "scratch").samples == 19
        assert in_store(store) == expected


class Slow(LocalFileSystem):
    """A store whose uploads can be seen before they are whole."""

    protocol = "slowly"

    def put_file(self, lpath: str, rpath: str, **_: object) -> None:
        data = Path(lpath).read_bytes()
        with Path(rpath).open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            seen.append(sorted(path.name for path in Path(rpath).parents[1].rglob("*")))
            file.write(data[len(data) // 2 :])


seen: list[list[str]] = []


def test_where_uploads_grow_in_sight_they_get_their_name_at_the_end(rows: Rows, tmp_path: Path) -> None:
    fsspec.register_implementation("slowly", Slow, clobber=True)
    expected = whole(rows, tmp_path)
    out = tmp_path / "stores" / "out"
    build(rows, f"slowly://{out}", packing=PACKING, workers=1, max_bad=0.1, scratch=tmp_path / "scratch")
    assert in_folder(out) == expected
    assert any(name.startswith("upload-") and name.endswith("000000.tar") for name in seen[2])
    assert "000000.tar" not in seen[2]


def test_addresses_that_cannot_be_reached_are_refused_before_work(rows: Rows) -> None:
    with pytest.raises(DataError, match="nowhere"):
        build(rows, "nowhere://bucket/x")


def test_a_full_disk_leaves_whole_shards_and_the_build_goes_on_when_there_is_room(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "small").mkdir()
    for number in range(64):
        noise = np.random.default_rng(number).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{number:02d}.jpg")
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"noise {number}")
    packing = Packing(samples_per_shard=8, image_format="png")
    command = f"{sys.executable} -m data_tools build in small/out --samples-per-shard 8 --image-format png --workers 2"
    script = (
        f"mount -t tmpfs -o size=1500k none small || exit 99; {command}; echo code $?; ls -A small/out > listed; "
        f"mount -o remount,size=64m small; {command} && cp -r small/out copy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=300,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here to mount a small disk with")
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    assert "No space left on device. What is finished is kept: run the same command again" in done.stderr
    assert "code 1" in done.stdout
    listed = (tmp_path / "listed").read_text().split()
    assert "000000.tar" in listed
    assert not [name for name in listed if ".tmp-" in name or name == "index.parquet"]
    build(open_rows(tmp_path / "in"), tmp_path / "whole", packing=packing, workers=1)
    copied, expected = in_folder(tmp_path / "copy"), in_folder(tmp_path / "whole")
    del copied["build.json"], expected["build.json"]  # which say how the input was called
    assert copied == expected


def test_progress_tells_rows_failures_and_bytes_of_this_node(rows: Rows, tmp_path: Path) -> None:
    told: list[tuple[Progress, int]] = []
    build(rows, tmp_path / "out", packing=PACKING, workers=1, max_bad=0.1, show=lambda progress, total: told.append((progress, total)))
    progress, total = told[-1]
    assert (progress.rows, progress.failed, total) == (20, 1, 20)
    assert json.loads((tmp_path / "out" / "failures.jsonl").read_text())["row"] == "in.csv:9"
