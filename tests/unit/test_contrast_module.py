"""The drop-in loss equals open_clip's own losses on one device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import textbook
import torch
from open_clip.loss import ClipLoss, SigLipLoss

import clipscale
from clipscale import ContrastiveLoss
from clipscale.errors import ConfigError
from clipscale.objectives.cwcl import Cwcl


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
