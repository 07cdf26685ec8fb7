"""AdamW with 8-bit moments: near AdamW's steps, in a quarter of the memory, through checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipscale.engines._replicated import Replica
from clipscale.model import PairKindModel, build_encoders
from clipscale.optim import Optimizer
from clipscale.towers import Tower

LR = 0.1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compiler, asked to compile nothing


def test_8_bit_moments_take_adamws_steps_in_a_quarter_of_the_memory() -> None:
    """Codes keep about two digits of a moment. What is smaller than 4,096 numbers is not coded."""
    weights, moments = {}, {}
    for name in ("adamw", "adamw_8bit"):
        layer = nn.Linear(64, 64, dtype=torch.float32)
        nn.init.zeros_(layer.weight)
        made = Optimizer.model_validate({"name": name, "lr": LR, "weight_decay": 0.0}).build(layer.named_parameters(), fused=False)
        draw = torch.Generator().manual_seed(0)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(5):
                for parameter in layer.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=draw)
                made.step()
        weights[name], moments[name] = layer.weight.detach(), made.state[layer.weight]["exp_avg"]
        assert made.state[layer.bias]["exp_avg"].dtype == torch.float32
    assert type(made.state[layer.bias]["exp_avg"]) is torch.Tensor
    error = (weights["adamw_8bit"] - weights["adamw"]).norm() / weights["adamw"].norm()
    assert 1e-4 < error < 0.02
    coded = moments["adamw_8bit"]
    assert coded.codes.nbytes + coded.scale.nbytes == moments["adamw"].nbytes / 4 + 4096 / 256 * 4


def test_8_bit_moments_go_through_a_checkpoint_to_their_own_rounding() -> None:
    optimizer = Optimizer.model_validate({"name": "adamw_8bit", "lr": LR})
    towers = {"image": Tower.model_validate({"name": "conv_image", "image_size": 16, "channels": [8], "width": 64, "layers": 1})}
    kinds: dict[str, PairKindModel] = {}

    def replica() -> Replica:
        model = build_encoders(towers, embed_dim=64, pair_kinds=kinds, seed=0)  # type: ignore[arg-type]
        return Replica(model, optimizer, torch.device("cpu"), precision="fp32")

    def step(trained: Replica, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in trained.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        with torch.compiler.set_stance("force_eager"):
            trained.step(lr=LR)

    once, resumed = replica(), replica()
    step(once, 1)
    saved = {file: {key: value.clone() for key, value in tensors.items()} for file, tensors in once.state().items()}
    assert all(type(value) is Tensor for value in saved["optimizer"].values())
    resumed.load(saved)
    for trained in (once, resumed):
        step(trained, 2)
    ours, theirs = resumed.state(), once.state()
    for file in theirs:
        for key, expected in theirs[file].items():
            assert float((ours[file][key] - expected).norm()) <= 0.01 * float(expected.norm()), key
    coded = resumed._optimizer.state[resumed.model.projections["image"].weight]["exp_avg"]
    assert hasattr(coded, "codes"), "in 8 bits again"
