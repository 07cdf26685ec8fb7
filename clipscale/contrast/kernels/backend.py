"""TritonBackend: tiles by the fused kernels, and their products with the embeddings by cuBLAS.

Legend: the tile has n rows and m columns, P blocks along the other side; D embedding width, K numbers a row, k of them for one term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from clipscale.contrast.backends import Backend, SweepKind, Tile, TileGradients
from clipscale.contrast.kernels.family import Family, LeftOut, Reduction, family_of
from clipscale.contrast.kernels.gradient import differentiate_tile
from clipscale.contrast.kernels.shapes import Launch, launch_for
from clipscale.contrast.kernels.statistics import reduce_tile
from clipscale.contrast.layout import HARDEST, SIDES, sides_of
from clipscale.objectives import MAIN, LogSumExp, Objective, Pull, Side

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether this process runs kernels as numpy, on the CPU: TRITON_INTERPRET=1."""
_WIDTHS: dict[Reduction, int] = {"sum": 1, "count": 1, "softplus": 1, "logsumexp": 2}
"""Numbers of each reduction in a row, in the order in which the kernels write and read them; the hardest negative's comes first of all."""

_LEFT_OUT: dict[LeftOut, int] = {"nothing": 0, "pairs": 1, "equal captions": 2}


class TritonBackend(Backend):
    """Statistics without a logit in memory; gradients of logits written once, in the features' dtype."""

    tells_scale: ClassVar[bool] = True  # from float32 registers; the gradient that is written may be rounded to bfloat16

    def __init__(self, objective: Objective, *, tiles: Mapping[SweepKind, tuple[int, int]]) -> None:
        super().__init__(objective, tile=tiles["gradient"], vectors=frozenset())
        self.tiles = tiles
        self._room: Tensor | None = None

    def tile_shape(self, sweep: SweepKind) -> tuple[int, int]:
        return self.tiles[sweep]

    def partials(self, tile: Tile, sweep: int) -> dict[Side, dict[str, Tensor]]:  # noqa: ARG002 - the family has one sweep
        call = _Call(self.objective, tile, differentiates=False)
        written = call.room_for_reduced()
        with _on_device(tile.scale):
            reduce_tile[call.programs](*call.operands, *written.values(), *call.sizes, **call.options)
        return call.merged(written)

    def gradients(self, tile: Tile, sweep: int, pulls: Mapping[Side, Mapping[str, Pull]]) -> TileGradients:  # noqa: ARG002 - one sweep
        call = _Call(self.objective, tile, differentiates=True)
        nowhere = dict.fromkeys(SIDES, tile.scale)
        return self._differentiate(call, tile, pulls, nowhere, reduce=False)

    def partials_and_gradients(
        self,
        tile: Tile,
        sweep: int,  # noqa: ARG002 - one sweep
        pulls: Mapping[Side, Mapping[str, Pull]],
    ) -> tuple[dict[Side, dict[str, Tensor]], TileGradients]:
        call = _Call(self.objective, tile, differentiates=True)
        written = call.room_for_reduced()
        gradients = self._differentiate(call, tile, pulls, written, reduce=True)
        return call.merged(written), gradients

    def _differentiate(
        self, call: _Call, tile: Tile, pulls: Mapping[Side, Mapping[str, Pull]], reduced: Mapping[Side, Tensor], *, reduce: bool
    ) -> TileGradients:
        asked = [_asked(call.family, pulls.get(side), like=tile.scale.new_zeros(call.lengths[side])) for side in SIDES]
        gradient = self._room_for(call)
        sums = tile.scale.new_empty(2, *call.programs)
        with _on_device(tile.scale):
            differentiate_tile[call.programs](
                *call.operands, *asked, gradient, sums, *reduced.values(), *call.sizes, **call.options, REDUCE=reduce
            )
        total, weighted = sums.sum(1, dtype=torch.float64).unbind()
        bias = 0.0 if tile.bias is None else tile.bias
        return TileGradients({MAIN: gradient}, {}, (weighted - bias * total) / tile.scale, None if tile.bias is None else total)

    def _room_for(self, call: _Call) -> Tensor:
        """Where a tile's gradient is written; the same memory for every tile: [n, m]."""
        shape = (call.lengths["x"], call.lengths["y"])
        if self._room is None or self._room.numel() < math.prod(shape):
            self._room = call.x.new_empty(math.prod(shape))
        return self._room[: math.prod(shape)].view(shape)

    def add_product(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """into += left · right, accumulated in float32 whatever the operands' dtype."""
        if left.is_cuda and left.dtype != into.dtype:
            torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
        else:
            super().add_product(into, left.to(into.dtype), right)


class _Call:
    """A tile as the kernels take it."""

    def __init__(self, objective: Objective, tile: Tile, *, differentiates: bool) -> None:
        row_name, column_name = tile.products[MAIN]
        self.x, self.y = _dense_rows(tile.rows.features[row_name]), _dense_rows(tile.columns.features[column_name])
        self.lengths: dict[Side, int] = {"x": len(self.x), "y": len(self.y)}
        self.captions = tile.extra is None and tile.rows.ids is not None
        family = family_of(objective, extra=tile.extra, captions=self.captions)
        assert family is not None, "this backend is chosen only where all blocks are of the family"
        self.family: Family = family
        self.launch: Launch = launch_for(self.x.dtype, crowded=differentiates or "sum" in family.names, interpreted=INTERPRETED)
        self.programs = (math.ceil(self.lengths["x"] / self.launch.rows) * math.ceil(self.lengths["y"] / self.launch.columns),)
        nothing = tile.scale.new_zeros(())
        unread = (nothing, nothing)
        may_hold_pairs = tile.rows.may_share_pairs_with(tile.columns)
        pairs = [side.index.to(self.x.device) for side in (tile.rows, tile.columns)] if may_hold_pairs else unread
        captions = (tile.rows.ids, tile.columns.ids) if self.captions else unread
        self.operands = [self.x, self.y, tile.scale, nothing if tile.bias is None else tile.bias, *pairs, *captions]
        self.sizes = (*self.lengths.values(), self.x.shape[1], self.x.stride(0), self.y.stride(0))
        self.served = sides_of(tile.extra)
        self.like = tile.scale
        self.options: dict[str, Any] = {
            "PAIRS": may_hold_pairs,
            "CAPTIONS": self.captions,
            "LEFT_OUT": _LEFT_OUT[family.left_out],
            "LOGSUMEXP": "logsumexp" in family.names,
            "SOFTPLUS": "softplus" in family.names,
            "SUM": "sum" in family.names,
            "COUNT": "count" in family.names,
            "HARDEST": family.hardest,
            "ROWS": "x" in self.served,
            "COLUMNS": "y" in self.served,
            "UPCAST": INTERPRETED,
            **self.launch.options(),
        }

    def room_for_reduced(self) -> dict[Side, Tensor]:
        """Where each block's partial reductions are written: [K, P, n] and [K, P, m]; one number for a side that is not served."""
        count = sum(_WIDTHS[reduction] for reduction in self.family.names) + self.family.hardest
        blocks = {"x": math.ceil(self.lengths["y"] / self.launch.columns), "y": math.ceil(self.lengths["x"] / self.launch.rows)}
        return {side: self.like.new_empty((count, blocks[side], self.lengths[side]) if side in self.served else (1,)) for side in SIDES}

    def merged(self, written: Mapping[Side, Tensor]) -> dict[Side, dict[str, Tensor]]:
        """All blocks' partial reductions as one, by side and name."""
        return {side: _merged(self.family, written[side]) if side in self.served else {} for side in SIDES}


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """triton launches on the current device, whatever the operands'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _dense_rows(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def _merged(family: Family, blocks: Tensor) -> dict[str, Tensor]:
    """The blocks' partial reductions as one, by name: [K, P, n] -> each [n, k]."""
    found, place = {}, int(family.hardest)
    for reduction, width in _WIDTHS.items():
        if reduction in family.names:
            part = blocks[place : place + width]
            place += width
            found[family.names[reduction]] = _merged_exponentials(*part) if reduction == "logsumexp" else part.sum(1).T
    if family.hardest:
        found[HARDEST] = blocks[0].amax(0).unsqueeze(1)
    return found


def _merged_exponentials(offsets: Tensor, sums: Tensor) -> Tensor:
    """Σ e^(value − offset) of several blocks relative to one offset, as `LogSumExp` holds it: [P, n], [P, n] -> [n, 2].

    A block without any entry for a row has the sum 0; its offset means nothing.
    """
    offsets = offsets.masked_fill(sums == 0, LogSumExp.fill)
    offset = offsets.amax(0)
    base = offset.masked_fill(offset == LogSumExp.fill, 0)
    return torch.stack((offset, (sums * (offsets - base).exp()).sum(0)), dim=1)


def _asked(family: Family, pulls: Mapping[str, Pull] | None, *, like: Tensor) -> Tensor:
    """What the rows or columns of a side ask of each entry: [K, n]; from a side that is not served, a share of 0 in an infinite total."""
    numbers: list[Tensor] = []
    for reduction in _WIDTHS:
        if reduction in family.names and reduction != "count":
            pull = pulls[family.names[reduction]] if pulls is not None else Pull(like + torch.inf, like)
            numbers += [pull.total, pull.share] if reduction == "logsumexp" else [pull.share]
    return torch.stack(numbers)
