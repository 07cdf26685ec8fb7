"""The drop-in loss equals open_clip's own losses on one device."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import textbook
import torch
from open_clip.loss import ClipLoss, SigLipLoss

import clipscale
from clipscale import ContrastiveLoss, contrastive_loss_and_grad
from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.errors import ConfigError
from clipscale.objectives.clip import Clip
from clipscale.objectives.cwcl import Cwcl
from clipscale.parallel.mesh import Mesh


@pytest.mark.parametrize(("name", "theirs"), [("clip", ClipLoss), ("siglip", SigLipLoss)])
def test_it_takes_the_place_of_open_clips_losses(name, theirs):
    batch = textbook.make_batch(20).to(torch.float32)
    results = []
    for loss in (ContrastiveLoss(name, tile=8), theirs()):
        leaves = [leaf.clone().requires_grad_() for leaf in (batch.x, batch.y, batch.scale, batch.bias)]
        value = loss(*leaves, output_dict=True)["contrastive_loss"]
        gradients = torch.autograd.grad(value, leaves[:3] if name == "clip" else leaves)
        results.append((value.detach(), *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def test_objectives_with_settings_and_needs_are_accepted():
    batch = textbook.make_batch(9)
    loss = ContrastiveLoss(Cwcl())(batch.x, batch.y, batch.scale, text_guide=batch.guide_y)
    assert loss.item() == pytest.approx(textbook.cwcl(batch).item(), rel=1e-13)


def test_a_grid_of_other_ranks_is_refused():
    batch = textbook.make_batch(3)
    with pytest.raises(ConfigError, match="grid 1×2 is 2 ranks, there are 1"):
        ContrastiveLoss(grid=(1, 2))(batch.x, batch.y, batch.scale)


def test_the_package_root_offers_it_without_importing_torch():
    code = "import sys, clipscale; assert 'torch' not in sys.modules; print(clipscale.ContrastiveLoss.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ContrastiveLoss\n"
    with pytest.raises(AttributeError, match="no attribute 'ContrastLoss'"):
        _ = clipscale.ContrastLoss


def test_gradients_without_autograd_are_those_of_the_backward_pass():
    batch = textbook.make_batch(20)
    leaves = [leaf.clone().requires_grad_() for leaf in (batch.x, batch.y, batch.scale, batch.bias)]
    loss = ContrastiveLoss("siglip", tile=(8, 5))
    loss(*leaves).backward()
    known = contrastive_loss_and_grad(*(leaf.detach() for leaf in leaves), objective="siglip", tile=(8, 5))
    for found, leaf in zip(known[1:5], leaves, strict=True):
        assert torch.equal(found, leaf.grad)
    assert known.metrics == loss.metrics
    assert known.loss.item() == pytest.approx(textbook.siglip(batch).item(), rel=1e-13)


def test_a_graph_that_is_kept_gives_its_gradients_again_and_one_that_is_not_says_so():
    batch = textbook.make_batch(6)
    x = batch.x.clone().requires_grad_()
    loss = 3 * ContrastiveLoss()(x, batch.y, batch.scale)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def fitted_clip(batch: textbook.Batch) -> torch.Tensor:
    """CLIP's loss in the form that keeps its digits on fitted pairs."""
    logits = batch.scale * batch.x @ batch.y.T
    others = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    return sum(torch.nn.functional.softplus(others.logsumexp(dim) - logits.diagonal()).mean() for dim in (0, 1)) / 2


@pytest.mark.parametrize(
    ("dtype", "scale", "correlation", "bar"),
    [
        (torch.bfloat16, 14.0, 1.0, 2e-3),
        (torch.bfloat16, 100.0, 6.0, 2e-3),
        (torch.float16, 14.0, 1.0, 3e-4),
    ],  # one rounding to 8 or 11 bits
    ids=["bfloat16", "bfloat16_fitted", "float16"],
)
def test_narrow_features_have_the_loss_of_their_own_values_and_gradients_rounded_once(dtype, scale, correlation, bar):
    batch = textbook.make_batch(64, width=64, scale=scale, correlation=correlation).to(dtype)
    exact = batch.to(torch.float64)
    expected = textbook.gradients(fitted_clip, exact)
    assert (expected["loss"].item() < 1e-6) == (scale == 100)
    x, y = (side.clone().requires_grad_() for side in (batch.x, batch.y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ContrastiveLoss(tile=16)(x, y, exact.scale.float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    for leaf, wanted in ((x, expected["x"]), (y, expected["y"])):
        assert (leaf.grad.double() - wanted).norm() <= bar * wanted.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler on its own parts
def test_compiled_terms_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    batch = textbook.make_batch(24)
    results = []
    for backend in ("torch", "compile"):
        loss = ContrastiveLoss(Cwcl(same_text="ignored"), backend=backend, tile=12)
        results.append(loss.loss_and_grad(batch.x, batch.y, batch.scale, text_guide=batch.guide_y, text_ids=batch.ids))
    for ours, expected in zip(results[1][:4], results[0][:4], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)
    assert any(tmp_path.rglob("*.so")), "nothing was compiled"


def test_extra_texts_are_negatives_of_every_image():
    batch, extra = textbook.make_batch(5), textbook.make_batch(3, seed=1).y
    loss = ContrastiveLoss()(batch.x, batch.y, batch.scale, extra_texts=extra)
    logits = batch.scale * batch.x @ torch.cat([batch.y, extra]).T
    targets = torch.arange(5)
    rows, columns = (torch.nn.functional.cross_entropy(side, targets) for side in (logits, logits[:, :5].T))
    assert loss.item() == pytest.approx((rows + columns).item() / 2, rel=1e-13)


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="gradients must be 'ddp' or 'global', it is 'sum'"):
        ContrastiveLoss(gradients="sum")


@pytest.mark.parametrize("method", ["dense", "tiled"])
def test_feature_dtype_gives_the_loss_of_the_rounded_embeddings_and_float32_gradients(method):
    batch = textbook.make_batch(24, width=32).to(torch.float32)
    leaves = [side.clone().requires_grad_() for side in (batch.x, batch.y)]
    settings = ContrastSettings(method=method, feature_dtype="bfloat16", tile_rows=10, tile_columns=7)
    output = contrastive_loss(Clip(), Pairs(*leaves), batch.scale, settings=settings, mesh=Mesh.single())
    output.loss.backward()
    rounded = dataclasses.replace(batch, x=batch.x.bfloat16(), y=batch.y.bfloat16())
    expected = textbook.gradients(textbook.clip, rounded)
    assert expected["loss"].item() != pytest.approx(textbook.clip(batch.to(torch.float64)).item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    for leaf, wanted in zip(leaves, (expected["x"], expected["y"]), strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=2e-5, atol=1e-8)
