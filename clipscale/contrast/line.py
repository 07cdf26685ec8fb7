"""Line: the ranks of a grid row or column, and how they bring samples together and take gradients back.

Legend: G ranks in the line, rank g holds sizes[g] samples, n of them in all; D embedding width, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clipscale.contrast.settings import ContrastSettings, named_dtype
from clipscale.parallel.collectives import exchange_rows, gather_rows


class Line:
    """The ranks of this rank's grid row or column, with so many samples of one sort each."""

    def __init__(
        self, ranks: Sequence[int], own: int, group: dist.ProcessGroup | None, sizes: Sequence[int], settings: ContrastSettings
    ) -> None:
        self.group, self.own = group, own
        self.sizes = [sizes[rank] for rank in ranks]
        self.starts = [sum(sizes[:rank]) for rank in ranks]
        self.feature_wire, self.gradient_wire = named_dtype(settings.feature_wire), named_dtype(settings.gradient_wire)

    def index(self) -> Tensor:
        """Number of each sample among those of all ranks: [n]."""
        return torch.cat([torch.arange(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True)])

    def gather(self, rows: Tensor) -> Tensor:
        """[own size, ...] -> [n, ...]."""
        return gather_rows(rows, self.sizes, self.group)

    def gather_features(self, rows: Tensor) -> Tensor:
        """[own size, D] -> [n, D], in the wire's dtype when there is a wire."""
        wire = self.feature_wire
        return self.gather(rows if wire is None or self.group is None else rows.detach().to(wire))

    def gather_equal(self, numbers: Tensor) -> Tensor:
        """The same few numbers of every rank: [K] -> [G, K]."""
        return gather_rows(numbers.unsqueeze(0), [1] * len(self.sizes), self.group)

    def exchange(self, rows: Tensor) -> Tensor:
        """[n, K] -> [G, own size, K]: what each rank of the line holds for this rank's samples."""
        return exchange_rows(rows, self.sizes, self.own, self.group)

    def add_up(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [own size, ...]: what the ranks hold for this rank's samples, added in rank order."""
        parts = self.exchange(rows)
        return parts[0] if len(parts) == 1 else parts.sum(0)

    def add_up_gradients(self, rows: Tensor) -> Tensor:
        """[n, D] -> [own size, D], added in the rows' dtype in rank order; what comes from others has crossed in the wire's dtype."""
        wire = self.gradient_wire
        if wire is None or self.group is None:
            return self.add_up(rows)
        return self.exchange(rows.to(wire)).sum(0, dtype=rows.dtype)
