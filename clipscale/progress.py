"""The line of progress a person watches while training: throughput, use of the devices, loss and temperature by pair kind, data wait."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from clipscale.config import Run
from clipscale.throughput import StepTimes


class Progress:
    """A live bar on a terminal, a plain line every n steps elsewhere; silent on all ranks but the first."""

    def __init__(self, run: Run, *, first_step: int, shown: bool) -> None:
        self._run = run
        self._live = shown and sys.stderr.isatty()
        self._plain = shown and not self._live
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), disable=not self._live)
        self._task = self._bar.add_task(run.name, total=run.steps, completed=first_step, numbers="")
        self._rate: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, record: dict[str, Any], times: StepTimes) -> None:
        """One finished step."""
        if not (self._live or self._plain):
            return
        rate = sum(self._run.pair_kinds[name].global_batch for name in record["kinds"]) / times.seconds
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        kinds = "  ".join(f"{name} {_loss(kind)}" for name, kind in record["kinds"].items())
        numbers = f"{self._rate:,.0f} samples/s  {_arithmetic(times)}{kinds}  data wait {times.phases['data'] / times.seconds:.0%}"
        if self._live:
            self._bar.update(self._task, completed=record["step"], numbers=numbers)
        elif record["step"] % self._run.logging.print_every_steps == 0 or record["step"] == self._run.steps:
            print(f"step {record['step']}/{self._run.steps}  {numbers}", file=sys.stderr, flush=True)


def _loss(kind: dict[str, Any]) -> str:
    return "loss not finite" if kind["loss"] is None else f"loss {kind['loss']:.3f} scale {kind['scale']:.1f}"


def _arithmetic(times: StepTimes) -> str:
    """MFU where a device's best is known, else what it achieved."""
    if times.mfu is not None:
        return f"MFU {times.mfu:.1%}  "
    return "" if times.flops_per_second is None else f"{times.flops_per_second / 1e12:.3g} TFLOP/s  "
