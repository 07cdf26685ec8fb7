"""What the compiler makes of the fused kernels for GPUs that need not be here: registers, spills, shared memory, tensor-core instructions.

    python benchmarks/kernel_resources.py            every kernel the loss starts, for sm_80 and sm_90
    python benchmarks/kernel_resources.py --smoke    two of them

Nothing is measured and nothing runs: triton compiles to machine code, and NVIDIA's cuobjdump (both come with triton) tells what it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from importlib.metadata import version
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipscale.contrast.kernels.gradient import differentiate_tile
from clipscale.contrast.kernels.shapes import launch_for
from clipscale.contrast.kernels.statistics import reduce_tile

FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"LOGSUMEXP": True},
    "clip, smoothed, equal captions left out": {"LOGSUMEXP": True, "SUM": True, "COUNT": True, "CAPTIONS": True, "LEFT_OUT": 2},
    "siglip": {"SOFTPLUS": True, "REDUCE": True},
}
FLAGS = {"PAIRS": True, "CAPTIONS": False, "LEFT_OUT": 1, "LOGSUMEXP": False, "SOFTPLUS": False, "SUM": False, "COUNT": False}
FLAGS |= {"HARDEST": True, "ROWS": True, "COLUMNS": True, "UPCAST": False, "REDUCE": False}
ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(kernel: Any, dtype: torch.dtype, architecture: int, flags: dict[str, Any]) -> dict[str, Any]:
    """One kernel as the loss starts it, for widths and strides that are multiples of 16."""
    launch = launch_for(dtype, crowded=kernel is differentiate_tile or bool(flags.get("SUM")), interpreted=False)
    options = launch.options()
    constants = {name: value for name, value in (FLAGS | flags | options).items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        whole = name in ("n", "m", "D", "x_stride", "y_stride")
        kind = "i64" if name.endswith(("pairs", "captions")) else ELEMENTS[dtype] if name in ("x", "y", "into") else "fp32"
        signature[name] = "constexpr" if name in constants else "i32" if whole else f"*{kind}"
        if name not in constants:
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={name: value for name, value in options.items() if name not in constants},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    assert found is not None, told
    registers, stack = map(int, found.groups())
    by_registers = 65_536 // (registers * 32 * launch.warps)
    return {
        "registers": registers,
        "spilled bytes a thread": stack,
        "shared memory KiB": made.metadata.shared // 1024,
        "programs a multiprocessor": min(by_registers, {80: 163, 90: 227}[architecture] * 1024 // max(1, made.metadata.shared)),
        "warp-group products": "wgmma" in made.asm["ptx"],
    }


def main() -> None:
    """Compile and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--smoke", action="store_true", help="two kernels only, to see that it runs")
    smoke = arguments.parse_args().smoke
    kernels = {}
    for architecture in (90,) if smoke else (80, 90):
        for name, flags in list(FAMILIES.items())[: 1 if smoke else None]:
            for kernel in (reduce_tile, differentiate_tile):
                if kernel is reduce_tile and flags.get(
                    "REDUCE"
                ):  # only evaluations reduce without a gradient; the same code is in the other
                    continue
                label = f"{kernel.__name__}, {name}, bfloat16, sm_{architecture}"
                kernels[label] = compiled(kernel, torch.bfloat16, architecture, flags)
    if not smoke:
        kernels["differentiate_tile, clip, float32, sm_80"] = compiled(differentiate_tile, torch.float32, 80, FAMILIES["clip"])
    print(json.dumps({"kernels": kernels, "versions": {name: version(name) for name in ("torch", "triton", "clipscale")}}, indent=1))


if __name__ == "__main__":
    main()
