"""Does `clipscale plan` agree with what runs take: memory of steps in processes of their own, and speed that published runs reported?

    python benchmarks/plan.py             minutes
    python benchmarks/plan.py --smoke     seconds

Memory is what becomes resident (VmHWM) from before the model is made to the end of the third step, on the CPU; what malloc keeps is in it.
Published: open_clip's docs/PRETRAINED.md (GPU-hours on LAION-400M, 12.8 billion samples; A100 of 40 GB, fp16 autocast) and the table of
runs beside the scaling study of Cherti et al. 2022, arXiv:2212.07143 (samples a second; the same GPUs).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from clipscale.config import Run, validate
from clipscale.parallel.mesh import Mesh
from clipscale.phases import timing
from clipscale.planning.gpus import find_gpu
from clipscale.planning.memory import Layout, Sizes, fullest
from clipscale.planning.plan import Planner

PUBLISHED = {
    "ViT-B/32, LAION-400M, 128 GPUs": ("ViT-B-32", 128, 256, 12.8e9 / 4600 / 3600),
    "ViT-B/16, LAION-400M, 176 GPUs": ("ViT-B-16", 176, 192, 12.8e9 / 10700 / 3600),
    "ViT-L/14 recomputed, LAION-400M, 400 GPUs": ("ViT-L-14", 400, 96, 12.8e9 / 50800 / 3600),
    "ViT-B/32, LAION-2B, 344 GPUs": ("ViT-B-32", 344, 256, 218174 / 344),
    "ViT-B/16, LAION-2B, 344 GPUs": ("ViT-B-16", 344, 256, 134240 / 344),
    "ViT-L/14 recomputed, LAION-2B, 1,024 GPUs": ("ViT-L-14", 1024, 84, 79116 / 1024),
}
"""Architecture, GPUs, rows of each, samples a second of each as reported."""


def run_of(architecture: str, rows: int, **changes: Any) -> Run:
    """A run of an open_clip architecture whose data are never read."""
    kind = {
        "modalities": ["image", "text"],
        "sources": {"none": {"name": "shards", "url": "none"}},
        "objective": "clip",
        "global_batch": rows,
    }
    again = changes.pop("recompute", False)
    towers = {name: {"name": f"open_clip_{name}", "architecture": architecture, "recompute": again} for name in ("image", "text")}
    given = {"name": "planned", "steps": 10, "embed_dim": 512, "towers": towers, "pair_kinds": {"pairs": kind}, "device": "cpu"}
    return validate(Run, {**given, "engine": "ddp", "optimizer": {"lr": 1e-3}, **changes})


def resident(name: str) -> int:
    """Bytes by Linux's account: `VmRSS` now, `VmHWM` at most."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "this benchmark reads /proc/self/status, which Linux keeps"
    return int(found[1]) * 1024


def growth(run: Run) -> int:
    """Bytes that three steps of a run make resident, in this process."""
    torch.set_num_threads(1)
    step_time = runpy.run_path(str(Path(__file__).with_name("step_time.py")))
    warm = step_time["OurStep"](run_of(run.towers["image"].architecture, 2), Mesh.single())  # what is imported at the first step
    with timing(torch.device("cpu")) as timer:
        warm.take(timer)
        del warm
        before = resident("VmRSS")
        step = step_time["OurStep"](run, Mesh.single())
        for _ in range(3):
            step.take(timer)
    return resident("VmHWM") - before


def memory_ratio(run: Run) -> float:
    """Planned over resident."""
    share = run.pair_kinds["pairs"].global_batch
    layout = Layout(1, 1, 1, run.micro_batch if isinstance(run.micro_batch, int) else share, share)
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return fullest(Sizes(run, "cpu"), layout).total / process.apply(growth, (run,))


def speed_ratio(architecture: str, gpus: int, rows: int, reported: float) -> float:
    """Samples a second: reported over planned."""
    changes = {"precision": "fp16", "device": "cuda", "recompute": architecture == "ViT-L-14"}
    per_node = 4 if gpus % 8 else 8
    planner = Planner(run_of(architecture, rows * gpus, **changes), gpu_name="a100-40", gpu=find_gpu("a100-40"), gpus_per_node=per_node)
    return reported / (planner.plan(gpus // per_node).samples_per_second / gpus)


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--smoke", action="store_true", help="one small run, to see that it runs")
    asked = arguments.parse_args()
    rows = 4 if asked.smoke else 64
    runs = {"one graph": run_of("ViT-S-32-alt", rows)}
    if not asked.smoke:
        runs["cached gradients, recomputed"] = run_of("ViT-S-32-alt", 4 * rows, micro_batch=rows, recompute=True)
        runs["bf16"] = run_of("ViT-S-32-alt", rows, precision="bf16")
    result: dict[str, Any] = {f"memory planned over resident, {name}": round(memory_ratio(run), 3) for name, run in runs.items()}
    for name, published in ({} if asked.smoke else PUBLISHED).items():
        result[f"speed reported over planned, {name}"] = round(speed_ratio(*published), 3)
    result["versions"] = {name: version(name) for name in ("torch", "open_clip_torch", "clipscale")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
