"""Which backend computes a call's tiles, and how large they are."""

from __future__ import annotations

from clipscale.contrast.backends import Backend, CompiledBackend
from clipscale.contrast.pairs import Request
from clipscale.contrast.settings import ContrastSettings

AUTO_TILE = {"cpu": 512, "cuda": 4096}
"""Side of a square tile, by device: on a CPU core as fast as larger ones, and small beside the gradients of any batch worth tiling."""


def choose_backend(request: Request, *, vectors: frozenset[str]) -> Backend:
    """The backend that the settings ask for or, left to itself, the one for the device.

    `vectors`: numbers and earlier terms whose gradients the tiles must give.
    """
    device, asked = request.mesh.device.type, request.settings.backend
    compiled = asked == "compile" or (asked == "auto" and device == "cuda")
    kind = CompiledBackend if compiled else Backend
    return kind(request.objective, tile=tile_shape(request.settings, device=device), vectors=vectors)


def tile_shape(settings: ContrastSettings, *, device: str) -> tuple[int, int]:
    """Rows and columns of a tile."""
    auto = AUTO_TILE.get(device, AUTO_TILE["cuda"])
    return settings.tile_rows or auto, settings.tile_columns or auto
