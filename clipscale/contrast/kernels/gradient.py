"""The gradient kernel: d loss / d logit of a tile, written once from the registers that the logits were made in.

The two products with it are left to cuBLAS. A fused kernel would have to add to device memory for every block: 128 gradient rows of 1,024
float32 are 512 KiB, more than a multiprocessor can keep.

Legend: n rows and m columns in the tile, K numbers a row, P programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipscale.contrast.kernels._block import FAR, finite, logits_block, place, sigmoid, within_tile, without_equal_captions, without_pairs
from clipscale.contrast.kernels.statistics import write_reduced


@triton.jit
def differentiate_tile(
    x, y, scale, bias, row_pairs, column_pairs, row_captions, column_captions,
    row_pulls, column_pulls, into, sums, of_rows, of_columns,
    n, m, D, x_stride, y_stride,
    PAIRS: tl.constexpr, CAPTIONS: tl.constexpr, LEFT_OUT: tl.constexpr,
    LOGSUMEXP: tl.constexpr, SOFTPLUS: tl.constexpr, SUM: tl.constexpr, COUNT: tl.constexpr, HARDEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REDUCE: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logit of a tile, `into` [n, m], contiguous; and `sums` [2, P] float32: each program's Σ of it and Σ of it × logit.

    `row_pulls` [K, n] and `column_pulls` [K, m] hold what each row and column asks for, float32, of what was reduced: SUM (share), SOFTPLUS
    (share), LOGSUMEXP (total, share). With REDUCE the tile is reduced too. All else is as in `reduce_tile`.
    """
    row, column = place(n, m, BM, BN, GROUP)
    logits = logits_block(x, y, scale, bias, n, m, D, x_stride, y_stride, row, column, BM, BN, BK, UPCAST)
    logits = within_tile(logits, n, m, row, column, BM, BN)
    if LEFT_OUT >= 1:
        logits = without_pairs(logits, row_pairs, column_pairs, n, m, row, column, PAIRS, BM, BN)
    if LEFT_OUT == 2:
        logits = without_equal_captions(logits, row_captions, column_captions, n, m, row, column, CAPTIONS, BM, BN)

    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < n, columns < m
    row_at, column_at = row_pulls + rows, column_pulls + columns
    gradient = tl.zeros((BM, BN), dtype=tl.float32)
    if SUM:
        both = tl.load(row_at, mask=row_mask, other=0.0)[:, None] + tl.load(column_at, mask=column_mask, other=0.0)[None, :]
        gradient += tl.where(logits == float("-inf"), 0.0, both)
        row_at += n
        column_at += m
    if SOFTPLUS:
        both = tl.load(row_at, mask=row_mask, other=0.0)[:, None] + tl.load(column_at, mask=column_mask, other=0.0)[None, :]
        gradient += sigmoid(logits) * both
        row_at += n
        column_at += m
    if LOGSUMEXP:
        row_total = finite(tl.load(row_at, mask=row_mask, other=float("inf")))
        column_total = finite(tl.load(column_at, mask=column_mask, other=float("inf")))
        row_share = tl.load(row_at + n, mask=row_mask, other=0.0)
        column_share = tl.load(column_at + m, mask=column_mask, other=0.0)
        largest = finite(tl.max(tl.max(logits, 1), 0))
        if largest - tl.minimum(tl.min(row_total, 0), tl.min(column_total, 0)) > FAR:
            gradient += tl.exp(logits - row_total[:, None]) * row_share[:, None]
            gradient += tl.exp(logits - column_total[None, :]) * column_share[None, :]
        else:
            row_worth, column_worth = tl.exp(largest - row_total) * row_share, tl.exp(largest - column_total) * column_share
            gradient += tl.exp(logits - largest) * (row_worth[:, None] + column_worth[None, :])
    tl.store(sums + tl.program_id(0), tl.sum(gradient))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(gradient * finite(logits)))
    corner = into + row.to(tl.int64) * BM * m + column * BN
    target = corner + tl.arange(0, BM)[:, None] * m + tl.arange(0, BN)[None, :]
    tl.store(target, gradient.to(into.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
    if REDUCE:
        others = logits
        if LEFT_OUT == 0:
            others = without_pairs(others, row_pairs, column_pairs, n, m, row, column, PAIRS, BM, BN)
        if LEFT_OUT <= 1:
            others = without_equal_captions(others, row_captions, column_captions, n, m, row, column, CAPTIONS, BM, BN)
        write_reduced(
            logits, others, of_rows, of_columns, n, m, row, column, LOGSUMEXP, SOFTPLUS, SUM, COUNT, HARDEST, ROWS, COLUMNS, BM, BN
        )
