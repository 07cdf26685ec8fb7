"""The search for the largest micro-batch that fits, and what is said when memory runs out."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_run, write_squares

from clipscale import train
from clipscale.config import Run, validate
from clipscale.errors import ConfigError
from clipscale.memory.micro_batch import MicroBatch
from clipscale.metrics import read_json_lines
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model

GIB = 2**30


def search(peak: Callable[[int], int], *, share: int, limit: int) -> tuple[list[int], str]:
    """The sizes of the steps up to the one that ends the search, and what it tells."""
    sought, sizes = MicroBatch("auto", share=share, limit=limit), []
    for _ in range(30):
        sizes.append(sought.rows or share)
        if told := sought.learn(peak(sizes[-1])):
            return [*sizes, sought.rows or share], told
    raise AssertionError(f"no end: {sizes}")


def test_the_search_at_most_doubles_and_never_tries_what_does_not_fit() -> None:
    sizes, told = search(lambda rows: (100 + 3 * rows) * GIB, share=4096, limit=1000 * GIB)
    assert sizes == [8, 8, 16, 32, 64, 128, 256, 288, 296, 296]
    assert max(sizes) * 3 + 100 <= 1000 < (max(sizes) + 8) * 3 + 100, "the largest multiple of eight"
    assert told == "296 rows at a time: 988.00 of 1000.00 GiB"


def test_what_fits_whole_is_taken_in_one_graph() -> None:
    sizes, told = search(lambda rows: 5 * GIB + rows, share=100, limit=6 * GIB)
    assert sizes == [8, 8, 16, 32, 64, 100, 100]
    assert told.startswith("the whole share of a rank in one graph: 5.00 of 6.00 GiB")


def test_memory_that_jumps_takes_the_search_one_size_back() -> None:
    sizes, _ = search(lambda rows: 10 * rows if rows < 60 else 100_000, share=4096, limit=2000)
    assert sizes == [8, 8, 16, 32, 64, 32]


def test_too_little_even_for_eight_rows_goes_down_to_one() -> None:
    sizes, told = search(lambda _: 7 * GIB, share=64, limit=1 * GIB)
    assert sizes == [8, 8, 4, 2, 1]
    assert told == "1 row at a time, and still above the 1.00 GiB it may use"


def test_a_search_goes_on_from_a_checkpoint_and_begins_anew_for_another_share() -> None:
    first = MicroBatch("auto", share=512, limit=100)
    for _ in range(3):
        first.learn(10)
    saved = json.loads(json.dumps(first.state()))
    again, other, fixed = (
        MicroBatch("auto", share=512, limit=100),
        MicroBatch("auto", share=256, limit=100),
        MicroBatch(4, share=9, limit=None),
    )
    for sought in (again, other, fixed):
        sought.take_up(saved)
    assert (first.rows, again.rows, other.rows, fixed.rows) == (32, 32, 8, 4)
    assert again.learn(99) == first.learn(99)


def test_a_run_finds_its_micro_batch_by_its_own_memory_and_remembers_it(tmp_path: Path) -> None:
    """In a process of its own, where nothing that others freed is left; a resume in another finds it again."""
    data = write_squares(tmp_path, samples=256)
    settings = tiny_run(tmp_path, data, micro_batch="auto", steps=11, checkpoints={"every_steps": 11})
    settings["towers"]["image"] = {"name": "conv_image", "image_size": 16, "channels": [512], "width": 8, "layers": 1}
    settings["pair_kinds"]["image_text"]["global_batch"] = 256
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as process:  # a Pool sends SIGTERM, which training outlives
        limit, found = process.submit(train_within, settings, 0.15).result()
    run = validate(Run, {**settings, "memory_gb": limit})
    events = [record for record in read_json_lines(run.run_folder / "events.jsonl") if record["event"] == "micro_batch"]
    peaks = [max(record["peak_bytes"].values()) for record in read_json_lines(run.run_folder / "timings.jsonl")]
    assert [event["detail"].split()[0] for event in events] == [str(found)]
    assert 16 <= found < 256
    assert max(peaks[-3:]) <= limit * GIB
    resumed = train._Training(run, Mesh.single())
    resumed.start()
    resumed.closing.close()
    assert resumed.micro_batch.rows == found


def train_within(settings: dict[str, Any], room_gb: float) -> tuple[float, int | None]:
    """Train in memory that is `room_gb` above what this process holds; the limit in GiB, and the micro-batch found."""
    torch.set_num_threads(1)
    build_model(validate(Run, settings))  # what towers import is not the step's
    limit = resident() / GIB + room_gb
    training = train._Training(validate(Run, {**settings, "memory_gb": limit}), Mesh.single())
    training.start()
    training.run_to(settings["steps"])
    training.closing.close()
    return limit, training.micro_batch.rows


def test_auto_needs_a_limit_on_the_cpu_and_a_limit_needs_auto(tmp_path: Path) -> None:
    data = write_squares(tmp_path, samples=12)
    run = validate(Run, tiny_run(tmp_path, data, micro_batch="auto"))
    with pytest.raises(ConfigError, match="auto on the CPU needs memory_gb"):
        train.train(run, Mesh.single())
    assert not run.run_folder.exists()
    with pytest.raises(ConfigError, match="memory_gb: it is what `micro_batch: auto` may use"):
        validate(Run, tiny_run(tmp_path, data, micro_batch=4, memory_gb=1.0))


def test_memory_that_runs_out_ends_with_1_and_says_in_which_phase_and_what_to_lower(tmp_path: Path) -> None:
    """In a process that may take 1.75 GiB of addresses more than its imports did, for threads too; the tower's first layer needs 2."""
    settings = tiny_run(tmp_path, write_squares(tmp_path, samples=24))
    settings["towers"]["image"] |= {"channels": [2**18], "layers": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    limited = (
        "import re, resource, clipscale.train, clipscale.run_model, torch;"
        "size = int(re.search(r'VmSize:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 7 * 2**28, size + 7 * 2**28));"
        "from clipscale.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", limited, "train", str(tmp_path / "run.yaml")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert re.search(r"memory ran out at step 1, in phase encode; lower micro_batch \(now 12 of 12 rows of a rank\)", ended.stderr), (
        ended.stderr
    )
    assert "Traceback" not in ended.stderr


def resident() -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
