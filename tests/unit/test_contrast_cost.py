"""What a call takes is known before it runs: bytes counted on a fake process group, products counted as they are made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale import ContrastiveLoss
from clipscale.errors import ConfigError

COUNT_ON_FAKE_RANKS = """
import json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

world, pairs, width, who, options = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
torch.set_num_threads(1)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)

class Count(TorchDispatchMode):
    received = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_allgather_base_":
            self.received += args[0].nbytes - args[1].nbytes
        elif name == "alltoall_base_":
            self.received += args[0].nbytes - args[0].nbytes // len(args[3])
        elif name == "allgather_":
            self.received += sum(part.nbytes for part in args[0][0][1:])
        elif name == "alltoall_":
            self.received += sum(part.nbytes for part in args[0][1:])
        elif name == "reduce_scatter_":
            self.received += sum(part.nbytes for part in args[1][0][1:])
        elif function.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier"):
            raise AssertionError(name)
        return answer

x, y = (torch.zeros(pairs, width).normal_().requires_grad_() for _ in range(2))
scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
if who == "open_clip":
    from open_clip.loss import ClipLoss
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=world)
    arguments = (x, y, scale)
else:
    from clipscale import ContrastiveLoss
    loss = ContrastiveLoss(**options)
    one = torch.ones(1, width)
    loss(one, one, scale.detach(), bias.detach(), text_ids=torch.ones(1, dtype=torch.int64))  # groups of ranks are made at the first call
    arguments = (x, y, scale, bias)
others = {"text_ids": torch.arange(pairs)} if options.get("objective") == "decoupled" else {}
with Count() as count:
    loss(*arguments, **others).backward()
print(count.received)
"""


def received_bytes(world: int, pairs: int, who: str, width: int = 512, **options: object) -> int:
    """What rank 0 of `world` fake ranks receives in one call, forward and backward."""
    command = [sys.executable, "-W", "ignore", "-c", COUNT_ON_FAKE_RANKS, str(world), str(pairs), str(width), who, json.dumps(options)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.parametrize(("world", "ratio"), [(4, 2.9), (16, 4.9), (64, 8.9), (256, 16.8), (1024, 32.0)])
def test_a_square_grid_receives_what_cost_says_and_hardly_more_than_the_least_there_can_be(world, ratio):
    pairs, width = 64, 512
    received = received_bytes(world, pairs, "clipscale", cache=0)
    assert received == ContrastiveLoss().cost(pairs * world, width, world).bytes_total
    side = round(world**0.5)
    least = 4 * (side - 1) * pairs * width * 4  # 4 B D (1/√W − 1/W) numbers, a rank sees at least 2B/√W vectors and owns 2B/W
    assert least < received <= 1.02 * least
    gathered_everywhere = 4 * (world - 1) * pairs * width * 4
    assert gathered_everywhere / received >= ratio


def test_open_clip_receives_what_gathering_everywhere_takes():
    assert received_bytes(4, 64, "open_clip") == 4 * 3 * 64 * 512 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "siglip"},
        {"objective": {"name": "dcl", "negatives": "both"}},
        {"objective": "dclw"},
        {"objective": "decoupled"},
        {"objective": {"name": "clip", "add": ["uniformity", "cacr"]}},
    ],
)
@pytest.mark.parametrize("world", [6, 7])
def test_cost_is_right_for_other_objectives_and_grids(options, world):
    received = received_bytes(world, 8, "clipscale", width=24, **options)
    assert received == ContrastiveLoss(**options).cost(8 * world, 24, world).bytes_total


@pytest.mark.parametrize(
    "wires", [{"feature_wire": "bfloat16"}, {"gradient_wire": "bfloat16"}, {"feature_wire": "float16", "gradient_wire": "bfloat16"}]
)
def test_a_narrow_wire_saves_what_cost_says(wires):
    full, narrow = (ContrastiveLoss(**options).cost(32 * 16, 512, 16).bytes_total for options in ({}, wires))
    assert narrow == received_bytes(16, 32, "clipscale", **wires)
    assert full - narrow == len(wires) * 6 * 32 * 512 * 2  # of 2(R − 1) + 2(C − 1) = 12 shares, half for each wire, 2 bytes a number


def test_what_stays_inside_nodes_and_what_leaves_them_is_all_there_is():
    one, many, spread = (ContrastiveLoss().cost(64 * 64, 512, 64, ranks_per_node=node) for node in (64, 8, 1))
    assert (one.bytes_intra_node, one.bytes_inter_node) == (one.bytes_total, 0)
    assert (spread.bytes_intra_node, spread.bytes_inter_node) == (0, one.bytes_total)
    assert many.bytes_intra_node + many.bytes_inter_node == many.bytes_total
    assert many.grid == (8, 8)  # rows of a node's 8 ranks: x stays inside, y leaves, beside the small talk of all with all
    assert many.bytes_inter_node == pytest.approx(many.bytes_total / 2, rel=0.02)


class CountProducts(TorchDispatchMode):
    """Multiplications in all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("objective", "cache", "products"),
    [
        ("clip", 0, 4),
        ("clip", 10**9, 3),
        ("clip", 50 * 60 * 4, None),
        ("siglip", 0, 3),
        ({"name": "dcl", "negatives": "both"}, 0, 12),
        ({"name": "mv_dhel"}, "auto", 6),
        ({"name": "supcon", "positives": "label"}, 0, 4),
        ({"name": "decoupled", "positives": "label"}, 0, 8),
        ({"name": "clip", "add": ["alignment", "cross_uniformity", "focal"]}, 0, 4),
    ],
)
def test_the_products_made_are_those_told(objective, cache, products):
    loss = ContrastiveLoss(objective, cache=cache, tile=(50, 60))
    x, y = (torch.nn.functional.normalize(torch.randn(120, 16), dim=1).requires_grad_() for _ in range(2))
    with CountProducts() as counter:
        loss(x, y, torch.tensor(10.0), torch.tensor(-5.0), numbers={"label": torch.arange(120) // 2}).backward()
    one = 120 * 120 * 16
    if products is None:  # the first of the six tiles is kept
        assert counter.multiplications == 4 * one - 50 * 60 * 16
        return
    assert counter.multiplications == products * one
    assert loss.cost(120, 16, 1).flops == 2 * products * one


def test_fused_kernels_keep_no_logits_and_one_tile_of_gradients():
    cost = ContrastiveLoss(backend="triton").cost(65_536, 512, 1, dtype=torch.bfloat16)
    assert cost.flops == 4 * 2 * 65_536**2 * 512
    assert cost.memory_bytes == 2 * 65_536 * 512 * 4 + 8_192 * 4_096 * 2  # gradients are summed in float32, the tile is bfloat16


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"global_batch": 10, "dim": 8, "world": 4}, "a global batch of 10 cannot be shared equally by 4 ranks"),
        ({"global_batch": 12, "dim": 8, "world": 12, "ranks_per_node": 8}, "12 ranks do not fill nodes of 8"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        ContrastiveLoss().cost(**call)


def test_a_grid_that_is_not_the_ranks_is_refused():
    with pytest.raises(ConfigError, match="grid 2×3 is 6 ranks, there are 4"):
        ContrastiveLoss(grid=(2, 3)).cost(16, 8, 4)
