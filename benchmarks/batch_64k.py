"""A global batch of 65,536 pairs on two CPU ranks: does it fit, where does its time go, and is its step the plain one?

    python benchmarks/batch_64k.py            one step of 65,536 pairs, and of 4,096 with and without gradient caching; minutes
    python benchmarks/batch_64k.py --smoke    seconds

Two gloo ranks of one thread, engine ddp, a ViT and a text transformer of open_clip's with random weights, dropout of patches on.
`peak memory` is each rank's VmHWM: everything in the process, Python and torch included. `step over plain` are the largest differences
between the step with micro-batches and the step with one graph over its whole share, of the loss and of every parameter's gradient,
relative to that gradient's largest number.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.engines import Engine, Trainable
from clipscale.memory.grad_cache import cached_backward
from clipscale.model import Encoders, KindOutput, PairKindModel, PreparedKinds, build_encoders
from clipscale.objectives import Objective
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PHASES, timing
from clipscale.towers import Tower

WORLD = 2
WIDTH, CONTEXT, WORDS, SIDE = 192, 16, 8192, 32
ARCHITECTURE = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "layers": 4, "width": WIDTH, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": WORDS, "width": WIDTH, "heads": 3, "layers": 4},
}


def make_model() -> Encoders:
    """The encoder pair, the same on every rank."""
    towers = {
        "image": Tower.model_validate({"name": "open_clip_image", "architecture": "pair-of-64k", "patch_dropout": 0.25}),
        "text": Tower.model_validate({"name": "open_clip_text", "architecture": "pair-of-64k"}),
    }
    kinds = {"pairs": PairKindModel(modalities=("image", "text"))}
    return build_encoders(towers, embed_dim=128, pair_kinds=kinds, seed=0)  # type: ignore[arg-type]


def make_rows(rows: int, rank: int) -> PreparedKinds:
    """A rank's share of the batch: pixels as bytes, and words."""
    draw = torch.Generator().manual_seed(rank)
    pixels = torch.randint(256, (rows, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    tokens = torch.randint(1, WORDS, (rows, CONTEXT), generator=draw)
    return {"pairs": {"image": {"pixels": pixels}, "text": {"tokens": tokens, "mask": torch.ones_like(tokens)}}}


def prepare(part: PreparedKinds) -> PreparedKinds:
    """Bytes to what the tower is fed."""
    images = {"pixels": part["pairs"]["image"]["pixels"].float() / 127.5 - 1}
    return {"pairs": {"image": images, "text": part["pairs"]["text"]}}


def backward(trainable: Trainable, rows: PreparedKinds, mesh: Mesh, micro_batch: int) -> float:
    """Accumulate the gradient of the global batch; returns its loss."""

    def contrast(outputs: dict[str, KindOutput]) -> tuple[Tensor, Tensor]:
        output = outputs["pairs"]
        pairs = Pairs(x=output.x, y=output.y)
        loss = contrastive_loss(Objective.model_validate("clip"), pairs, output.scale, settings=ContrastSettings(), mesh=mesh).loss
        return loss, loss

    loss = cached_backward(
        trainable, rows, contrast, micro_batch=micro_batch, seed=lambda part: torch.manual_seed(1_000 * mesh.rank + part), prepare=prepare
    )
    return float(loss.detach())


def plain_backward(model: Encoders, rows: PreparedKinds, mesh: Mesh, micro_batch: int) -> float:
    """The same in one graph over this rank's whole share, without an engine; its parts draw the same patches to drop."""
    outputs = []
    for number, start in enumerate(range(0, len(rows["pairs"]["text"]["tokens"]), micro_batch)):
        torch.manual_seed(1_000 * mesh.rank + number)
        part = {name: {key: tensor[start : start + micro_batch] for key, tensor in fed.items()} for name, fed in rows["pairs"].items()}
        outputs.append(model(prepare({"pairs": part}))["pairs"])
    pairs = Pairs(x=torch.cat([output.x for output in outputs]), y=torch.cat([output.y for output in outputs]))
    settings = ContrastSettings(method="dense")
    loss = contrastive_loss(Objective.model_validate("clip"), pairs, outputs[0].scale, settings=settings, mesh=mesh).loss
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else mesh.all_reduce_sum(parameter.grad)
    return float(loss.detach())


def gradients(model: Encoders) -> dict[str, Tensor]:
    """Of every parameter."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def differences(trainable: Trainable, rows: PreparedKinds, mesh: Mesh, micro_batch: int) -> dict[str, float]:
    """Between the cached step and the plain one: of the loss and of every parameter's gradient, relative to its largest number."""
    plain = make_model()
    plain.load_state_dict(trainable.model.state_dict())
    losses = backward(trainable, rows, mesh, micro_batch), plain_backward(plain, rows, mesh, micro_batch)
    cached, expected = gradients(trainable.model), gradients(plain)
    assert cached.keys() == expected.keys()
    of_gradients = {name: float((cached[name] - wanted).abs().max() / wanted.abs().max()) for name, wanted in expected.items()}
    return {"loss": abs(losses[0] - losses[1]) / losses[1], **of_gradients}


def work(rank: int, folder: str, batch: int, plain_batch: int, micro_batch: int) -> None:
    """One rank: the large step measured, the smaller one taken in both ways; writes what it found."""
    torch.set_num_threads(1)
    Path(folder, f"{rank}").mkdir()
    Path(folder, f"{rank}", "pair-of-64k.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(Path(folder, f"{rank}"))
    wait = timedelta(hours=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=wait)
    mesh = Mesh(rank=rank, world=WORLD, local_rank=rank, device=torch.device("cpu"))
    optimizer = Optimizer.model_validate({"lr": 1e-3})
    trainable = Engine.model_validate("ddp").wrap(make_model(), optimizer, mesh, precision="fp32", steps_differ=False)
    rows = make_rows(batch // WORLD, rank)
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in trainable.model.parameters())}
    with timing(mesh.device) as timer:
        loss = backward(trainable, rows, mesh, micro_batch)
        found["norm"] = trainable.step(lr=1e-3).norm
        times = timer.end_step()
    found |= {"loss": loss, "seconds": {name: times.nanoseconds[name] / 1e9 for name in PHASES}, "peak": highest_resident()}
    rows = make_rows(plain_batch // WORLD, rank)
    found["differences"] = differences(trainable, rows, mesh, micro_batch)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def highest_resident() -> int:
    """Bytes this process has had in memory at most, by Linux's account."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None, "this benchmark reads VmHWM, which Linux keeps"
    return int(found[1]) * 1024


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=65_536)
    arguments.add_argument("--plain-batch", type=int, default=4_096)
    arguments.add_argument("--micro-batch", type=int, default=512, help="rows of a rank at a time; divides both batches' shares")
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    asked = arguments.parse_args()
    sizes = (128, 64, 16) if asked.smoke else (asked.batch, asked.plain_batch, asked.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder, *sizes), nprocs=WORLD)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
    seconds = {name: round(sum(rank["seconds"][name] for rank in ranks) / WORLD, 2) for name in PHASES}
    weights = [value for name, value in ranks[0]["differences"].items() if name != "loss"]
    result = {
        "global batch": sizes[0],
        "micro-batch": sizes[2],
        "parameters": ranks[0]["parameters"],
        "loss": ranks[0]["loss"],
        "gradient norm": ranks[0]["norm"],
        "peak memory of each rank, GiB": [round(rank["peak"] / 2**30, 2) for rank in ranks],
        "seconds by phase": seconds,
        "pairs a second": round(sizes[0] / sum(seconds.values()), 1),
        f"step over plain at {sizes[1]:,}: loss": ranks[0]["differences"]["loss"],
        f"step over plain at {sizes[1]:,}: largest of the gradients": max(weights),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "clipscale")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
