"""Peaks: the most memory that was in use since the last time somebody asked."""

from __future__ import annotations

import os
import re
from typing import Protocol

import torch

_HIGHEST = re.compile(rb"VmHWM:\s*(\d+) kB")


class Peak(Protocol):
    """Something that knows the highest use of memory."""

    def take(self) -> int:
        """Bytes at the highest moment since the last call; the next peak begins here."""

    def close(self) -> None:
        """Give back what this holds."""


class CudaPeak:
    """What torch's allocator had given out on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def take(self) -> int:
        """Bytes, the highest since the last call."""
        peak = int(torch.cuda.memory_stats_as_nested_dict(self._device)["allocated_bytes"]["all"]["peak"])
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def close(self) -> None:
        """Nothing is held."""


class ResidentPeak:
    """What Linux had in memory for this process, and lets it reset: freed memory that malloc keeps is in it."""

    def __init__(self) -> None:
        """
        Raises:
            OSError: there is no such account here, or it may not be reset.
        """
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        try:
            self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError:
            os.close(self._status)
            raise
        try:
            self.take()
        except OSError:
            self.close()
            raise

    def take(self) -> int:
        """Bytes, the highest since the last call."""
        found = _HIGHEST.search(os.pread(self._status, 8192, 0))
        if found is None:
            raise OSError("/proc/self/status holds no VmHWM")
        os.write(self._reset, b"5")
        return int(found[1]) * 1024

    def close(self) -> None:
        """Close the files."""
        os.close(self._status)
        os.close(self._reset)


def peak_of(device: torch.device) -> Peak | None:
    """The account of a device's memory; None where the system keeps none that can be reset."""
    if device.type == "cuda":
        return CudaPeak(device)
    try:
        return ResidentPeak()
    except OSError:
        return None
