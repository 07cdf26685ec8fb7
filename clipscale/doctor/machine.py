"""Checks of one machine: Python and packages, GPUs, shared memory, open files, room and speed of the disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clipscale.doctor.finding import Finding

MIB = 2**20
GIB = 2**30
_LEAST_SHARED = GIB
_LEAST_FILES = 1024
_LEAST_ROOM = 10 * GIB
_SLOW_DISK = 50 * MIB
_PROBE_BYTES = 64 * MIB


def python() -> Finding:
    """This interpreter against the range that the package was made for."""
    wanted, found = metadata("clipscale")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "problem", f"{found}; clipscale needs {wanted}", "make the environment with another Python")


def packages() -> Finding:
    """Installed versions against pyproject.toml's ranges; of optional packages those that are installed."""
    requirements = [Requirement(text) for text in requires("clipscale") or []]
    wrong = [mistake for requirement in requirements if (mistake := _version_mistake(requirement))]
    if not wrong:
        return Finding("packages", "ok", f"torch {torch.__version__}, and {len({one.name for one in requirements}) - 1} others in range")
    return Finding("packages", "problem", "; ".join(wrong), "install with `pip install --constraint constraints.txt`")


def _version_mistake(requirement: Requirement) -> str:
    optional = requirement.marker is not None and "extra" in str(requirement.marker)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "" if optional else f"{requirement.name} is not installed; needed: {requirement.specifier}"
    fits = requirement.specifier.contains(found, prereleases=True)
    return "" if fits else f"{requirement.name} {found}; needed: {requirement.specifier}"


def gpus(*, wanted: bool) -> Finding:
    """The GPUs that torch sees, and whether the driver has more; `wanted`: the run asks for one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = [torch.cuda.get_device_name(number) for number in range(count)]
        return Finding("gpus", "ok", f"{count} × {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}")
    if Path("/dev/nvidia0").exists():
        return Finding(
            "gpus",
            "problem",
            f"the machine has NVIDIA devices, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them",
            "look whether nvidia-smi works, whether the driver knows this CUDA, and what CUDA_VISIBLE_DEVICES says",
        )
    if wanted:
        return Finding(
            "gpus", "problem", "none, but the run asks for `device: cuda`", "start the container with --gpus all, or set device: auto"
        )
    return Finding("gpus", "ok", "none: runs use the CPU")


def shared_memory(size: int | None = None) -> Finding:
    """Room for batches on their way from the workers, bytes; by itself that of /dev/shm."""
    if size is None:
        size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if size >= _LEAST_SHARED:
        return Finding("shared memory", "ok", f"{size / GIB:,.1f} GiB")
    return Finding(
        "shared memory",
        "warning",
        f"{size / MIB:,.0f} MiB; workers hand over batches through it, and die with 'bus error' when it is full",
        "start the container with --ipc host or --shm-size 16g (Kubernetes: an emptyDir of medium Memory at /dev/shm), or set `workers: 0`",
    )


def open_files(limit: int | None = None) -> Finding:
    """How many files, sockets and shared batches a process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}")
    return Finding("open files", "problem", f"{soft:,}; workers and stores need {_LEAST_FILES:,}", "raise it: ulimit -n 65536")


def room(folder: Path) -> Finding:
    """Whether the place of run folders can be written, and how much it still holds."""
    place = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.is_dir())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return Finding("disk room", "problem", f"{place} cannot be written: {error}", "give the run a `folder` that this user may write")
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:,.0f} GiB free at {place}"
    if free >= _LEAST_ROOM:
        return Finding("disk room", "ok", found)
    return Finding("disk room", "warning", found, "make room: a checkpoint takes 12 to 16 bytes a parameter, and several are kept")


def disk_speed(folder: Path) -> Finding:
    """How fast a checkpoint could be written there, and read back."""
    place = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.is_dir())
    data = os.urandom(MIB)
    with tempfile.TemporaryFile(dir=place) as file:
        begun = time.perf_counter()
        for _ in range(_PROBE_BYTES // MIB):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is still in memory would be read from there
        file.seek(0)
        while file.read(MIB):
            pass
        read = time.perf_counter()
    writing, reading = _PROBE_BYTES / (written - begun), _PROBE_BYTES / (read - written)
    found = f"writes {writing / MIB:,.0f} MiB/s, reads {reading / MIB:,.0f} MiB/s at {place}"
    if min(writing, reading) >= _SLOW_DISK:
        return Finding("disk speed", "ok", found)
    return Finding("disk speed", "warning", found, "put run folders on a faster disk, or write checkpoints more rarely")
