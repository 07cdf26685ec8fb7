"""Shapes of blocks and tiles: fixed, never tuned at run time, so that equal runs give equal bits on every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How a kernel is started."""

    rows: int
    """Of a block."""
    columns: int
    """Of a block."""
    depth: int
    """Numbers of the embeddings at a time."""
    group: int
    """Block rows that are swept together."""
    warps: int
    stages: int
    """Of the pipeline that loads embeddings."""
    registers: int | None = None
    """The most a thread may have; none: as many as the compiler likes."""

    def options(self) -> dict[str, int]:
        """As triton takes it, with the block's shape."""
        shape = {"BM": self.rows, "BN": self.columns, "BK": self.depth, "GROUP": self.group}
        compiled = {"num_warps": self.warps, "num_stages": self.stages}
        return shape | compiled | ({} if self.registers is None else {"maxnreg": self.registers})


STATISTICS_TILE = (8_192, 16_384)
"""Rows and columns of a tile that is only reduced: 4 MiB of partial reductions for each number of a row, few launches."""
GRADIENT_TILE = (8_192, 4_096)
"""Rows and columns of a tile whose gradient is written: 64 MiB of bfloat16."""

# bfloat16: shapes of which two or three programs fit a multiprocessor, so that one's exponentials run beside another's products, and that
# the compiler can keep in registers (benchmarks/kernel_resources.py prints what it makes of them).
ROOMY = Launch(rows=128, columns=128, depth=64, group=8, warps=8, stages=3, registers=128)
CROWDED = Launch(rows=64, columns=128, depth=64, group=8, warps=4, stages=3)
SINGLE = Launch(rows=64, columns=64, depth=32, group=8, warps=4, stages=2)
"""float32, multiplied as such and not as TF32."""
INTERPRETED = Launch(rows=32, columns=16, depth=16, group=2, warps=1, stages=1)
"""Several blocks even in a test's few rows."""


def launch_for(dtype: torch.dtype, *, crowded: bool, interpreted: bool) -> Launch:
    """The launch for features of this dtype; `crowded` when a gradient or further sums share the registers with the logits."""
    if interpreted:
        return INTERPRETED
    if dtype != torch.bfloat16:
        return SINGLE
    return CROWDED if crowded else ROOMY
