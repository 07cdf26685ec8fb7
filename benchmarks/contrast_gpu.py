"""The fused kernels on one GPU, beside every peer that is installed and beside their floor of four chunked cuBLAS products.

    python benchmarks/contrast_gpu.py --output result.json             B = 65,536, D = 512, 768 and 1,024, bfloat16; minutes
    python benchmarks/contrast_gpu.py --blocks                         block shapes tried one after the other, for another GPU
    python benchmarks/contrast_gpu.py --smoke                          seconds; without CUDA it only says that there is none

Peers are used where Python can import them: open_clip_torch, and with `pip install siglip-kernel inf_cl cut-cross-entropy` those. Times are
medians of interleaved rounds by CUDA events, forward and backward; memory is what a call allocates beside the features, at its peak;
errors are those of the image gradient of 512 sampled rows against float64, streamed. Every ratio is within one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipscale import ContrastiveLoss
from clipscale.contrast.kernels import shapes

SCALE = 1 / 0.07
BIAS = -10.0
Step = Callable[[Tensor, Tensor, Tensor], object]


def four_products(x: Tensor, y: Tensor, _: Tensor) -> object:
    """The floor of a loss that keeps no logits: logits twice and two gradients, in chunks of 4,096 rows."""
    with torch.no_grad():
        grad_y = torch.zeros_like(y, dtype=torch.float32)
        for rows in torch.split(x.detach(), 4096):
            logits = rows @ y.T
            logits = rows @ y.T
            logits @ y
            torch.addmm(grad_y, logits.T, rows, out_dtype=torch.float32, out=grad_y)
    return grad_y


def clipscale_step(objective: str, backend: str) -> Step:
    """Ours, as a drop-in."""
    loss = ContrastiveLoss(objective, backend=backend, cache=0)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> object:
        bias = torch.tensor(BIAS, device=x.device, requires_grad=True)
        return loss(x, y, scale, bias).backward()

    return step


def open_clip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """ClipLoss: all logits, in the features' dtype."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(x, y, scale.to(x.dtype)).backward()


def open_clip_siglip_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """SigLipLoss: all logits, in the features' dtype."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(x, y, scale.to(x.dtype), torch.tensor(BIAS, device=x.device, dtype=x.dtype)).backward()


def siglip_kernel_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """siglip-kernel's primary path."""
    from siglip_kernel import fused_siglip_loss

    bias = torch.tensor(BIAS, device=x.device, requires_grad=True)
    return fused_siglip_loss(x, y, scale.log(), bias, backend="chunked_bf16").backward()


def inf_cl_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Inf-CL's kernel of one device, both directions."""
    from inf_cl import cal_flash_loss

    return ((cal_flash_loss(x, y, scale=scale) + cal_flash_loss(y, x, scale=scale)).mean() / 2).backward()


def cce_step(x: Tensor, y: Tensor, scale: Tensor) -> object:
    """Apple's cut cross-entropy, exact, both directions."""
    from cut_cross_entropy import linear_cross_entropy

    targets = torch.arange(len(x), device=x.device)
    scaled = [(side * scale).to(side.dtype) for side in (x, y)]
    rows = linear_cross_entropy(scaled[0], y, targets, filter_eps=None)
    return ((rows + linear_cross_entropy(scaled[1], x, targets, filter_eps=None)) / 2).backward()


STEPS: dict[str, tuple[Step, str | None]] = {
    "four products": (four_products, None),
    "clipscale": (clipscale_step("clip", "triton"), None),
    "clipscale compiled": (clipscale_step("clip", "compile"), None),
    "clipscale siglip": (clipscale_step("siglip", "triton"), None),
    "open_clip": (open_clip_step, "open_clip"),
    "open_clip siglip": (open_clip_siglip_step, "open_clip"),
    "siglip-kernel": (siglip_kernel_step, "siglip_kernel"),
    "inf_cl": (inf_cl_step, "inf_cl"),
    "cut-cross-entropy": (cce_step, "cut_cross_entropy"),
}
RATIOS = [  # this over that, and the bar
    ("clipscale", "four products", 1.45),
    ("clipscale siglip", "siglip-kernel", 0.9),
    ("clipscale", "inf_cl", 0.2),
    ("clipscale", "open_clip", 0.67),
]


