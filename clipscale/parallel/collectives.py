"""Rows move between ranks: gathered to all of a group, or exchanged so that each rank gets its own back from all others.

Groups may hold another number of rows on every rank, also none; all ranks must know all sizes. Nothing here takes part in autograd: the
loss hands its gradients over itself (torch's functional collectives with autograd corrupt the heap on gloo).

Legend: G ranks in the group, rank g holds sizes[g] rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clipscale.phases import phase


def gather_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's rows, in rank order: [own size, ...] -> [sum of sizes, ...]. Without a group: the rows themselves."""
    rows = rows.detach().contiguous()
    if group is None or sum(sizes) == 0:
        return rows
    largest = max(sizes)
    padded = rows
    if len(rows) < largest:
        padded = rows.new_zeros((largest, *rows.shape[1:]))
        padded[: len(rows)] = rows
    gathered = rows.new_empty((len(sizes), *padded.shape))
    with phase("communication"):
        dist.all_gather_into_tensor(gathered.view(-1), padded.view(-1), group=group)
    if min(sizes) == largest:
        return gathered.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def exchange_rows(rows: Tensor, sizes: Sequence[int], own: int, group: dist.ProcessGroup | None) -> Tensor:
    """What every rank holds for this rank's rows, in rank order: [sum of sizes, ...] -> [G, sizes[own], ...].

    Summed over the first dimension this is a reduce-scatter of as many bytes, in an order of addition that is always the same.
    """
    rows = rows.detach().contiguous()
    if group is None or sum(sizes) == 0:
        return rows.unsqueeze(0)
    width = rows[0].numel()
    received = rows.new_empty((len(sizes), sizes[own], *rows.shape[1:]))
    with phase("communication"):
        dist.all_to_all_single(
            received.view(-1),
            rows.view(-1),
            output_split_sizes=[sizes[own] * width] * len(sizes),
            input_split_sizes=[size * width for size in sizes],
            group=group,
        )
    return received
