"""Lists of addresses: hostile servers, kills and reservations, by the command, on a server of this machine alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_server import BOMB, GOOD, HOSTILE, Server, hostile_server
from making_data import png

from clipscale.data.shards import Sample, open_dataset

ROOT = Path(__file__).parents[2]
QUICK = ("--allow-loopback", "--host-rate", 0, "--per-host", 16, "--deadline", 2, "--read-timeout", 1, "--max-bytes", 2_000_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with hostile_server() as running:
        yield running


WITH_MEMORY = """
import atexit, pathlib
atexit.register(lambda: print(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)))
from data_tools.cli import main
main()
"""
"""The command; at its end it says how much memory it had at most."""


def run(*arguments: object, code: int = 0, program: str = "from data_tools.cli import main; main()") -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def listed(server: Server, names: list[str], path: Path) -> Path:
    path.write_text("".join(f"{server.url}/{name}\ta picture called {name}\n" for name in names))
    return path


def packed(folder: Path) -> dict[str, bytes | None]:
    """The images of a data set, by what follows the last slash of their address."""
    index = open_dataset(folder)
    samples = [sample for shard in range(len(index.shards)) for sample in index.read(shard, range(int(index.samples[shard])))]
    assert all(isinstance(sample, Sample) for sample in samples)
    return {sample.record["url"].rpartition("/")[2]: sample.image for sample in samples if isinstance(sample, Sample)}


def failures(folder: Path) -> dict[str, str]:
    """Reasons by row."""
    lines = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()}


def test_each_hostile_answer_is_refused_with_its_reason_and_the_others_are_unharmed(server: Server, tmp_path: Path) -> None:
    assert len(BOMB) < 500_000
    names = [name for pair in zip([*GOOD, *["good1.png"] * 9], HOSTILE, strict=False) for name in pair]
    names = list(dict.fromkeys([*names, *HOSTILE, *GOOD]))
    path = listed(server, names, tmp_path / "list.txt")
    path.write_text(
        path.read_text() + "file:///etc/passwd\ta file\nhttp://192.168.0.1/a.png\ta neighbour\nhttp://[fd00::1]/a.png\tanother\n"
    )
    told_memory = run("build", path, tmp_path / "set", *QUICK, "--workers", 1, "--samples-per-shard", 20, program=WITH_MEMORY)
    told = failures(tmp_path / "set")
    expected = {f"list.txt:{names.index(name) + 1}": reason for name, (_, reason) in HOSTILE.items()}
    expected |= {f"list.txt:{len(names) + more}": "forbidden address" for more in (1, 2, 3)}
    assert told == expected
    good = {name: png(int(name.removeprefix("good").removesuffix(".png"))) for name in GOOD if name.startswith("good")}
    assert packed(tmp_path / "set") == {**good, "moved.png": png(3), "open.png": png(40), "once.png": png(41)}
    assert int(told_memory.rpartition("VmHWM:")[2].split()[0]) < 300_000  # kB, fetching and packing together


def test_a_build_killed_while_fetching_goes_on_with_what_it_has_and_asks_for_nothing_twice(server: Server, tmp_path: Path) -> None:
    names = [f"good{number}.png?{query}" for query in range(12) for number in range(20)] + ["missing.png"]
    path = listed(server, names, tmp_path / "list.txt")
    options = ("--allow-loopback", "--host-rate", 0, "--samples-per-shard", 50, "--workers", 2, "--per-host", 2)
    whole = tmp_path / "whole"
    run("build", path, whole, *options)
    once = len(server.paths())
    assert once == len(names)
    for enough in (once + 70, once + 150):
        process = subprocess.Popen(
            [sys.executable, "-m", "data_tools", "build", str(path), str(tmp_path / "set"), *map(str, options)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while len(server.paths()) < enough:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run("build", path, tmp_path / "set", *options)
    assert contents(tmp_path / "set") == contents(whole)
    assert len(server.paths()) - once <= len(names) + 2 * 2 * 2  # what was under way at a kill is asked for again, nothing else
    assert not list((tmp_path / "set").glob(".*"))


def test_robots_txt_is_honoured_and_the_flag_says_so(server: Server, tmp_path: Path) -> None:
    server.robots = b"User-agent: clipscale-shards\nDisallow: /good1.png\nUser-agent: *\nDisallow: /good2.png\n"
    path = listed(server, ["good1.png", "good2.png", "noai.png", "tdm.png"], tmp_path / "list.txt")
    run("build", path, tmp_path / "set", *QUICK, "--workers", 1)
    assert failures(tmp_path / "set") == {"list.txt:1": "robots.txt", "list.txt:3": "opted out", "list.txt:4": "opted out"}
    assert "/good1.png" not in server.paths()
    assert {headers["user-agent"].partition("/")[0] for _, headers in server.asked} == {"clipscale-shards"}
    run("build", path, tmp_path / "all", *QUICK, "--workers", 1, "--ignore-robots", "--ignore-opt-out")
    assert set(packed(tmp_path / "all")) == {"good1.png", "good2.png", "noai.png", "tdm.png"}


def test_without_the_flag_this_machine_is_not_asked(server: Server, tmp_path: Path) -> None:
    path = listed(server, ["good1.png"], tmp_path / "list.txt")
    told = run("build", path, tmp_path / "set", code=1)
    assert "forbidden address" in told
    assert not server.asked


def test_tables_and_parquet_name_addresses_in_a_column(server: Server, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"URL,TEXT\n{server.url}/good1.png,one\n{server.url}/good2.png?a=1,two\n")
    told = run("build", table, tmp_path / "set", *QUICK, "--workers", 1)
    assert "image: column URL" in told
    assert packed(tmp_path / "set") == {"good1.png": png(1), "good2.png?a=1": png(2)}
    lines = tmp_path / "list.jsonl"
    lines.write_text(json.dumps({"url": f"{server.url}/good5.png", "caption": "five"}) + "\n")
    assert "to be fetched" in run("build", lines, tmp_path / "none", "--dry-run")
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{server.url}/good7.png\n")
    assert "caption-template" in run("build", plain, tmp_path / "none", code=2)
