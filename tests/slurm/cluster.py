"""A real Slurm of two nodes on this machine: two network namespaces on a bridge, each with a host name, a slurmd and two pretended GPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
NETWORK = "10.77.0"
BRIDGE = "clipscale-br"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")

CONFIGURATION = """\
ClusterName=clipscale
SlurmctldHost={host}({network}.254)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=30
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeAddr={network}.[1-2] Port=17001 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What is missing here for a cluster, or None."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)} (make test-slurm installs them on Debian and Ubuntu)" if missing else None


class Cluster:
    """Daemons that keep their files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "log").mkdir()

    def start(self) -> None:
        """Until both nodes wait for work."""
        self._write_configuration()
        self._make_network()
        self._start_munge()
        _run("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self._states() == {"idle"}, what="both nodes to be idle")

    def _write_configuration(self) -> None:
        values = {"host": socket.gethostname(), "network": NETWORK, "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        addresses = [f"{NETWORK}.{number} {node}" for number, node in enumerate(NODES, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.254 {values['host']}", *addresses, ""]))
        gpus = []
        for node in NODES:
            for number in (0, 1):
                os.mknod(self.folder / f"gpu-{node}-{number}", 0o020666, os.makedev(1, 3))
            gpus.append(f"NodeName={node} Name=gpu File={self.folder}/gpu-{node}-[0-1]")
        (self.folder / "gres.conf").write_text("\n".join([*gpus, ""]))

    def _make_network(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number, node in enumerate(NODES, 1):
            space = f"clipscale-{node}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", f"veth-{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", f"veth-{node}", "master", BRIDGE, "up")
            _run("ip", "-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", space, "link", "set", device, "up")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "log/munged.log",
            "seed-file": "seed",
        }
        _run("munged", "--force", *(f"--{option}={self.folder / name}" for option, name in places.items()))

    def start_node(self, node: str) -> None:
        """Its slurmd, where the machine has the node's name and knows the nodes' addresses."""
        # Not `ip netns exec`: it mounts /sys anew, and slurmd then finds no control groups.
        script = f"mount --bind {self.folder}/hosts /etc/hosts; hostname {node}; exec slurmd -f {self.folder}/slurm.conf"
        _run("nsenter", f"--net=/run/netns/clipscale-{node}", "unshare", "--uts", "--mount", "sh", "-c", script)

    def cut_off(self, node: str) -> None:
        """Nobody hears of the node any more."""
        _run("ip", "link", "set", f"veth-{node}", "down")

    def connect(self, node: str) -> None:
        """The cable is in again."""
        _run("ip", "link", "set", f"veth-{node}", "up")

    def slurm(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """All that Slurm knows of a job, by Slurm's names."""
        words = self.slurm("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], *, what: str, timeout_s: float = 180) -> None:
        """Until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"waited {timeout_s:g} s for {what}; nodes {self._states()}\n{self.slurm('squeue', '--long')}"
            )
            time.sleep(0.2)

    def _states(self) -> set[str]:
        return set(self.slurm("sinfo", "--noheader", "--format=%T").split())

    def stop(self) -> None:
        """End the daemons and what still runs on the nodes, and remove the network, whatever of all this there is."""
        names = [f"slurmd-{node}.pid" for node in NODES] + ["slurmctld.pid", "munged.pid"]
        for file in [self.folder / name for name in names]:
            if file.exists():
                subprocess.run(["kill", file.read_text().strip()], check=False)
        for node in NODES:
            left = subprocess.run(["ip", "netns", "pids", f"clipscale-{node}"], text=True, capture_output=True, check=False).stdout.split()
            subprocess.run(["kill", "-KILL", *left], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "link", "delete", f"veth-{node}"], check=False)
            subprocess.run(["ip", "netns", "delete", f"clipscale-{node}"], check=False)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
