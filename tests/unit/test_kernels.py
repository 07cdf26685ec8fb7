"""The fused kernels, run by triton's interpreter: against textbook losses in float64."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import textbook
import torch
from torch import Tensor
from torch.nn import functional

from clipscale import ContrastiveLoss
from clipscale.contrast.kernels.family import knows
from clipscale.errors import ConfigError
from clipscale.objectives import Block, LogSumExp, Need, Objective, Row, SoftplusSum, Sum, Terms, softplus
from clipscale.objectives.clip import Clip
from clipscale.objectives.cwcl import Cwcl
from clipscale.objectives.dcl import Dcl
from clipscale.objectives.dclw import Dclw
from clipscale.objectives.decoupled import Decoupled
from clipscale.objectives.m2_grouped import M2Grouped
from clipscale.objectives.mv_dhel import MvDhel
from clipscale.objectives.siglip import Siglip
from clipscale.objectives.supcon import Supcon

OBJECTIVES = {
    "clip": (Clip(), textbook.clip),
    "smoothed": (Clip(label_smoothing=0.1), textbook.clip_smoothed),
    "ignoring": (Clip(same_text="ignored"), textbook.clip_ignoring_same_text),
    "smoothed_ignoring": (Clip(same_text="ignored", label_smoothing=0.3), textbook.clip_smoothed_ignoring_same_text),
    "siglip": (Siglip(), textbook.siglip),
    "dcl": (Dcl(), textbook.dcl),
}
SINGLE = 2e-5  # the bar for float32


def gradients_of(objective: Objective, batch: textbook.Batch, **options: object) -> dict[str, Tensor]:
    # blocks of 32 × 16 begin and end wherever pairs do: the last row of one is the first column of another, and the other way round
    loss = ContrastiveLoss(objective, backend="triton", tile=(17, 35), **options)
    scale, bias = batch.scale.float(), batch.bias.float()
    found = loss.loss_and_grad(batch.x, batch.y, scale, bias, text_ids=batch.ids)
    assert found.loss.dtype == torch.float32
    return {"loss": found.loss, "x": found[1], "y": found[2], "scale": found[3], "bias": found[4]}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_kernels_give_the_textbook_loss_and_gradients_in_float32(name: str, scale: float) -> None:
    objective, expected_of = OBJECTIVES[name]
    batch = textbook.make_batch(53, width=20, scale=scale).to(torch.float32)
    expected = textbook.gradients(expected_of, batch.to(torch.float64))
    found = gradients_of(objective, batch)
    for leaf in ("loss", "x", "y", "scale"):
        assert distance(found[leaf], expected[leaf]) <= SINGLE, leaf
    if "bias" in objective.needs:
        assert distance(found["bias"], expected["bias"]) <= SINGLE


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_bfloat16_features_lose_only_the_rounding_of_the_gradient_tile(name: str) -> None:
    objective, expected_of = OBJECTIVES[name]
    batch = textbook.make_batch(96, width=128, scale=30.0).to(torch.bfloat16)
    expected = textbook.gradients(expected_of, batch.to(torch.float64))
    found = gradients_of(objective, batch)
    assert distance(found["loss"], expected["loss"]) <= SINGLE  # statistics are float32
    assert distance(found["scale"], expected["scale"]) <= 1e-4  # from registers, where nothing is rounded
    for leaf in ("x", "y"):  # each entry of the tile is rounded to 2^-9; partners' shares cancel in part
        assert 1e-5 < distance(found[leaf], expected[leaf]) <= 4e-3


def test_fitted_pairs_keep_their_digits() -> None:
    batch = textbook.make_batch(64, width=64, scale=100.0, correlation=4.0).to(torch.float32)

    def fitted(own: textbook.Batch) -> Tensor:
        logits = own.scale * own.x @ own.y.T
        pairs = logits.diag()
        others = logits.masked_fill(torch.eye(len(pairs), dtype=torch.bool), -torch.inf)
        return sum(-functional.logsigmoid(pairs - others.logsumexp(dim)).mean() for dim in (0, 1)) / 2

    expected = textbook.gradients(fitted, batch.to(torch.float64))
    assert float(expected["loss"]) < 1e-6
    found = gradients_of(Clip(), batch)
    assert distance(found["x"], expected["x"]) <= 1e-4
    assert distance(found["loss"], expected["loss"]) <= 1e-4


def test_tiny_sums_of_softplus_keep_their_digits() -> None:
    batch = textbook.make_batch(30, width=40, scale=60.0)
    batch.x = batch.y = functional.normalize(torch.eye(40, dtype=torch.float64)[:30] + 0.01, dim=1)
    batch.bias = torch.tensor([-30.0], dtype=torch.float64)
    batch = batch.to(torch.float32)
    expected = textbook.gradients(textbook.siglip, batch.to(torch.float64))
    assert float(expected["loss"]) < 1e-8  # 1 + e^logit is 1 in float32
    found = gradients_of(Siglip(), batch)
    for leaf in ("loss", "x", "y"):
        assert distance(found[leaf], expected[leaf]) <= SINGLE


def test_a_block_in_which_a_row_has_nothing_does_not_hide_what_others_hold() -> None:
    batch = textbook.make_batch(17, width=24, scale=200.0)  # columns in blocks of 16 and 1: the last pair sees only itself in the second
    centre = batch.x.mean(0)
    batch.x, batch.y = (functional.normalize(side + sign * 20 * centre, dim=1) for side, sign in ((batch.x, 1), (batch.y, -1)))
    batch = batch.to(torch.float32)
    expected = textbook.gradients(textbook.clip, batch.to(torch.float64))
    found = gradients_of(Clip(), batch)
    assert float((batch.x @ batch.y.T).max()) * 200 < -110  # relative to 0 every exponential is 0 in float32
    for leaf in ("loss", "x", "y"):
        assert distance(found[leaf], expected[leaf]) <= 1e-4  # a logit of 200 is off by 1e-5


def test_rows_and_columns_far_below_the_block_neither_underflow_nor_overflow() -> None:
    batch = textbook.make_batch(48, width=24, scale=1000.0)
    centre = batch.y.mean(0)
    batch.y = functional.normalize(batch.y + 3 * centre, dim=1)
    batch.x = functional.normalize(batch.x + 3 * centre, dim=1)
    batch.x[5], batch.y[9] = -batch.x[5], -batch.y[9]  # their logits lie hundreds below all others of their blocks
    batch = batch.to(torch.float32)
    expected = textbook.gradients(textbook.clip, batch.to(torch.float64))
    found = gradients_of(Clip(), batch)
    # a logit of 1,000 in float32 has an absolute error of 6e-5, which is the relative one of its exponential
    assert distance(found["loss"], expected["loss"]) <= SINGLE
    for leaf in ("x", "y"):
        assert bool(torch.isfinite(found[leaf]).all())
        assert distance(found[leaf], expected[leaf]) <= 3e-4


def test_extra_texts_are_negatives_in_the_kernels_too() -> None:
    batch = textbook.make_batch(37, width=20, scale=100.0).to(torch.float32)
    extra = functional.normalize(batch.x[:21] + 0.05 * textbook.make_batch(21, width=20, seed=1).to(torch.float32).y, dim=1)
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.x, batch.y, extra)]
    ContrastiveLoss(backend="triton", tile=24)(leaves[0], leaves[1], batch.scale, extra_texts=leaves[2]).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logits = batch.scale.double() * exact[0] @ torch.cat(exact[1:]).T
    rows, columns = (functional.cross_entropy(side, torch.arange(37)) for side in (logits, logits[:, :37].T))
    ((rows + columns) / 2).backward()
    for ours, expected in zip(leaves, exact, strict=True):
        assert distance(ours.grad, expected.grad) <= SINGLE


class Everything(Objective):
    """One sweep over all combinations, pairs included."""

    one_sweep: ClassVar[bool] = True

    def terms(self, block: Block) -> Terms:
        return {"all": SoftplusSum(block.logits)}

    def row_loss(self, row: Row) -> Tensor:
        return row["all"] - row.positive


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("objective", [Clip(), Siglip(), Everything()])
def test_metrics_come_from_the_kernels_as_from_torch(objective: Objective, with_ids: bool) -> None:
    batch = textbook.make_batch(53, width=20).to(torch.float32)
    told = {}
    for backend in ("torch", "triton"):
        loss = ContrastiveLoss(objective, backend=backend, tile=40)
        loss(batch.x.requires_grad_(), batch.y, batch.scale, batch.bias, text_ids=batch.ids if with_ids else None)
        told[backend] = {name: float(value) for name, value in loss.metrics.items()}
    assert told["triton"] == pytest.approx(told["torch"], rel=1e-6)


def test_equal_calls_give_equal_bits_and_strides_are_followed() -> None:
    batch = textbook.make_batch(40, width=20).to(torch.float32)
    wide = torch.cat([batch.x, batch.y], dim=1)
    strided = textbook.Batch(wide[:, :20], wide[:, 20:], *(getattr(batch, name) for name in list(vars(batch))[2:]))
    turned = textbook.Batch(batch.x.T.contiguous().T, batch.y, *(getattr(batch, name) for name in list(vars(batch))[2:]))
    first, again = gradients_of(Clip(), batch), gradients_of(Clip(), batch)
    for leaf in ("loss", "x", "y", "scale"):
        assert torch.equal(first[leaf], again[leaf])
        for other in (strided, turned):  # torch adds numbers that lie apart in another order, hence no equality
            assert distance(gradients_of(Clip(), other)[leaf], first[leaf].double()) <= 1e-6


class Borrowed(Objective):
    """Somebody's own, of the same family."""

    def terms(self, block: Block) -> Terms:
        return {"all": LogSumExp(block.logits), "count": Sum(torch.ones_like(block.logits))}

    def row_loss(self, row: Row) -> Tensor:
        return row["all"] - row["count"].log() - row.positive


