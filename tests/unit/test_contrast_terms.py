"""Reductions done piece by piece equal the whole, also over nothing and over numbers far apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipscale.objectives import LogSumExp, Max, Pull, Sum, Term, softplus

KINDS: list[type[Term]] = [Sum, LogSumExp, Max]


def values(kind: str) -> tuple[Tensor, Tensor]:
    """Values [7, 9] and which of them take no part."""
    draw = torch.Generator().manual_seed(2)
    numbers = torch.randn(7, 9, generator=draw, dtype=torch.float64)
    without = torch.rand(7, 9, generator=draw) < 0.3
    if kind == "far apart":
        numbers = numbers + torch.linspace(-400, 400, 7, dtype=torch.float64)[:, None]
    if kind == "rows of nothing":
        without[2], without[:, 4] = True, True
    if kind == "nothing at all":
        without[:] = True
    if kind == "ties":
        numbers = numbers.round()
    return numbers, without


SITUATIONS = ["plain", "far apart", "rows of nothing", "nothing at all", "ties"]


def expected_rows(term: type[Term], numbers: Tensor, without: Tensor) -> list[float]:
    """In plain Python, one row at a time."""
    kept = [
        [value for value, out in zip(row, gone, strict=True) if not out]
        for row, gone in zip(numbers.tolist(), without.tolist(), strict=True)
    ]
    if term is Sum:
        return [sum(row) for row in kept]
    if term is Max:
        return [max(row, default=float("-inf")) for row in kept]
    return [torch.tensor(row, dtype=torch.float64).logsumexp(0).item() if row else float("-inf") for row in kept]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_merged_are_the_reduction_of_the_whole(kind, situation):
    numbers, without = values(situation)
    merged = kind.nothing(7, numbers)
    for columns in (slice(0, 2), slice(2, 3), slice(3, 9)):
        merged = kind.merge(merged, kind(numbers[:, columns], without[:, columns]).partials()[0])
    expected = torch.tensor(expected_rows(kind, numbers, without), dtype=torch.float64)
    torch.testing.assert_close(kind.total(merged), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(kind(numbers, without).reduce(1), expected, rtol=1e-14, atol=1e-14)
    columns_total = kind.total(kind(numbers, without).partials()[1])
    torch.testing.assert_close(columns_total, kind(numbers.T, without.T).reduce(1), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", ["rows", "columns", "both"])
def test_pulls_are_the_gradient_of_the_reduction(kind, situation, sides):
    numbers, without = values(situation)
    leaf = numbers.clone().requires_grad_()
    term = kind(leaf, without)
    totals = [term.reduce(1), term.reduce(0)]
    weights = [torch.linspace(-1, 2, len(total), dtype=torch.float64) for total in totals]
    for place, side in enumerate(("rows", "columns")):
        if sides not in (side, "both"):
            weights[place] = torch.zeros_like(weights[place])
    expected = torch.autograd.grad(totals, leaf, weights)[0]
    with torch.no_grad():
        partials = kind(numbers, without).partials()
        rows, columns = (Pull(kind.total(partial), kind.share(partial, weight)) for partial, weight in zip(partials, weights, strict=True))
        pull = kind(numbers, without).pull(rows if sides != "columns" else None, columns if sides != "rows" else None)
    found = pull.masked_fill(without, 0)  # as the gradient of filling in does
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_softplus_is_exact_where_torchs_own_is_cut_off():
    values = torch.tensor([-torch.inf, -700.0, -30.0, 0.0, 25.0, 700.0], dtype=torch.float64)
    expected = torch.logaddexp(torch.zeros(6, dtype=torch.float64), values)
    torch.testing.assert_close(softplus(values), expected, rtol=1e-15, atol=0)
    assert torch.nn.functional.softplus(values[4:5]).item() == 25.0 != softplus(values[4:5]).item()
