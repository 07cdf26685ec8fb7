"""The loss over several ranks is the textbook loss of the whole batch: value, every gradient, any grid, any raggedness."""

from __future__ import annotations

from typing import Any

import pytest
import textbook
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.objectives import Block, Max, Objective, Row, Term
from clipscale.objectives.clip import Clip
from clipscale.objectives.cwcl import Cwcl
from clipscale.objectives.dcl import Dcl
from clipscale.objectives.dclw import Dclw
from clipscale.objectives.decoupled import Decoupled
from clipscale.objectives.mv_dhel import MvDhel
from clipscale.objectives.mv_infonce import MvInfonce
from clipscale.objectives.siglip import Siglip
from clipscale.objectives.supcon import Supcon
from clipscale.parallel.mesh import Mesh

FP64, FP32 = 1e-12, 2e-5  # rounding of the sums involved, with room; the bars


class Hinge(Objective):
    """An objective of a researcher: ten lines, and the engine has never heard of it."""

    def terms(self, block: Block) -> dict[str, Term]:
        return {"hardest": Max(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> torch.Tensor:
        return (3 + row["hardest"] - row.positive).relu()


OBJECTIVES = {
    "clip": (Clip(), textbook.clip),
    "clip_smoothed": (Clip(label_smoothing=0.1), textbook.clip_smoothed),
    "clip_ignoring": (Clip(same_text="ignored"), textbook.clip_ignoring_same_text),
    "clip_smoothed_ignoring": (Clip(same_text="ignored", label_smoothing=0.3), textbook.clip_smoothed_ignoring_same_text),
    "siglip": (Siglip(), textbook.siglip),
    "cwcl": (Cwcl(), textbook.cwcl),
    "cwcl_from_first": (Cwcl(guided_by="first"), textbook.cwcl_from_first),
    "cwcl_knobs": (Cwcl(sharpen=3.0, centre=True, same_text="ignored"), textbook.cwcl_sharpened_centred_ignoring),
    "hinge": (Hinge(), textbook.hinge),
    "dcl": (Dcl(), textbook.dcl),
    "dcl_two_view": (Dcl(negatives="both"), textbook.dcl_two_view),
    "dclw_two_view": (Dclw(negatives="both", sigma=0.3), textbook.dclw_two_view),
    "supcon": (Supcon(), textbook.supcon),
    "multi_positive": (Supcon(positives="label", mean=False), textbook.multi_positive),
    "decoupled": (Decoupled(), textbook.decoupled),
    "mv_infonce": (MvInfonce(num_views=3), textbook.mv_infonce),
    "mv_infonce_code": (MvInfonce(num_views=3, same_view_negatives=True), textbook.mv_infonce_code),
    "mv_dhel": (MvDhel(num_views=3), textbook.mv_dhel),
    "mv_dhel_code": (MvDhel(form="code"), textbook.mv_dhel_code),
}
DEGENERATE_ALONE = {"dcl", "dcl_two_view", "dclw_two_view", "mv_infonce", "mv_infonce_code", "mv_dhel_code"}
"""Objectives whose textbook form of a single pair is infinite, or nothing but rounding."""
SIZES = {
    1: [[9], [1]],
    2: [[4, 4], [7, 0]],
    3: [[3, 3, 3], [0, 5, 2]],
    4: [[2, 2, 2, 2], [5, 0, 0, 4]],
    5: [[2, 1, 3, 1, 2]],
    6: [[2, 2, 2, 2, 2, 2], [1, 4, 0, 3, 2, 6]],
    7: [[2, 1, 3, 1, 2, 0, 4]],
    9: [[2] * 9],
}


def own_rows(mesh: Mesh, batch: textbook.Batch, sizes: list[int]) -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    start = sum(sizes[: mesh.rank])
    rows = slice(start, start + sizes[mesh.rank])
    x, y = batch.x[rows].clone().requires_grad_(), batch.y[rows].clone().requires_grad_()
    others = {"guide_x": batch.guide_x[rows], "guide_y": batch.guide_y[rows], "ids": batch.ids[rows]}
    views = {"z": batch.z[rows].clone().requires_grad_()}
    pairs = Pairs(x, y, **others, views=views, numbers={"label": batch.ids[rows]})
    return pairs, batch.scale.clone().requires_grad_(), batch.bias.clone().requires_grad_()


def compute(mesh: Mesh, objective: Objective, batch: textbook.Batch, sizes: list[int], settings: ContrastSettings) -> dict[str, Any]:
    pairs, scale, bias = own_rows(mesh, batch, sizes)
    output = contrastive_loss(objective, pairs, scale, bias, settings=settings, mesh=mesh)
    output.loss.backward()
    leaves = {"x": pairs.x, "y": pairs.y, "z": pairs.views["z"], "scale": scale, "bias": bias}
    return {
        "loss": [output.loss.item()],
        "metrics": {name: value.item() for name, value in output.metrics.items()},
        **{name: leaf.grad.tolist() for name, leaf in leaves.items()},
    }


def all_settings(world: int) -> list[ContrastSettings]:
    grids = [ContrastSettings(grid_rows=rows, tile_rows=2, tile_columns=3) for rows in range(1, world + 1) if world % rows == 0]
    return [ContrastSettings(method="dense"), ContrastSettings(), *grids]


def compute_all(mesh: Mesh, objective: Objective, dtype: torch.dtype, scale: float) -> list[dict[str, Any]]:
    answers = []
    for sizes in SIZES[mesh.world]:
        batch = textbook.make_batch(sum(sizes), scale=scale).to(dtype)
        answers += [compute(mesh, objective, batch, sizes, settings) for settings in all_settings(mesh.world)]
    return answers


def joined(answers: tuple[dict[str, Any], ...]) -> dict[str, torch.Tensor]:
    """Ranks' answers as one: rows in rank order, scale and bias gradients added."""
    rows = {name: [row for answer in answers for row in answer[name]] for name in ("x", "y", "z")}
    total = {name: torch.tensor([answer[name] for answer in answers], dtype=torch.float64).sum(0) for name in ("scale", "bias")}
    return {**{name: torch.tensor(value, dtype=torch.float64) for name, value in rows.items()}, **total}


def error(found: torch.Tensor, expected: torch.Tensor, *, floor: float) -> float:
    """Largest difference, relative to the largest expected number (or to `floor`, for gradients that are nothing but rounding)."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=floor))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize(("dtype", "scale", "bar"), [(torch.float64, 14.0, FP64), (torch.float32, 100.0, FP32)])
def test_any_ranks_grid_and_raggedness_give_the_textbook_loss_and_gradients(ranks, name, world, dtype, scale, bar):
    objective, loss = OBJECTIVES[name]
    answers = zip(*ranks(world)(compute_all, objective, dtype, scale), strict=True)
    for sizes in SIZES[world]:
        if sum(sizes) == 1 and name in DEGENERATE_ALONE:
            continue
        expected = textbook.gradients(loss, textbook.make_batch(sum(sizes), scale=scale).to(dtype))
        for settings, answer in zip(all_settings(world), answers, strict=False):
            assert all(one["loss"] == answer[0]["loss"] and one["metrics"] == answer[0]["metrics"] for one in answer), (
                "differs between ranks"
            )
            found = joined(answer) | {"loss": torch.tensor(answer[0]["loss"], dtype=torch.float64)}
            errors = {key: error(found[key], expected[key], floor=1e-3) for key in expected}
            assert max(errors.values()) <= bar, (sizes, settings, errors)


def compute_fused(mesh: Mesh, objective: Objective, sizes: list[int]) -> list[dict[str, Any]]:
    batch = textbook.make_batch(sum(sizes), scale=100.0).to(torch.float32)
    grids = [ContrastSettings(backend="triton", grid_rows=rows) for rows in (1, 2)]
    return [compute(mesh, objective, batch, sizes, settings) for settings in grids]


@pytest.mark.parametrize("name", ["clip", "clip_smoothed_ignoring", "siglip", "dcl"])
@pytest.mark.parametrize("sizes", [[20, 20, 20, 20], [37, 0, 1, 20]])
def test_the_fused_kernels_do_so_too(ranks, name, sizes):
    objective, loss = OBJECTIVES[name]
    expected = textbook.gradients(loss, textbook.make_batch(sum(sizes), scale=100.0).to(torch.float32))
    for answer in zip(*ranks(4)(compute_fused, objective, sizes), strict=True):
        assert all(one["loss"] == answer[0]["loss"] and one["metrics"] == answer[0]["metrics"] for one in answer)
        found = joined(answer) | {"loss": torch.tensor(answer[0]["loss"], dtype=torch.float64)}
        errors = {key: error(found[key], expected[key], floor=1e-3) for key in expected}
        assert max(errors.values()) <= FP32, errors


def repeat(mesh: Mesh, sizes: list[int]) -> bool:
    batch = textbook.make_batch(sum(sizes)).to(torch.float32)
    once, again = (compute(mesh, Clip(), batch, sizes, ContrastSettings(tile_rows=2, tile_columns=2)) for _ in range(2))
    return once == again


def test_the_same_call_gives_the_same_bits(ranks):
    assert ranks(4)(repeat, [3, 2, 4, 1]) == [True] * 4


def shared_layer(mesh: Mesh, world: int) -> list[list[float]]:
    """Gradient of a layer all ranks share, added over ranks as an engine would."""
    batch = textbook.make_batch(12)
    layer = torch.nn.Linear(12, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 72).reshape(6, 12))
    rows = slice(mesh.rank * 12 // world, (mesh.rank + 1) * 12 // world)
    x, y = (functional.normalize(layer(side[rows]), dim=1) for side in (batch.x, batch.y))
    contrastive_loss(Clip(), Pairs(x, y), batch.scale, settings=ContrastSettings(), mesh=mesh).loss.backward()
    return mesh.all_reduce_sum(layer.weight.grad).tolist()


def test_gradients_added_over_ranks_are_those_of_one_rank(ranks):
    alone = torch.tensor(ranks(1)(shared_layer, 1)[0], dtype=torch.float64)
    for answer in ranks(4)(shared_layer, 4):
        assert error(torch.tensor(answer, dtype=torch.float64), alone, floor=1e-3) <= FP64


def metrics_with_repeated_captions(mesh: Mesh, ids: list[int] | None) -> dict[str, float]:
    x = torch.eye(4)[[0, 1, 2, 3]]
    y = torch.eye(4)[[0, 1, 1, 0]]  # the third's partner is the second's caption, the fourth's is the first's
    rows = slice(2 * mesh.rank, 2 * mesh.rank + 2)
    pairs = Pairs(x[rows], y[rows], ids=None if ids is None else torch.tensor(ids)[rows])
    output = contrastive_loss(Clip(), pairs, torch.tensor(10.0), settings=ContrastSettings(), mesh=mesh)
    return {name: value.item() for name, value in output.metrics.items()}


def test_metrics_count_hits_and_do_not_hold_equal_captions_against_a_pair(ranks):
    plain = ranks(2)(metrics_with_repeated_captions, None)
    # x0 and x1 see their caption twice: a tie, so no hit; x2 and x3 see nothing of theirs. y0…y3: y0, y1 hit; y2, y3 point at x1, x0.
    # hardest negatives: x rows 1, 1, 0, 0 and y rows 0, 0, 1, 1
    assert plain == [{"x_to_y_top1": 0.0, "y_to_x_top1": 0.5, "mean_positive": 0.5, "hardest_negative": 0.5}] * 2
    by_caption = ranks(2)(metrics_with_repeated_captions, [7, 8, 8, 7])
    # without equal captions every hardest negative is 0; the two true pairs win from both sides, the other two tie at 0
    assert by_caption == [{"x_to_y_top1": 0.5, "y_to_x_top1": 0.5, "mean_positive": 0.5, "hardest_negative": 0.0}] * 2


class CountProducts(TorchDispatchMode):
    """Multiplications in all matrix products (torch's own counter overlooks those that add in place)."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        assert name not in ("bmm", "matmul", "einsum"), "a product this counter does not know"
        return function(*args, **(kwargs or {}))


def count_products(mesh: Mesh, rows: int, backward: bool, objective: Objective) -> int:
    batch = textbook.make_batch(24).to(torch.float32)
    pairs, scale, bias = own_rows(mesh, batch, [24 // mesh.world] * mesh.world)
    settings = ContrastSettings(grid_rows=rows, tile_rows=4, tile_columns=4, cache_bytes=0)
    with CountProducts() as counter, torch.set_grad_enabled(backward):
        contrastive_loss(objective, pairs, scale, bias, settings=settings, mesh=mesh)
    return counter.multiplications


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_each_logit_is_computed_once_in_the_world_and_four_products_suffice_for_the_gradient(ranks, rows):
    product = 24 * 24 * 12
    assert sum(ranks(6)(count_products, rows, False, Clip())) == product
    assert sum(ranks(6)(count_products, rows, True, Clip())) == 4 * product
    assert sum(ranks(6)(count_products, rows, True, Siglip())) == 3 * product  # one sweep: what entries are worth is known beforehand


class CountReceived(TorchDispatchMode):
    """Bytes that collectives bring to this rank from others."""

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            assert name in ("_allgather_base_", "alltoall_base_"), f"{name} is not counted"
            output, own = args[0], args[1]
            # gathered: everything but one's own; exchanged: of the equal parts of G ranks, all but one's own
            kept = own.nbytes if name == "_allgather_base_" else output.nbytes // len(args[3])
            self.received += output.nbytes - kept
        return function(*args, **(kwargs or {}))


def count_received(mesh: Mesh, rows: int) -> int:
    batch = textbook.make_batch(48 * mesh.world, width=256).to(torch.float32)
    pairs, scale, bias = own_rows(mesh, batch, [48] * mesh.world)
    mesh.grid(rows)
    with CountReceived() as counter:
        contrastive_loss(Clip(), pairs, scale, bias, settings=ContrastSettings(grid_rows=rows), mesh=mesh)
    return counter.received


@pytest.mark.parametrize(("world", "rows"), [(4, 2), (4, 1), (6, 2), (6, 3)])
def test_a_rank_receives_the_least_bytes_its_grid_allows(ranks, world, rows):
    features = (2 * (rows - 1) + 2 * (world // rows - 1)) * 48 * 256 * 4
    for received in ranks(world)(count_received, rows):
        assert features < received <= 1.02 * features  # besides features and their gradients: a few numbers for each row


def only_rank_zero_wants_gradients(mesh: Mesh) -> list[bool]:
    pairs, scale, bias = own_rows(mesh, textbook.make_batch(6), [3, 3])
    with torch.set_grad_enabled(mesh.is_main):
        output = contrastive_loss(Clip(), pairs, scale, bias, settings=ContrastSettings(), mesh=mesh)
    return [output.loss.requires_grad, output.loss.item() > 0]


def test_ranks_may_differ_in_wanting_gradients(ranks):
    assert ranks(2)(only_rank_zero_wants_gradients) == [[True, True], [False, True]]


# --- bad input: one rank's mistake is an error on every rank, and nobody hangs -------------------------------------------


def spoil(mesh: Mesh, what: str) -> tuple[Objective, Pairs, torch.Tensor, torch.Tensor | None, ContrastSettings]:
    """A good call, with one thing wrong on rank 1 only."""
    batch = textbook.make_batch(9)
    pairs, scale, bias = own_rows(mesh, batch, [3, 3, 3])
    call: dict[str, Any] = {"objective": Clip(), "scale": scale, "bias": bias, "settings": ContrastSettings()}
    fields: dict[str, Any] = {"x": pairs.x, "y": pairs.y, "guide_y": pairs.guide_y, "ids": pairs.ids}
    call["objective"] = {"no_guide": Cwcl(), "no_ids": Clip(same_text="ignored"), "no_bias": Siglip(), "bad_bias": Siglip()}.get(
        what, Clip()
    )
    if mesh.rank == 1:
        changes: dict[str, dict[str, Any]] = {
            "nan": {"x": pairs.x.detach().index_fill(0, torch.tensor(2), float("nan"))},
            "infinite_y": {"y": pairs.y.detach().index_fill(0, torch.tensor(0), float("inf"))},
            "widths_differ": {"y": pairs.y[:, :5]},
            "narrow_rank": {"x": pairs.x[:, :5], "y": pairs.y[:, :5]},
            "other_dtype": {"x": pairs.x.float(), "y": pairs.y.float()},
            "mixed_dtypes": {"x": pairs.x.float()},
            "integers": {"x": pairs.x.long(), "y": pairs.y.long()},
            "counts_differ": {"y": pairs.y[:2]},
            "one_dimension": {"x": pairs.x[0], "y": pairs.y[0]},
            "other_device": {"x": pairs.x.to("meta"), "y": pairs.y.to("meta")},
            "sparse": {"x": pairs.x.detach().to_sparse(), "y": pairs.y.detach().to_sparse()},
            "no_guide": {"guide_y": None},
            "no_ids": {"ids": None},
            "ids_missing_on_a_rank": {"ids": None},
            "short_ids": {"ids": pairs.ids[:1]},
            "short_guide": {"guide_y": pairs.guide_y[:1]},
        }
        fields |= changes.get(what, {})
        scales = {"zero_scale": 0.0, "negative_scale": -3.0, "nan_scale": float("nan"), "other_scale": 13.5}
        if what in scales:
            call["scale"] = torch.tensor(scales[what])
        call["scale"] = torch.ones(3) if what == "three_scales" else call["scale"]
        call["bias"] = {"no_bias": None, "bad_bias": torch.tensor(float("inf"))}.get(what, bias)
        call["objective"] = Clip(label_smoothing=0.2) if what == "other_objective" else call["objective"]
        call["settings"] = ContrastSettings(method="dense") if what == "other_method" else call["settings"]
    return call["objective"], Pairs(**fields), call["scale"], call["bias"], call["settings"]


def message_of(mesh: Mesh, what: str) -> str:
    objective, pairs, scale, bias, settings = spoil(mesh, what)
    try:
        contrastive_loss(objective, pairs, scale, bias, settings=settings, mesh=mesh)
    except ClipscaleError as caught:
        return f"{type(caught).__name__}: {caught}"
    return "no error"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nan", "rank 1 of 3: x is not finite in 1 of 3 rows, first in row 2"),
        ("infinite_y", "rank 1 of 3: y is not finite in 1 of 3 rows, first in row 0"),
        ("widths_differ", "rank 1 of 3: x [3, 12] and y [3, 5] must be"),
        ("counts_differ", "rank 1 of 3: x [3, 12] and y [2, 12] must be"),
        ("one_dimension", "rank 1 of 3: x [12] and y [12] must be"),
        ("narrow_rank", "ranks disagree about the width: rank 0: 12, rank 1: 5, rank 2: 12"),
        ("other_dtype", "ranks disagree about the dtype: rank 0: torch.float64, rank 1: torch.float32"),
        ("mixed_dtypes", "rank 1 of 3: x is torch.float32 and y is torch.float64"),
        ("integers", "rank 1 of 3: x is torch.int64"),
        ("other_device", "rank 1 of 3: x is on meta, this rank's device is cpu"),
        ("sparse", "rank 1 of 3: NotImplementedError: "),
        ("no_guide", "rank 1 of 3: objective Cwcl needs guide features of the second modality (guide_y), none was given"),
        ("no_ids", "rank 1 of 3: objective Clip needs caption ids"),
        ("ids_missing_on_a_rank", "ranks disagree about the caption ids: rank 0: True, rank 1: False"),
        ("no_bias", "rank 1 of 3: objective Siglip needs a logit bias"),
        ("bad_bias", "rank 1 of 3: bias is inf"),
        ("short_ids", "rank 1 of 3: ids torch.int64 [1] must be int64 [3]"),
        ("short_guide", "rank 1 of 3: guide_y [1, 7] must be"),
        ("zero_scale", "rank 1 of 3: scale is 0; it must be a finite positive number"),
        ("negative_scale", "rank 1 of 3: scale is -3"),
        ("nan_scale", "rank 1 of 3: scale is nan"),
        ("three_scales", "rank 1 of 3: scale must be a single number, it has shape [3]"),
        ("other_scale", "ranks disagree about the scale: rank 0: 14, rank 1: 13.5, rank 2: 14"),
        ("other_objective", "ranks disagree about the objective"),
        ("other_method", "ranks disagree about the contrast settings"),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all_that_names_it(ranks, what, said):
    messages = ranks(3)(message_of, what)
    assert messages == [messages[0]] * 3
    kind = "NonFiniteFeatures" if "not finite in" in said else "ContrastError"
    assert messages[0].startswith(f"{kind}: {said}")


def test_after_an_error_the_ranks_are_still_in_step(ranks):
    ranks(3)(message_of, "nan")
    assert ranks(3)(message_of, "nothing") == ["no error"] * 3


def no_pairs_anywhere(mesh: Mesh) -> str:
    pairs, scale, bias = own_rows(mesh, textbook.make_batch(1), [0, 0])
    try:
        contrastive_loss(Clip(), pairs, scale, bias, settings=ContrastSettings(), mesh=mesh)
    except ClipscaleError as caught:
        return str(caught)
    return "no error"


def test_an_empty_global_batch_is_refused(ranks):
    assert all("none of 2 ranks has a pair" in message for message in ranks(2)(no_pairs_anywhere))


def with_settings(mesh: Mesh, settings: ContrastSettings) -> None:
    pairs, scale, bias = own_rows(mesh, textbook.make_batch(4), [2, 2])
    contrastive_loss(Clip(), pairs, scale, bias, settings=settings, mesh=mesh)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ContrastSettings(grid_rows=3), "grid_rows 3 does not divide the 2 ranks; these do: 1, 2"),
        (ContrastSettings(method="tiled"), "'tiled' is for one rank, there are 2"),
    ],
)
def test_settings_that_do_not_fit_the_ranks_are_refused_before_any_work(ranks, settings, said):
    with pytest.raises(ConfigError, match=said):
        ranks(2)(with_settings, settings)