class Halved(Objective):
    """Its values are not the logits."""

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits / 2, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return softplus(row["negatives"] - row.positive / 2)


class Mixed(Objective):
    """Two terms over different entries."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ids"})

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits, block.left_out("ignored")), "all": Sum(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return row["negatives"] - row["all"]


class Sided(Objective):
    """A term for one side alone."""

    def terms(self, block: Block) -> Terms:
        return {"negatives": LogSumExp(block.logits, block.left_out(), "x")}

    def row_loss(self, row: Row) -> Tensor:
        return row.positive if row.side == "y" else row["negatives"]


def test_the_family_is_known_by_its_terms_alone() -> None:
    def known(objective: Objective, *, extras: tuple[str, ...] = (), captions: bool = False) -> bool:
        return knows(objective, extras=frozenset(extras), captions=captions)

    for objective in (Clip(), Clip(label_smoothing=0.1), Siglip(), Dcl(), Dclw(), M2Grouped(), Borrowed()):
        assert known(objective), objective
        assert known(objective, captions=True), objective
    assert known(Clip(label_smoothing=0.1), extras=("x", "y"))
    for objective in (Cwcl(), Dcl(negatives="both"), MvDhel(num_views=3), Halved(), Mixed(), Sided(), Supcon(), Decoupled()):
        assert not known(objective, captions=True), objective


def test_somebody_elses_objective_runs_in_the_kernels() -> None:
    batch = textbook.make_batch(30, width=20).to(torch.float32)

    def expected_of(own: textbook.Batch) -> Tensor:
        logits = own.scale * own.x @ own.y.T
        return sum((logits.logsumexp(dim) - math.log(30) - logits.diag()).mean() for dim in (0, 1))

    expected = textbook.gradients(expected_of, batch.to(torch.float64))
    found = gradients_of(Borrowed(), batch)
    for leaf in ("loss", "x", "y", "scale"):
        assert distance(found[leaf], expected[leaf]) <= SINGLE


@pytest.mark.parametrize(
    ("objective", "dtype", "options", "message"),
    [
        (Cwcl(), torch.float32, {}, "its kernels do not know the terms of objective Cwcl; use 'auto' or 'compile'"),
        (Clip(), torch.float64, {}, "features are torch.float64, its kernels take torch.bfloat16 and torch.float32"),
        (Clip(), torch.float32, {"cache": 1000}, "cache_bytes 1000 cannot keep any; use 0, or backend 'compile'"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(objective: Objective, dtype: torch.dtype, options: dict[str, int], message: str) -> None:
    batch = textbook.make_batch(6).to(dtype)
    with pytest.raises(ConfigError, match=message):
        ContrastiveLoss(objective, backend="triton", **options)(batch.x, batch.y, batch.scale, text_guide=batch.guide_y)


def test_without_an_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    batch = textbook.make_batch(6).to(torch.float32)
    with pytest.raises(ConfigError, match="features are on cpu, its kernels need CUDA; use 'auto' or 'torch'"):
        ContrastiveLoss(backend="triton")(batch.x, batch.y, batch.scale)


class Untrue(Siglip):
    """Says that it is linear, and is not."""

    one_sweep: ClassVar[bool] = True

    def terms(self, block: Block) -> Terms:
        return {"negatives": SoftplusSum(block.logits, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        return row["negatives"].square()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_objective_that_is_not_linear_cannot_claim_one_sweep(backend: str) -> None:
    batch = textbook.make_batch(6).to(torch.float32)
    with pytest.raises(TypeError, match="objective Untrue says one_sweep, but d loss / d 'negatives' depends on its terms"):
        ContrastiveLoss(Untrue(), backend=backend)(batch.x.requires_grad_(), batch.y, batch.scale, batch.bias)
