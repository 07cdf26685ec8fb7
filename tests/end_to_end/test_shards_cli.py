"""clipscale-shards as its users meet it: commands, exit codes, kills, and real photographs and recordings."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from making_data import write_dataset
from typer.main import get_command

from clipscale.data.shards import Sample, open_dataset
from data_tools.cli import app

ROOT = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("CLIPSCALE_REAL_DATA", ROOT.parent / "shared" / "data"))
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set CLIPSCALE_REAL_DATA")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_tools", *map(str, arguments)]


def run(*arguments: object, code: int = 0) -> str:
    """Everything the command printed; it must end with this exit code, and never with a traceback."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    return output


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digits_table(folder: Path, number: int) -> Path:
    """A table of `number` recorded digits, as a user would write it."""
    path = folder / "digits.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["recording", "said", "speaker"])
        for name in sorted(path.name for path in (REAL_DATA / "fsdd").glob("*.wav"))[:number]:
            table.writerow([name, DIGITS[int(name[0])], name.split("_")[1]])
    return path


@pytest.mark.parametrize("arguments", [("--help",), ("build", "--help"), ("describe", "--help"), ("verify", "--help")])
def test_help_ends_well_and_names_the_command(arguments: tuple[str, ...]) -> None:
    assert f"Usage: python -m data_tools {' '.join(arguments[:-1])}".strip() in " ".join(run(*arguments).split())


def test_the_command_line_imports_neither_torch_nor_pyarrow() -> None:
    code = "import sys, data_tools.cli; print(sorted({'torch', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"


def test_building_imports_no_torch() -> None:
    code = "import sys, data_tools.build, data_tools.page; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


def test_every_option_is_explained() -> None:
    for name, part in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert part.help, name
        for parameter in part.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


