"""Which backend computes a call's tiles, and how large they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch

from clipscale.contrast.backends import Backend, CompiledBackend, SweepKind
from clipscale.contrast.kernels.family import knows
from clipscale.contrast.kernels.shapes import GRADIENT_TILE, STATISTICS_TILE
from clipscale.contrast.pairs import Request
from clipscale.contrast.settings import ContrastSettings
from clipscale.errors import ConfigError
from clipscale.objectives import Objective, Side

BackendName = Literal["torch", "compile", "triton"]
AUTO_TILE = {"cpu": 512, "cuda": 4096}
"""Side of a square tile, by device: on a CPU core as fast as larger ones, and small beside the gradients of any batch worth tiling."""
FUSED_DTYPES = (torch.bfloat16, torch.float32)


def choose_backend(request: Request, *, vectors: frozenset[str]) -> Backend:
    """The backend that the settings ask for or, left to itself, the one for the device.

    `vectors`: numbers and earlier terms whose gradients the tiles must give.

    Raises:
        ConfigError: the fused kernels are asked for and cannot do this; says why.
    """
    device, pairs, settings = request.mesh.device, request.pairs, request.settings
    extras: frozenset[Side] = frozenset("x" if name == "extra_x" else "y" for name in pairs.extras())
    name = backend_name(settings, request.objective, device=device, dtype=pairs.x.dtype, extras=extras, captions=pairs.ids is not None)
    tiles = tile_shapes(settings, backend=name, device=device.type)
    if name == "triton":
        from clipscale.contrast.kernels.backend import TritonBackend  # triton takes a second to import, and is not everywhere

        return TritonBackend(request.objective, tiles=tiles)
    kind = CompiledBackend if name == "compile" else Backend
    return kind(request.objective, tile=tiles["gradient"], vectors=vectors)


def backend_name(
    settings: ContrastSettings,
    objective: Objective,
    *,
    device: torch.device,
    dtype: torch.dtype,
    extras: frozenset[Side] = frozenset(),
    captions: bool = False,
) -> BackendName:
    """What computes the tiles of features of this dtype on this device."""
    if settings.backend in ("torch", "compile"):
        return settings.backend
    hindrance = (
        _settings_hindrance(settings)
        or _objective_hindrance(objective, extras=extras, captions=captions or "ids" in objective.needs)
        or _machine_hindrance(device, dtype)
    )
    if settings.backend == "triton":
        if hindrance:
            raise ConfigError(f"contrast.backend 'triton': {hindrance}")
        return "triton"
    if device.type != "cuda":
        return "torch"
    return "compile" if hindrance or dtype != torch.bfloat16 else "triton"


def check_backend(settings: ContrastSettings, objective: Objective) -> None:
    """Refuse the fused kernels for what they will never be able to do; devices and dtypes are known at the first call only.

    Raises:
        ConfigError: says why, and what to use.
    """
    if settings.backend != "triton":
        return
    hindrance = _settings_hindrance(settings) or _objective_hindrance(objective, extras=frozenset(), captions="ids" in objective.needs)
    if hindrance:
        raise ConfigError(f"contrast.backend 'triton': {hindrance}")


def _settings_hindrance(settings: ContrastSettings) -> str | None:
    if settings.cache_bytes:
        return f"its logits never leave the chip, so cache_bytes {settings.cache_bytes} cannot keep any; use 0, or backend 'compile'"
    return None


def _objective_hindrance(objective: Objective, *, extras: frozenset[Side], captions: bool) -> str | None:
    if knows(objective, extras=extras, captions=captions):
        return None
    return f"its kernels do not know the terms of objective {type(objective).__name__}; use 'auto' or 'compile'"


def _machine_hindrance(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in FUSED_DTYPES:
        return f"features are {dtype}, its kernels take {' and '.join(map(str, FUSED_DTYPES))}; use 'auto' or 'compile'"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"features are on {device}, its kernels need CUDA; use 'auto' or 'torch'"
    if not torch.cuda.is_available():
        return None  # a call on another machine is told of, whose GPUs are taken to be new enough
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, its kernels need 8.0"


def tile_shapes(settings: ContrastSettings, *, backend: BackendName, device: str) -> Mapping[SweepKind, tuple[int, int]]:
    """Rows and columns of the tiles of either sweep."""
    side = AUTO_TILE.get(device, AUTO_TILE["cuda"])
    auto: dict[SweepKind, tuple[int, int]] = {"statistics": (side, side), "gradient": (side, side)}
    if backend == "triton" and device == "cuda":
        auto = {"statistics": STATISTICS_TILE, "gradient": GRADIENT_TILE}
    return {sweep: (settings.tile_rows or rows, settings.tile_columns or columns) for sweep, (rows, columns) in auto.items()}
