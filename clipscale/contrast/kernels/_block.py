"""What both kernels share: a block of logits made on the chip, with the entries that take no part filled in.

A program owns BM rows and BN columns of a tile. Its logits are one matrix product, accumulated in float32 whatever the features' dtype.

Legend: n rows and m columns in the tile, D embedding width.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(46.0)
"""How far below a block's largest value a row or column may lie before it gets an offset of its own: e^−46 = 1e-20, far from the smallest
float32, 1e-38, so that every kept digit is right."""


@triton.jit
def place(n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's block: its row and column number. GROUP block rows at a time, so that neighbours share columns in the cache."""
    program = tl.program_id(0)
    num_columns = tl.cdiv(m, BN)
    num_rows = tl.cdiv(n, BM)
    band = program // (GROUP * num_columns)
    height = tl.minimum(num_rows - band * GROUP, GROUP)
    inside = program % (GROUP * num_columns)
    return band * GROUP + inside % height, inside // height


@triton.jit
def logits_block(
    x, y, scale, bias, n, m, D, x_stride, y_stride, row, column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scale · ⟨x, y⟩ + bias: float32 [BM, BN]; rows and columns beyond the tile hold what the last ones do."""
    rows = tl.minimum(row * BM + tl.arange(0, BM), n - 1)
    columns = tl.minimum(column * BN + tl.arange(0, BN), m - 1)
    depth = tl.arange(0, BK)
    x_at = x + rows[:, None] * x_stride + depth[None, :]
    y_at = y + columns[None, :] * y_stride + depth[:, None]
    cosine = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        left = tl.load(x_at, mask=depth[None, :] < D - start, other=0.0)
        right = tl.load(y_at, mask=depth[:, None] < D - start, other=0.0)
        if UPCAST:  # the interpreter's product of bfloat16 is wrong
            left, right = left.to(tl.float32), right.to(tl.float32)
        cosine = tl.dot(left, right, cosine, input_precision="ieee")
        x_at += BK
        y_at += BK
    return cosine * tl.load(scale) + tl.load(bias)


@triton.jit
def within_tile(logits, n, m, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """Logits with −∞ beyond the tile's last row and column."""
    rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    if row * BM + BM > n or column * BN + BN > m:
        logits = tl.where((rows < n)[:, None] & (columns < m)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def without_pairs(logits, row_pairs, column_pairs, n, m, row, column, PAIRS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Logits with −∞ where row and column are the same pair. Their numbers ascend, so most blocks see from the ends that they hold none."""
    if PAIRS:
        rows, columns = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        last_row, last_column = tl.minimum(row * BM + BM, n) - 1, tl.minimum(column * BN + BN, m) - 1
        reaches = tl.load(row_pairs + last_row) >= tl.load(column_pairs + column * BN)
        reached = tl.load(column_pairs + last_column) >= tl.load(row_pairs + row * BM)
        if reaches and reached:
            of_rows = tl.load(row_pairs + rows, mask=rows < n, other=-1)
            of_columns = tl.load(column_pairs + columns, mask=columns < m, other=-2)
            logits = tl.where(of_rows[:, None] == of_columns[None, :], float("-inf"), logits)
    return logits


@triton.jit
def without_equal_captions(
    logits, row_captions, column_captions, n, m, row, column, CAPTIONS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Logits with −∞ where the captions of row and column are equal; as they are where captions are not known."""
    if CAPTIONS:
        of_rows = tl.load(row_captions + tl.minimum(row * BM + tl.arange(0, BM), n - 1))
        of_columns = tl.load(column_captions + tl.minimum(column * BN + tl.arange(0, BN), m - 1))
        logits = tl.where(of_rows[:, None] == of_columns[None, :], float("-inf"), logits)
    return logits


@triton.jit
def finite(value):
    """Zero for −∞, which cannot be subtracted from itself."""
    return tl.where(value == float("-inf"), 0.0, value)


@triton.jit
def softplus(value):
    """log(1 + e^value) to full relative precision, and 0 for −∞.

    log1p by Goldberg's correction (1991, theorem 4): the rounding of 1 + e is divided out again.
    """
    small = tl.exp(-tl.abs(value))
    one = 1.0 + small
    lost = one == 1.0
    corrected = tl.where(lost, small, tl.log(one) * (small / tl.where(lost, 1.0, one - 1.0)))
    return tl.maximum(value, 0.0) + corrected


@triton.jit
def sigmoid(value):
    """1 / (1 + e^−value) to full relative precision down to 1e-38, and 0 for −∞."""
    return 1.0 / (1.0 + tl.exp(-value))
