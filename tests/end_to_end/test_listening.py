"""A run on several ranks listens for the rendezvous and for what its ranks say to each other, and for nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny import tiny_run, write_squares

from clipscale.metrics import read_json_lines

TORCHRUN = Path(__file__).parents[2] / "launch" / "torchrun.sh"
LISTENS = "0A"


def listening_inodes() -> dict[str, str]:
    """Inode -> address:port, in hexadecimal as /proc tells them, of every listening TCP socket of this machine."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[9]: line[1] for line in lines if line[3] == LISTENS}


def family(process: int) -> dict[int, str]:
    """This process and all below it, with their command lines."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = {}, [process]
    while left:
        member = left.pop()
        found[member] = Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        left += children.get(member, [])
    return found


def listeners(process: int) -> set[tuple[str, str]]:
    """Who of the family listens where: ('launcher' or 'rank', address); a rank's workers hold the rank's own sockets."""
    listening, found = listening_inodes(), set()
    for member, command in family(process).items():
        for descriptor in Path(f"/proc/{member}/fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:[") and (address := listening.get(target[8:-1])):
                found.add(("launcher" if "clipscale.launcher" in command else "rank", address))
    return found


def is_loopback(address: str) -> bool:
    """Whether a hexadecimal address:port is of this machine alone: 127.*, ::1, or ::ffff:127.*."""
    host = address.partition(":")[0]
    words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]  # each word as the processor keeps it
    whole = b"".join(words)
    return whole[:1] == b"\x7f" if len(whole) == 4 else whole == b"\0" * 15 + b"\1" or whole[:13] == b"\0" * 10 + b"\xff\xff\x7f"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_run_listens_on_the_rendezvous_and_between_its_ranks_alone(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(tiny_run(tmp_path / "runs", write_squares(tmp_path, samples=24), engine="ddp", steps=100_000, workers=1))
    )
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen([TORCHRUN, "train", config], stderr=subprocess.DEVNULL, env=environment, start_new_session=True) as run:
        try:
            deadline = time.monotonic() + 240
            while not read_json_lines(tmp_path / "runs" / "tiny" / "metrics.jsonl") and time.monotonic() < deadline:
                time.sleep(0.05)
            found = listeners(run.pid)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
    kinds = Counter((who, "loopback" if is_loopback(address) else "any address") for who, address in found)
    assert kinds == {
        ("launcher", "any address"): 1,  # torchrun's rendezvous
        ("rank", "any address"): 1,  # torch's store, on rank 0: a rendezvous of the ranks themselves, new at each restart
        ("rank", "loopback"): 2,  # gloo, on the network that was named
    }


def test_addresses_of_this_machine_are_told_from_others() -> None:
    inside = ["0100007F:1F90", "00000000000000000000000001000000:1F90", "0000000000000000FFFF00000100007F:1F90"]
    outside = ["00000000:1F90", "0A00000A:1F90", "00000000000000000000000000000000:1F90", "0000000000000000FFFF00000A00000A:1F90"]
    assert [is_loopback(address) for address in inside + outside] == [True] * 3 + [False] * 4
