"""Failures: what one rank meets is raised on all, so that none waits for a rank that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipscale import errors
from clipscale.errors import ClipscaleError
from clipscale.parallel.mesh import Mesh


@contextmanager
def raised_together(mesh: Mesh) -> Iterator[None]:
    """All ranks enter and leave together; the first rank's clipscale error is raised on every rank.

    No collective may stand inside: a rank that fails leaves early.
    """
    own: ClipscaleError | None = None
    try:
        yield
    except ClipscaleError as error:
        own = error
    met = mesh.gather_objects(None if own is None else [type(own).__name__, str(own)])
    ranks = [rank for rank, item in enumerate(met) if item is not None]
    if not ranks:
        return
    if own is not None and mesh.rank == ranks[0]:
        raise own
    kind, text = met[ranks[0]]
    raise getattr(errors, kind)(f"{text} (met on rank {ranks[0]} of {mesh.world})")
