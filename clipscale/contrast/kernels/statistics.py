"""The statistics kernel: a tile's rows and columns, partially reduced; not a logit is written.

Each program reduces its block along rows and along columns and writes a few numbers for each; torch merges the blocks' numbers afterwards,
in a fixed order, so equal runs give equal bits. A block is taken to the exponential once for both directions, relative to its largest
value; where a row or column lies so far below it that this would cost digits, each gets an offset of its own.

Legend: n rows and m columns in the tile, K numbers a row, P blocks along the other side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipscale.contrast.kernels._block import FAR, finite, logits_block, place, softplus, within_tile, without_equal_captions, without_pairs


@triton.jit
def reduce_tile(
    x, y, scale, bias, row_pairs, column_pairs, row_captions, column_captions, of_rows, of_columns,
    n, m, D, x_stride, y_stride,
    PAIRS: tl.constexpr, CAPTIONS: tl.constexpr, LEFT_OUT: tl.constexpr,
    LOGSUMEXP: tl.constexpr, SOFTPLUS: tl.constexpr, SUM: tl.constexpr, COUNT: tl.constexpr, HARDEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Reduce a tile: write `of_rows` [K, P, n] and `of_columns` [K, P, m], where ROWS and COLUMNS ask for them.

    x [n, D] and y [m, D] have rows x_stride and y_stride apart; scale and bias are 0-d float32; the numbers of pairs (ascending, read when
    PAIRS may lie in the tile) and of captions (read when CAPTIONS are known) are int64. LEFT_OUT takes no part: 0 nothing, 1 pairs,
    2 pairs and equal captions, which HARDEST always leaves out. K counts what is asked for, in this order: HARDEST (the largest), SUM,
    COUNT, SOFTPLUS (Σ softplus), LOGSUMEXP (offset, Σ e^(logit − offset)). BM × BN logits make a block, BK numbers of the embeddings
    are multiplied at a time, and GROUP block rows share columns in the cache.
    """
    row, column = place(n, m, BM, BN, GROUP)
    logits = logits_block(x, y, scale, bias, n, m, D, x_stride, y_stride, row, column, BM, BN, BK, UPCAST)
    logits = within_tile(logits, n, m, row, column, BM, BN)
    unpaired = without_pairs(logits, row_pairs, column_pairs, n, m, row, column, PAIRS, BM, BN)
    others = without_equal_captions(unpaired, row_captions, column_captions, n, m, row, column, CAPTIONS, BM, BN)
    if LEFT_OUT == 1:
        logits = unpaired
    if LEFT_OUT == 2:
        logits = others
    write_reduced(logits, others, of_rows, of_columns, n, m, row, column, LOGSUMEXP, SOFTPLUS, SUM, COUNT, HARDEST, ROWS, COLUMNS, BM, BN)


@triton.jit
def write_reduced(
    logits, others, of_rows, of_columns, n, m, row, column,
    LOGSUMEXP: tl.constexpr, SOFTPLUS: tl.constexpr, SUM: tl.constexpr, COUNT: tl.constexpr, HARDEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """This block's numbers: what `reduce_tile` promises."""
    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < n, columns < m
    row_at, row_step = of_rows + column * n + rows, tl.cdiv(m, BN) * n
    column_at, column_step = of_columns + row * m + columns, tl.cdiv(n, BM) * m
    if HARDEST:
        if ROWS:
            tl.store(row_at, tl.max(others, 1), mask=row_mask)
        if COLUMNS:
            tl.store(column_at, tl.max(others, 0), mask=column_mask)
        row_at += row_step
        column_at += column_step
    if SUM:
        row_at, column_at = write_sums(finite(logits), row_at, column_at, row_step, column_step, row_mask, column_mask, ROWS, COLUMNS)
    if COUNT:
        entries = tl.where(logits == float("-inf"), 0.0, 1.0)
        row_at, column_at = write_sums(entries, row_at, column_at, row_step, column_step, row_mask, column_mask, ROWS, COLUMNS)
    if SOFTPLUS:
        row_at, column_at = write_sums(softplus(logits), row_at, column_at, row_step, column_step, row_mask, column_mask, ROWS, COLUMNS)
    if LOGSUMEXP:
        row_offset, column_offset = tl.max(logits, 1), tl.max(logits, 0)
        largest = finite(tl.max(row_offset, 0))
        lowest = tl.minimum(lowest_of(row_offset, largest), lowest_of(column_offset, largest))
        if lowest < largest - FAR:  # decided before the exponentials, so that they can take the logits' place
            row_offset, column_offset = finite(row_offset), finite(column_offset)
            row_sum = tl.sum(tl.exp(logits - row_offset[:, None]), 1)
            column_sum = tl.sum(tl.exp(logits - column_offset[None, :]), 0)
        else:
            row_offset, column_offset = tl.zeros_like(row_offset) + largest, tl.zeros_like(column_offset) + largest
            exponentials = tl.exp(logits - largest)
            row_sum, column_sum = tl.sum(exponentials, 1), tl.sum(exponentials, 0)
        if ROWS:
            tl.store(row_at, row_offset, mask=row_mask)
            tl.store(row_at + row_step, row_sum, mask=row_mask)
        if COLUMNS:
            tl.store(column_at, column_offset, mask=column_mask)
            tl.store(column_at + column_step, column_sum, mask=column_mask)


@triton.jit
def lowest_of(offsets, largest):
    """The smallest of the rows' largest values, rows without any entry aside."""
    return tl.min(tl.where(offsets == float("-inf"), largest, offsets), 0)


@triton.jit
def write_sums(
    values, row_at, column_at, row_step, column_step, row_mask, column_mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums along rows and along columns; where the next number goes."""
    if ROWS:
        tl.store(row_at, tl.sum(values, 1), mask=row_mask)
    if COLUMNS:
        tl.store(column_at, tl.sum(values, 0), mask=column_mask)
    return row_at + row_step, column_at + column_step
