"""Ranks hear each other: sums, gathered objects, and grids of every shape."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipscale.errors import ConfigError
from clipscale.parallel.mesh import Mesh


def words(mesh: Mesh) -> dict[str, Any]:
    mesh.barrier()
    return {
        "sum": mesh.all_reduce_sum(torch.tensor([1.0, mesh.rank])).tolist(),
        "max": mesh.all_reduce_max(-mesh.rank),
        "objects": mesh.gather_objects({"rank": mesh.rank, "text": "ü" * mesh.rank}),
        "gathered": mesh.gather(torch.full((2,), mesh.rank)).tolist(),
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_hears_the_same(ranks, world):
    expected = {
        "sum": [float(world), float(sum(range(world)))],
        "max": 0,
        "objects": [{"rank": rank, "text": "ü" * rank} for rank in range(world)],
        "gathered": [[rank, rank] for rank in range(world)],
    }
    assert ranks(world)(words) == [expected] * world


def grid_shape(mesh: Mesh, rows: int | None) -> tuple[Any, ...]:
    grid = mesh.grid(rows)
    assert mesh.grid(rows) is grid, "a grid is made once"
    heard = []
    for group in (grid.row_group, grid.column_group):
        total = torch.tensor([mesh.rank])
        if group is not None:
            dist.all_reduce(total, group=group)
        heard.append(int(total))
    return grid.rows, grid.columns, *heard


def test_six_ranks_make_a_two_by_three_grid_of_neighbours(ranks):
    row_sums, column_sums = [3, 3, 3, 12, 12, 12], [3, 5, 7, 3, 5, 7]
    assert ranks(6)(grid_shape, None) == [(2, 3, row_sums[rank], column_sums[rank]) for rank in range(6)]


@pytest.mark.parametrize(("world", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2)])
def test_default_grid_is_as_square_as_can_be(ranks, world, rows, columns):
    assert {answer[:2] for answer in ranks(world)(grid_shape, None)} == {(rows, columns)}


def test_grid_rows_that_do_not_divide_are_refused_with_those_that_do(ranks):
    with pytest.raises(ConfigError, match="grid_rows 4 does not divide the 6 ranks; these do: 1, 2, 3, 6"):
        ranks(6)(grid_shape, 4)


def fail_on_rank_one(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise KeyError("only here")
    time.sleep(0.01)


def test_the_pool_raises_what_a_rank_raised_and_stays_usable(ranks):
    with pytest.raises(KeyError, match="only here") as caught:
        ranks(2)(fail_on_rank_one)
    assert "rank 1 of 2" in caught.value.__notes__[0]
    assert ranks(2)(words)[0]["max"] == 0
