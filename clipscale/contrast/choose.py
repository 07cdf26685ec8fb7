"""Which backend computes a call's tiles, and how large they are."""

from __future__ import annotations

from clipscale.contrast.backends import Backend
from clipscale.contrast.pairs import Request


def choose_backend(request: Request, *, vectors: frozenset[str]) -> Backend:
    """The backend that the settings ask for or, left to itself, the fastest that can.

    `vectors`: numbers and earlier terms whose gradients the tiles must give.
    """
    settings = request.settings
    tile = (settings.tile_rows or 1024, settings.tile_columns or 1024)
    return Backend(request.objective, tile=tile, vectors=vectors)