def make_inputs(batch: int, width: int, *, correlation: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit vectors in bfloat16, partners correlated, wanting gradients."""
    draw = torch.Generator("cuda").manual_seed(batch + width)
    x = torch.randn(batch, width, device="cuda", generator=draw)
    y = torch.randn(batch, width, device="cuda", generator=draw) + correlation * x
    return tuple(functional.normalize(side, dim=1).bfloat16().requires_grad_() for side in (x, y))  # type: ignore[return-value]


def milliseconds(steps: dict[str, Step], batch: int, width: int, rounds: int) -> tuple[dict[str, float], dict[str, int], dict[str, str]]:
    """Median time and peak bytes of each step that runs, and why the others do not."""
    x, y = make_inputs(batch, width)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for turn in range(rounds + 2):  # two to warm up
        for name, step in steps.items():
            if name in failed:
                continue
            x.grad = y.grad = None
            scale = torch.tensor(SCALE, device="cuda", requires_grad=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                start.record()
                step(x, y, scale)
                end.record()
                torch.cuda.synchronize()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:120]}"
                x.grad = y.grad = None
                torch.cuda.empty_cache()
                continue
            peaks[name] = torch.cuda.max_memory_allocated() - before
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(taken) for name, taken in times.items() if taken}, peaks, failed


def exact_rows(x: Tensor, y: Tensor, scale: float, rows: Tensor) -> Tensor:
    """CLIP's image gradient of some rows in float64, without the cancellation of p − 1, a chunk of logits at a time: [rows, D]."""
    batch, width = len(x), y.double()
    column = torch.full((batch,), -torch.inf, dtype=torch.float64, device=x.device)
    for start in range(0, batch, 1024):
        logits = scale * x[start : start + 1024].double() @ width.T
        place = torch.arange(len(logits), device=x.device)
        logits[place, start + place] = -torch.inf
        column = torch.logaddexp(column, logits.logsumexp(0))
    pair = scale * (x.double() * width).sum(1)
    logits = scale * x[rows].double() @ width.T
    place = torch.arange(len(rows), device=x.device)
    logits[place, rows] = -torch.inf
    row = logits.logsumexp(1)
    weights = (logits - torch.logaddexp(row, pair[rows])[:, None]).exp() + (logits - torch.logaddexp(column, pair)).exp()
    weights[place, rows] = -torch.sigmoid(row - pair[rows]) - torch.sigmoid(column[rows] - pair[rows])
    return scale / (2 * batch) * weights @ width


def errors(batch: int, width: int) -> dict[str, dict[str, float]]:
    """Relative error of the sampled rows of the image gradient, by how well the pairs are fitted."""
    told: dict[str, dict[str, float]] = {}
    for label, correlation, scale_value in (("random", 0.0, SCALE), ("half fitted", 1.0, 50.0), ("fitted", 3.0, 100.0)):
        x, y = make_inputs(batch, width, correlation=correlation)
        rows = torch.randperm(batch, device="cuda")[: min(512, batch)]
        expected = exact_rows(x.detach(), y.detach(), scale_value, rows)
        told[label] = {}
        for name in ("clipscale", "open_clip", "inf_cl"):
            step, package = STEPS[name]
            if package is not None and importlib.util.find_spec(package) is None:
                continue
            x.grad = y.grad = None
            try:
                step(x, y, torch.tensor(scale_value, device="cuda", requires_grad=True))
            except Exception as error:
                told[label][f"{name}: {type(error).__name__}"] = -1.0
                torch.cuda.empty_cache()
                continue
            assert x.grad is not None
            told[label][name] = float((x.grad[rows].double() - expected).norm() / expected.norm())
    return told


def measure(batch: int, widths: list[int], rounds: int) -> dict[str, Any]:
    """Everything, by width."""
    steps = {name: step for name, (step, package) in STEPS.items() if package is None or importlib.util.find_spec(package)}
    result: dict[str, Any] = {"absent": sorted(set(STEPS) - set(steps))}
    for width in widths:
        times, peaks, failed = milliseconds(steps, batch, width, rounds)
        floor = 8 * batch**2 * width
        features = 2 * batch * width * 2
        result[f"D = {width}"] = {
            "milliseconds": {name: round(time, 2) for name, time in times.items()},
            "ratios": {
                f"{one} over {other}": {"is": round(times[one] / times[other], 3), "bar": bar}
                for one, other, bar in RATIOS
                if one in times and other in times
            },
            "TFLOP/s of four products": round(floor / times["four products"] / 1e9),
            "TFLOP/s of clipscale's four": round(floor / times["clipscale"] / 1e9) if "clipscale" in times else None,
            "peak MiB beside the features": {name: round(peak / 2**20) for name, peak in peaks.items()},
            "bar MiB": {
                f"gradients in {name} and 256": round(features * size / 2**20) + 256 for name, size in (("bfloat16", 1), ("float32", 2))
            },
            "failed": failed,
            "errors": errors(batch, width),
        }
    return result


def largest(batch: int, width: int) -> dict[str, Any]:
    """One step at a batch that no matrix of logits would fit."""
    times, peaks, failed = milliseconds({"clipscale": STEPS["clipscale"][0]}, batch, width, 1)
    return {"batch": batch, "width": width, "milliseconds": times, "peak bytes beside the features": peaks, "failed": failed}


def block_shapes(batch: int, width: int) -> dict[str, dict[str, float]]:
    """Milliseconds with other block shapes than ours."""
    told = {}
    steps = {name: STEPS[name][0] for name in ("clipscale", "clipscale siglip")}
    chosen = shapes.ROOMY, shapes.CROWDED
    for rows, columns, warps, stages, registers in [
        (128, 128, 8, 3, 128),
        (128, 128, 8, 3, None),
        (128, 128, 8, 4, None),
        (128, 256, 8, 3, None),
        (128, 256, 16, 3, None),
        (64, 128, 4, 3, None),
        (64, 128, 4, 4, None),
        (64, 256, 8, 3, None),
    ]:
        launch = shapes.Launch(rows, columns, 64, 8, warps, stages, registers)
        for slot in ("ROOMY", "CROWDED"):
            shapes.ROOMY, shapes.CROWDED = (launch, chosen[1]) if slot == "ROOMY" else (chosen[0], launch)
            times, _, failed = milliseconds(steps, batch, width, 5)
            told[f"{slot} {tuple(launch)}"] = times | dict.fromkeys(failed, -1.0)
    shapes.ROOMY, shapes.CROWDED = chosen
    return told


def main() -> None:
    """Measure and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--batch", type=int, default=65_536)
    arguments.add_argument("--widths", type=int, nargs="+", default=[512, 768, 1024])
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--blocks", action="store_true", help="try block shapes instead")
    arguments.add_argument("--smoke", action="store_true", help="a size that takes seconds, to see that it runs")
    arguments.add_argument("--output", type=Path, help="write the JSON object here too")
    asked = arguments.parse_args()
    result: dict[str, Any] = {"versions": {name: version(name) for name in ("torch", "triton", "clipscale")}}
    if not torch.cuda.is_available():
        result["device"] = "none: nothing was measured"
    else:
        result["device"] = torch.cuda.get_device_name()
        batch, widths, rounds = (2048, [512], 2) if asked.smoke else (asked.batch, asked.widths, asked.rounds)
        result |= {"batch": batch} | (block_shapes(batch, widths[0]) if asked.blocks else measure(batch, widths, rounds))
        if not (asked.smoke or asked.blocks):
            result["largest"] = largest(1_048_576, 512)
    text = json.dumps(result, indent=1)
    if asked.output:
        asked.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
