"""Training steps on real small towers under any engine, and the same steps as plain torch on one process: what engines must equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.engines import Engine, Trainable
from clipscale.inputs import ImageInput, Input, SpeechInput
from clipscale.memory.grad_cache import cached_backward, split
from clipscale.model import Encoders, KindOutput, PairKindModel, PreparedKinds, build_encoders
from clipscale.objectives import Objective
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh
from clipscale.towers import Tower

ARCHITECTURES = [Path(__file__).parent / "architectures", Path(__file__).parent / "contracts" / "towers" / "architectures"]
TEXT = {"name": "open_clip_text", "architecture": "small-vit"}
VIT = {"image": {"name": "open_clip_image", "architecture": "small-vit", "patch_dropout": 0.3}, "text": TEXT}
LOCKED = {**VIT, "text": {**TEXT, "locked": True, "unlocked_blocks": 1}}
WHOLLY_LOCKED = {**VIT, "text": {**TEXT, "locked": True}}
CONVNEXT = {"image": {"name": "open_clip_image", "architecture": "tiny-convnext", "image_size": 32}, "text": TEXT}
WHISPER = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 100,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "dropout": 0.1,
}
SPEECH = {"speech": {"name": "hf_speech", "max_seconds": 0.5, "config": WHISPER}, "text": TEXT}


@dataclass(frozen=True)
class Steps:
    """What to train, and how."""

    engine: dict[str, Any] = field(default_factory=lambda: {"name": "local"})
    towers: dict[str, dict[str, Any]] = field(default_factory=lambda: VIT)
    dtype: str = "float64"
    precision: str = "fp32"
    batch: int = 7
    """Rows of a data rank: seven are cut unevenly into micro-batches of two, and of five."""
    micro_batch: int | None = None
    recompute: Any = False
    compile: bool = False
    steps: int = 2
    clip_norm: float | None = 0.1
    lr: float = 0.02
    optimizer_changes: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Encoders:
        """The model, the same on every process."""
        for folder in ARCHITECTURES:
            open_clip.add_model_config(folder)
        towers = {
            name: Tower.model_validate({**tower, "recompute": self.recompute, "compile": self.compile})
            for name, tower in self.towers.items()
        }
        first, second = self.towers
        kinds = {"pairs": PairKindModel(modalities=(first, second), init_scale=14.0)}  # type: ignore[arg-type]
        return build_encoders(towers, embed_dim=16, pair_kinds=kinds, seed=3).to(getattr(torch, self.dtype))  # type: ignore[arg-type]

    def optimizer(self) -> Optimizer:
        """AdamW whose eps is above most gradients, so that steps are as long as gradients and not only their signs."""
        return Optimizer.model_validate({"lr": self.lr, "eps": 0.03, "clip_norm": self.clip_norm, **self.optimizer_changes})

    def rows(self, model: Encoders, *, step: int, rank: int) -> PreparedKinds:
        """The prepared rows of a data rank."""
        draw = torch.Generator().manual_seed(1_000 * step + rank)
        inputs = {modality: feed(spec, self.batch, draw) for modality, spec in model.inputs().items()}
        dtype = getattr(torch, self.dtype)
        for fed in inputs.values():
            fed |= {name: tensor.to(dtype) for name, tensor in fed.items() if tensor.is_floating_point()}
        return {"pairs": inputs}


def feed(spec: Input, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Random inputs as a tower wants them."""
    if isinstance(spec, ImageInput):
        return {"pixels": torch.randn(rows, 3, spec.size, spec.size, generator=draw)}
    if isinstance(spec, SpeechInput) and spec.features == "waveform":
        samples = int(spec.max_seconds * spec.sample_rate)
        length = torch.randint(samples // 2, samples + 1, (rows,), generator=draw)
        return {"waveform": torch.randn(rows, samples, generator=draw), "length": length}
    if isinstance(spec, SpeechInput):
        frames = int(spec.max_seconds * spec.sample_rate) // spec.hop
        length = torch.randint(frames // 2, frames + 1, (rows,), generator=draw)
        return {"mel": torch.randn(rows, spec.num_mels, frames, generator=draw), "length": length}
    tokens = torch.randint(3, 31, (rows, spec.context_length), generator=draw)
    return {"tokens": tokens, "mask": torch.ones_like(tokens)}


def seed(step: int, rank: int, micro_batch: int) -> None:
    """The random state of a micro-batch."""
    torch.manual_seed(step * 10_000 + rank * 100 + micro_batch)


@dataclass(frozen=True)
class Trained:
    """What some steps gave."""

    losses: list[float]
    norms: list[float]
    state: dict[str, dict[str, Tensor]]
    """On rank 0."""


def trainable_for(mesh: Mesh, steps: Steps) -> tuple[Trainable, Mesh]:
    """The model under its engine, and the data ranks."""
    engine = Engine.model_validate(steps.engine)
    engine.check_world(mesh.world)
    model = engine.build(steps.make, mesh)
    engine.check_model(model, optimizer=steps.optimizer(), steps_differ=False)
    return engine.wrap(model, steps.optimizer(), mesh, precision=steps.precision, steps_differ=False), engine.data_mesh(mesh)


def step_once(trainable: Trainable, data: Mesh, steps: Steps, step: int) -> tuple[float, float]:
    """A step as train.py takes it: its loss and norm."""
    objective = Objective.model_validate("clip")

    def contrast(outputs: dict[str, KindOutput]) -> tuple[Tensor, Tensor]:
        output = outputs["pairs"]
        loss = contrastive_loss(objective, Pairs(x=output.x, y=output.y), output.scale, settings=ContrastSettings(), mesh=data).loss
        return loss, loss

    rows = steps.rows(trainable.model, step=step, rank=data.rank)
    if steps.micro_batch is None:
        seed(step, data.rank, 0)
        loss, _ = contrast(trainable.encode(rows))
        trainable.backward(loss)
    else:
        loss = cached_backward(trainable, rows, contrast, micro_batch=steps.micro_batch, seed=lambda number: seed(step, data.rank, number))
    return float(loss.detach()), trainable.step(lr=steps.lr).norm


def train_steps(mesh: Mesh, steps: Steps) -> Trained:
    """Steps through an engine."""
    trainable, data = trainable_for(mesh, steps)
    taken = [step_once(trainable, data, steps, step) for step in range(steps.steps)]
    state = trainable.state()
    whole = {file: dict(tensors) for file, tensors in state.items()} if mesh.rank == 0 else {}
    return Trained([loss for loss, _ in taken], [norm for _, norm in taken], whole)


def plain_steps(steps: Steps, *, data_ranks: int) -> Trained:
    """The same steps as plain torch: one process, one graph, the whole matrix of logits, torch's AdamW and clipping."""
    model = steps.make()
    parameters = dict(model.named_parameters())
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    settings = steps.optimizer()
    groups = [{"params": decayed}, {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=steps.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    losses, norms = [], []
    for step in range(steps.steps):
        parts = []
        for rank in range(data_ranks):
            rows = steps.rows(model, step=step, rank=rank)
            for number, part in enumerate(split(rows, micro_batch=steps.micro_batch or steps.batch)):
                seed(step, rank, number)
                parts.append(model(part)["pairs"])
        logits = parts[0].scale * torch.cat([part.x for part in parts]) @ torch.cat([part.y for part in parts]).T
        target = torch.arange(len(logits))
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), steps.clip_norm or float("inf"))))
        optimizer.step()
    moments = {f"{name}/{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items() if p.grad is not None}
    return Trained(losses, norms, {"model": dict(model.state_dict()), "optimizer": moments})


def largest_difference(one: Trained, other: Trained) -> float:
    """Of losses, norms, weights and moments, relative to the largest number of each tensor."""
    pairs = [(torch.tensor(one.losses), torch.tensor(other.losses)), (torch.tensor(one.norms), torch.tensor(other.norms))]
    for file in ("model", "optimizer"):
        assert one.state[file].keys() == other.state[file].keys()
        pairs += [(one.state[file][name], other.state[file][name]) for name in one.state[file]]
    return max(float((left - right).abs().max() / right.abs().max().clamp(min=1e-9)) for left, right in pairs if right.is_floating_point())
