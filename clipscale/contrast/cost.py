"""What a call of the loss takes, told before it runs: bytes received, multiplications, memory.

The bytes are exact: tests count them. They belong to one call with gradients for both sides, on ranks with equal shares of the batch.

Legend: W ranks in an R×C grid, b pairs on each, D embedding width, K numbers that hold a partially reduced row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipscale.contrast.choose import backend_name, tile_shapes
from clipscale.contrast.grouped import check_groups
from clipscale.contrast.layout import SIDES, layouts_of, numbers_of
from clipscale.contrast.pairs import FACTS
from clipscale.contrast.result import METRICS, TALLY, Totals, pairs_of_views, rows_of
from clipscale.contrast.settings import ContrastSettings, named_dtype
from clipscale.errors import ConfigError
from clipscale.objectives import Objective, Own, Side
from clipscale.parallel.mesh import grid_shape


@dataclass(frozen=True)
class Cost:
    """One call, forward and backward, on one rank."""

    grid: tuple[int, int]
    """Rows and columns of ranks."""
    bytes_total: int
    """Received from other ranks."""
    bytes_intra_node: int
    """Of these, from ranks of the same node, on the rank that receives the most from others."""
    bytes_inter_node: int
    """Of these, from ranks of other nodes, on that rank."""
    flops: int
    """Of matrix products, two for each multiplication; all else is of lower order."""
    memory_bytes: int
    """Gathered features, gradients and kept logits, and six tiles for what is computed on one (with fused kernels: one tile of gradients,
    in the features' dtype); the features themselves not counted."""


def cost_of(
    objective: Objective,
    settings: ContrastSettings,
    global_batch: int,
    dim: int,
    *,
    world: int,
    ranks_per_node: int | None,
    dtype: torch.dtype,
    device: str | None = None,
) -> Cost:
    """What one call takes; without `ranks_per_node`, all ranks are on one node; without `device`, a kind of device, on what is here.

    Counted is what the objective needs: guides as wide as the embeddings, ids when it needs ids, its numbers as floating ones.

    Raises:
        ConfigError: the batch, the grid or the groups do not fit the ranks, or the method is dense.
    """
    _check(settings, global_batch, world, ranks_per_node)
    return _Counter(objective, settings, global_batch // world, dim, world, ranks_per_node or world, dtype, device).cost()


def _check(settings: ContrastSettings, global_batch: int, world: int, ranks_per_node: int | None) -> None:
    if settings.method == "dense":
        raise ConfigError("the cost of method 'dense' is not modelled: it is the reference, every rank holds B × B logits")
    if world < 1 or global_batch < 1 or global_batch % world:
        raise ConfigError(f"a global batch of {global_batch} cannot be shared equally by {world} ranks")
    if ranks_per_node is not None and (ranks_per_node < 1 or world % min(ranks_per_node, world)):
        raise ConfigError(f"{world} ranks do not fill nodes of {ranks_per_node}")


class _Counter:
    def __init__(
        self,
        objective: Objective,
        settings: ContrastSettings,
        pairs: int,
        dim: int,
        world: int,
        ranks_per_node: int,
        dtype: torch.dtype,
        device: str | None,
    ) -> None:
        self.objective, self.settings, self.pairs, self.dim = objective, settings, pairs, dim
        self.world, self.node, self.dtype = world, ranks_per_node, named_dtype(settings.feature_dtype) or dtype
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.ranks = check_groups(objective, world=world)
        self.calls = max(1, objective.groups // world)
        self.b = pairs // self.calls
        self.rows, self.columns = grid_shape(self.ranks, settings.grid_rows)
        self.layouts = layouts_of(objective, like=torch.zeros((), dtype=self.wide))
        self.derived = numbers_of(objective)[len(objective.numbers) :]
        self.guided = bool({"guide", "first_guide"} & objective.needs)
        here = "cuda" if torch.cuda.is_available() or settings.backend == "triton" else "cpu"
        self.device = torch.device(device or here)
        self.fused = settings.backend == "triton" or backend_name(settings, objective, device=self.device, dtype=self.dtype) == "triton"

    def cost(self) -> Cost:
        along = {"x": self.columns, "y": self.rows}  # ranks in the line along which a side travels
        each = {side: self._bytes_from_each(side) for side in SIDES}
        everyone = self._bytes_from_everyone()
        total = everyone * (self.world - 1) + sum(each[side] * (along[side] - 1) for side in SIDES) * self.calls
        inter = max(self._inter(rank, each, everyone) for rank in range(self.world))
        return Cost((self.rows, self.columns), total, total - inter, inter, self._flops(), self._memory())

    def _views(self, side: Side) -> set[str]:
        return {product[0 if side == "x" else 1] for product in self.objective.products}

    def _bytes_from_everyone(self) -> int:
        """What ranks tell all others: facts, the guides' sum, and the means of groups."""
        centre = self.dim * 8 if self.guided and self.objective.centres_guide else 0
        means = 8 * (1 + METRICS) if self.objective.groups > 1 else 0
        return FACTS * 8 + centre + means

    def _bytes_from_each(self, side: Side) -> int:
        """What a rank receives from each other rank of the line along which `side` travels."""
        wire, back = named_dtype(self.settings.feature_wire) or self.dtype, named_dtype(self.settings.gradient_wire) or self.wide
        features = len(self._views(side)) * self.dim * (wire.itemsize + back.itemsize)
        given = 8 * ("ids" in self.objective.needs) + self.wide.itemsize * (len(self.objective.numbers) + self.dim * self.guided)
        given += self.wide.itemsize * len(self.derived) * (1 + sum(layout.has_gradient for layout in self.layouts))
        statistics = sum((1 + tensor.requires_grad) * tensor.numel() for tensor in self._statistics().values())
        return self.b * (features + given + self.wide.itemsize * self._numbers(side)) + 8 * (TALLY + statistics)

    def _numbers(self, side: Side) -> int:
        """Statistics of each row that cross the line, forward and backward."""
        count = 0
        for place, layout in enumerate(self.layouts):
            before = len({name for earlier in self.layouts[:place] for name in earlier.names(side)})
            count += before + layout.width(side)
            if layout.has_gradient:
                shares_alone = self.objective.one_sweep
                count += (1 if shares_alone else 2) * len(layout.names(side)) + before
        return count

    def _statistics(self) -> dict[str, torch.Tensor]:
        """The objective's statistics and row sums of no pairs; those that need a gradient cross the lines twice."""
        nothing = torch.zeros(0, dtype=self.wide, requires_grad=True)
        views = {view: torch.zeros(0, self.dim, dtype=self.wide, requires_grad=True) for view in self.objective.views}
        numbers = dict.fromkeys(numbers_of(self.objective), nothing)
        bias = torch.zeros((), dtype=self.wide) if "bias" in self.objective.needs else None
        own = Own(views, dict.fromkeys(pairs_of_views(self.objective), nothing), torch.ones((), dtype=self.wide), numbers, bias)
        totals: Totals = {side: {name: nothing for layout in self.layouts for name in layout.names(side)} for side in SIDES}
        return self.objective.statistics(own) | self.objective.row_sums(rows_of(totals, own=own, count=0, statistics={}))

    def _inter(self, rank: int, each: dict[Side, int], everyone: int) -> int:
        """Bytes that one rank receives from other nodes."""
        first = rank - rank % self.ranks
        row, column = divmod(rank % self.ranks, self.columns)
        lines: dict[Side, list[int]] = {
            "x": [first + row * self.columns + other for other in range(self.columns)],
            "y": [first + other * self.columns + column for other in range(self.rows)],
        }
        away = sum(each[side] * self._away(rank, lines[side]) for side in SIDES) * self.calls
        return away + everyone * self._away(rank, range(self.world))

    def _away(self, rank: int, ranks: Sequence[int]) -> int:
        return sum(other // self.node != rank // self.node for other in ranks)

    def _logits(self) -> int:
        return self.b * self.columns * self.b * self.rows

    def _flops(self) -> int:
        logits, products = self._logits() * self.calls, len(self.objective.products)
        size = self._logits() * self.wide.itemsize * products
        kept = self._kept(size) >= size
        back = sum(layout.has_gradient for layout in self.layouts)
        made = 1 if kept or self.objective.one_sweep else len(self.layouts) + back
        guides = (len(self.layouts) + back) * self.guided
        return 2 * logits * self.dim * (products * (made + 2 * back) + guides)

    def _memory(self) -> int:
        lengths = {"x": self.b * self.columns, "y": self.b * self.rows}
        gathered = sum(lengths[side] * self.dim * self.dtype.itemsize * len(self._views(side)) for side in SIDES if lengths[side] > self.b)
        gradients = sum(lengths[side] * self.dim * self.wide.itemsize * len(self._views(side)) for side in SIDES)
        logits = self._logits() * self.wide.itemsize * len(self.objective.products)
        kept = min(logits, self._kept(logits))
        shapes = tile_shapes(self.settings, backend="triton" if self.fused else "torch", device=self.device.type)
        height, width = shapes["gradient"]
        tile = min(height, lengths["x"]) * min(width, lengths["y"])
        return gathered + gradients + kept + tile * (self.dtype.itemsize if self.fused else 6 * self.wide.itemsize)

    def _kept(self, logits_bytes: int) -> int:
        """Bytes of logits that the first sweep keeps."""
        return 0 if self.fused else self.settings.cache_for(logits_bytes)
