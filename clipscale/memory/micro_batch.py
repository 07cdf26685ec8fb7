"""MicroBatch: how many rows of a pair kind a rank encodes at a time; as set, or the most that fits, sought over the first steps.

Sizes are not tried until memory runs out, which would leave other ranks waiting: the first steps run with few rows and are measured, the
next size lies on a straight line through the last two, and is at most twice the last. Every such step is an exact step of the run, for
gradients do not depend on the micro-batch.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch

from clipscale.errors import ConfigError
from clipscale.parallel.mesh import Mesh
from clipscale.phases.peaks import peak_of

GIB = 2**30
FIRST = 8
"""Rows of the first step that is measured."""
_CARE = 1.2
"""A further row is taken to need so much more than the last ones did: malloc does not give back all that is freed."""
_GPU_SHARE = 0.9
"""Of a GPU's memory that is used: the rest is for what torch's allocator does not count."""


class MicroBatch:
    """The micro-batch of the next step."""

    def __init__(self, asked: int | Literal["auto"] | None, *, share: int, limit: int | None) -> None:
        """
        Args:
            share: rows of the largest pair kind that this rank has of a global batch.
            limit: bytes a rank may hold; for `auto`.
        """
        self._share, self._limit = share, limit or 0
        self._settled = asked != "auto"
        self._rows = min(FIRST, share) if asked == "auto" else min(asked or share, share)
        self._steps = 0
        self._fitting: list[tuple[int, int]] = []  # (rows, bytes) of the last two measured that fit

    @property
    def rows(self) -> int | None:
        """Rows encoded at a time; None: all in one graph, because they fit, or because nothing else was asked for."""
        return None if self._rows == self._share else self._rows

    def learn(self, peak: int) -> str:
        """Take note of a step's peak memory, in bytes, on the rank where it was most; tells when the search is over, else ''."""
        if self._settled:
            return ""
        _give_back()
        self._steps += 1
        if self._steps == 1:  # the optimizer's state was made after its peak
            return ""
        if peak > self._limit:
            self._rows = self._fitting[-1][0] if self._fitting else max(1, self._rows // 2)
            return self._settle() if self._fitting or self._rows == 1 else ""
        self._fitting = [*self._fitting[-1:], (self._rows, peak)]
        fits = self._most_that_fits()
        if fits <= self._rows:
            return self._settle()
        self._rows = fits
        return ""

    def _most_that_fits(self) -> int:
        """By a straight line through the last two measurements; at most twice the last."""
        rows, peak = self._fitting[-1]
        most = min(2 * rows, self._share)
        if len(self._fitting) == 1:
            return most
        before, lower = self._fitting[0]
        a_row = _CARE * (peak - lower) / (rows - before)
        fits = most if a_row <= 0 else rows + int((self._limit - peak) / a_row)
        return most if fits >= most else max(fits // FIRST * FIRST, rows)

    def _settle(self) -> str:
        self._settled = True
        found = (
            "the whole share of a rank in one graph" if self.rows is None else f"{self._rows} row{'s' if self._rows > 1 else ''} at a time"
        )
        limit = f"{self._limit / GIB:.2f} GiB"
        if not self._fitting:
            return f"{found}, and still above the {limit} it may use"
        return f"{found}: {self._fitting[-1][1] / GIB:.2f} of {limit}"

    def state(self) -> dict[str, Any]:
        """For checkpoints: what was found, and for which share and limit."""
        return {
            "for": [self._share, self._limit],
            "rows": self._rows,
            "settled": self._settled,
            "steps": self._steps,
            "fitting": [list(measured) for measured in self._fitting],
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stands, unless the size is set, or was sought for another share or limit."""
        if self._settled or state["for"] != [self._share, self._limit]:
            return
        self._rows, self._settled, self._steps = state["rows"], state["settled"], state["steps"]
        self._fitting = [(rows, peak) for rows, peak in state["fitting"]]


def _give_back() -> None:
    """Let glibc's malloc return what was freed, so that a large step does not count against the smaller one that follows it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_limit(memory_gb: float | None, mesh: Mesh) -> int:
    """Bytes that every rank may hold; all ranks ask together.

    Raises:
        ConfigError: nobody knows how much, or how much is used.
    """
    if memory_gb is None and mesh.device.type != "cuda":
        raise ConfigError("micro_batch: auto on the CPU needs memory_gb: how many GiB a rank may hold")
    account = peak_of(mesh.device)
    if account is None:
        raise ConfigError("micro_batch: auto needs to know the peak memory of a step, and this system does not tell it; set a number")
    account.close()
    own = memory_gb * GIB if memory_gb is not None else torch.cuda.get_device_properties(mesh.device).total_memory * _GPU_SHARE
    return int(own)
