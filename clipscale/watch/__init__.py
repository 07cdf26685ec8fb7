"""Watch: what a run watches its ranks for, besides their errors: hanging, lagging, and weights that drift apart."""

from __future__ import annotations

from pydantic import Field

from clipscale.settings import Settings


class WatchSettings(Settings):
    """What a run watches its ranks for."""

    hang_s: float | None = Field(default=300.0, gt=0)
    """Seconds after which a rank that gets no further is taken to hang: every rank writes down its Python stack, the one to blame is named,
    and all end with exit code 1, so that the launcher restarts them. Less than `timeout_s`, which is what a call's first step and its
    checkpoints may take. None: ranks wait until a collective times out."""
    replicas_every: int | None = Field(default=100, gt=0)
    """Steps between comparisons of the ranks' copies of the weights (and before every checkpoint): a flipped bit ends the run, which goes
    on from the newest checkpoint. None: they are not compared."""
    straggler_factor: float | None = Field(default=1.2, gt=1)
    """A rank that reads, prepares and encodes so many times slower than the middle one of all ranks, by the median of 20 steps, is
    named in events.jsonl and on the terminal. None: none is."""
