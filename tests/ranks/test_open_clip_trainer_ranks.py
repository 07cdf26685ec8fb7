"""Inside open_clip's own training loop, DDP and our loss give every parameter the gradient of one process with the whole batch."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from clipscale.parallel.mesh import Mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "open_clip_trainer.py"


class TwoTowers(nn.Module):
    """As open_clip's models answer: a dictionary of features and the exponentiated scale."""

    def __init__(self, siglip: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = nn.Linear(48, 8, dtype=torch.float64), nn.Embedding(20, 8, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0, dtype=torch.float64)) if siglip else None

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        image, text = self.image(images.double().flatten(1)), self.text(texts).mean(1)
        features = {"image_features": functional.normalize(image, dim=1), "text_features": functional.normalize(text, dim=1)}
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return features | {"logit_scale": self.logit_scale.exp()} | bias


def gradients_of_one_epoch(mesh: Mesh, siglip: bool) -> list[list[float]]:
    """Gradients that open_clip's loop leaves behind after an epoch of one step."""
    from open_clip_train import train

    args = argparse.Namespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        log_every_n_steps=1,
        world_size=mesh.world,
        rank=mesh.rank,
        local_rank=mesh.rank,
        batch_size=12 // mesh.world,
        wandb=False,
        tensorboard=False,
        save_logs=False,
        siglip=siglip,
        model="ViT-B-32",
    )
    draw = torch.Generator().manual_seed(1)
    images, texts = torch.randn(12, 3, 4, 4, generator=draw), torch.randint(0, 20, (12, 5), generator=draw)
    rows = slice(mesh.rank * 12 // mesh.world, (mesh.rank + 1) * 12 // mesh.world)

    class Loader(list):
        num_batches, num_samples = 1, 12

    data = {"train": SimpleNamespace(dataloader=Loader([(images[rows], texts[rows])]), set_epoch=lambda _: None)}
    model = TwoTowers(siglip)
    wrapped = DistributedDataParallel(model) if mesh.world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = runpy.run_path(str(EXAMPLE))["create_loss"](args)
    train.train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, None, args)
    return [parameter.grad.flatten().tolist() for parameter in model.parameters()]


def whole_batch(siglip: bool) -> list[torch.Tensor]:
    """The textbook gradient of one process, by autograd on the whole matrix."""
    draw = torch.Generator().manual_seed(1)
    images, texts = torch.randn(12, 3, 4, 4, generator=draw), torch.randint(0, 20, (12, 5), generator=draw)
    model = TwoTowers(siglip)
    out = model(images, texts)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    targets = torch.arange(12)
    if siglip:
        sign = 2 * torch.eye(12, dtype=torch.float64) - 1
        loss = functional.softplus(-sign * (logits + out["logit_bias"])).sum() / 12
    else:
        loss = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_parameter_gets_the_whole_batchs_gradient(ranks, world, siglip):
    expected = whole_batch(siglip)
    for answer in ranks(world)(gradients_of_one_epoch, siglip):
        for found, wanted in zip(answer, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted.flatten(), rtol=1e-10, atol=1e-14)