def test_a_missing_input_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    assert "there is no such file or folder" in run("build", tmp_path / "nowhere", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_an_input_without_rows_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("file,caption\n")
    assert "holds no rows" in run("build", tmp_path / "in.csv", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_a_setting_out_of_range_ends_with_2_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("file,caption\n1.jpg,one\n")
    (tmp_path / "1.jpg").touch()
    assert "--max-side 3: " in run("build", tmp_path / "in.csv", tmp_path / "out", "--max-side", 3, code=2)


def test_files_that_cannot_be_written_are_refused_before_work(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2])
    nowhere = tmp_path / "nowhere" / "file"
    assert "nowhere/file: cannot be written" in run("dedupe", tmp_path / "set", "--exact", "--keys", nowhere, code=2)
    told = run("describe", tmp_path / "set", "--page", nowhere, code=2)
    assert "there is no folder" in told
    assert "2 samples" not in told


def test_describing_what_is_no_data_set_ends_with_2(tmp_path: Path) -> None:
    assert "no index.parquet" in run("describe", tmp_path, code=2)


def test_when_rows_fail_the_build_ends_with_1_and_lists_them(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("file,caption\n1.jpg,one\n[bold]2.jpg,two\n")
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    output = run("build", tmp_path / "in.csv", tmp_path / "out", code=2)
    assert "1 of 2 rows cannot be packed (missing file 1); first: in.csv:3: missing file: " in output
    assert not (tmp_path / "out").exists()
    output = run("build", tmp_path / "in.csv", tmp_path / "out", "--max-bad", 0.5, code=1)
    assert "2 of 2 rows failed (unreadable image 1, missing file 1)" in output
    assert "[bold]2.jpg" in (tmp_path / "out" / "failures.jsonl").read_text()


@needs_real_data
def test_a_dry_run_shows_guesses_and_ten_rows_and_writes_nothing(tmp_path: Path) -> None:
    output = run("build", REAL_DATA / "coco_mini" / "captions_val2017.json", tmp_path / "out", "--dry-run")
    assert "images: 79 with captions, of 79" in output
    assert len(re.findall(r"^  image: .*\.jpg as jpg of \d+×\d+ pixels, [\d.]+ kB$", output, re.MULTILINE)) == 10
    assert not (tmp_path / "out").exists()


@needs_real_data
def test_coco_photographs_are_packed_with_their_five_captions(tmp_path: Path) -> None:
    annotations, output = REAL_DATA / "coco_mini" / "captions_val2017.json", tmp_path / "out"
    run("build", annotations, output, "--images-folder", "val2017", "--samples-per-shard", 40)
    sample = open_dataset(output).read(0, [0])[0]
    assert isinstance(sample, Sample)
    assert sample.image == (REAL_DATA / "coco_mini" / "val2017" / "000000397133.jpg").read_bytes()
    assert len(sample.captions) == 5
    text = run("describe", output, "--page", tmp_path / "page.html")
    assert "79 samples in 2 shards" in text
    assert (tmp_path / "page.html").read_text().count("<img ") == 60


@needs_real_data
def test_photographs_sorted_into_folders_are_packed_and_shrunk(tmp_path: Path) -> None:
    run("build", REAL_DATA / "coco_mini", tmp_path / "out", "--max-side", 128, "--captions-from", "folders")
    index = open_dataset(tmp_path / "out")
    columns = index.sidecar(0).columns
    assert index.totals["samples"] == 159
    assert set(columns["width"].clip(columns["height"])) == {128}


@needs_real_data
def test_recordings_at_8_khz_beside_their_texts_become_16_khz(tmp_path: Path) -> None:
    speech = tmp_path / "speech"
    speech.mkdir()
    for path in sorted((REAL_DATA / "fsdd").glob("*_theo_0.wav")):
        (speech / path.name).symlink_to(path)
        (speech / path.name).with_suffix(".txt").write_text(DIGITS[int(path.name[0])])
    run("build", speech, tmp_path / "out")
    index = open_dataset(tmp_path / "out")
    assert set(index.sidecar(0).columns["sample_rate"]) == {16_000}
    assert [sample.captions for sample in index.read(0, range(10)) if isinstance(sample, Sample)] == [[digit] for digit in DIGITS]


def members(session: int) -> list[int]:
    """Processes that belong to a session and are not dead."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = entry.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(entry.parent.name))
    return found


@needs_real_data
def test_kills_at_any_moment_change_no_byte_and_leave_no_process(tmp_path: Path) -> None:
    table = digits_table(tmp_path, 600)
    options = ("--speech-column", "recording", "--caption-column", "said", "--images-folder", REAL_DATA / "fsdd", "--samples-per-shard", 30)
    run("build", table, tmp_path / "whole", *options, "--workers", 1)
    for shards in (0, 1, 4, 9, 15):
        arguments = command("build", table, tmp_path / "out", *options, "--workers", 2)
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        while not (tmp_path / "out" / "build.json").exists() or len(list((tmp_path / "out").glob("0*.parquet"))) < shards:
            time.sleep(0.002)
            assert process.poll() is None
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not members(process.pid)
    run("build", table, tmp_path / "out", *options, "--workers", 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@needs_real_data
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_build_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    table = digits_table(tmp_path, 3_000)
    columns = ("--speech-column", "recording", "--caption-column", "said", "--media-folder", REAL_DATA / "fsdd")
    arguments = ("build", table, tmp_path / "out", *columns, "--samples-per-shard", 20, "--workers", 2)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "000000.parquet").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob(".*.tmp-*"))
    assert re.search(r"3,000 samples in 150 shards \(\d+ stood already\)", run(*arguments))


def test_verify_ends_with_1_and_names_what_is_damaged(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [2, 2])
    assert "4 samples in 2 shards; checked" in run("verify", tmp_path / "set")
    tar = tmp_path / "set" / "000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"number 3", b"number 4"))
    told = run("verify", tmp_path / "set", "--findings", tmp_path / "findings.jsonl", code=1)
    assert re.search(r"000001\.tar 000003: changed bytes", told)
    assert [json.loads(line)["key"] for line in (tmp_path / "findings.jsonl").read_text().splitlines()] == ["", "000003"]
    run("verify", tmp_path / "set", "--quick")
    assert "there is no such folder" in run("verify", tmp_path / "none", code=2)
