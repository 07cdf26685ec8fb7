"""Passes: a run's towers forwards and backwards on shapes alone, by the code that trains them.

The model stands on torch's fake tensors, which have shapes, dtypes and no memory: a ViT-H takes seconds and a few megabytes. Counted are
the operators of the CPU, whose attention keeps what GPUs' fused attention keeps; for a GPU, norms are in fp32 under autocast, as there.
Compiled blocks are counted as they are without compilation, which holds and moves more; features that a cache would hold are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipscale.config import Run
from clipscale.engines._replicated import ROUNDED
from clipscale.errors import ConfigError
from clipscale.inputs import Input, Modality
from clipscale.model import FEATURES, Encoders, KindOutput, Prepared, PreparedKinds, prepare
from clipscale.planning.ledger import Ledger, NormsInFp32, Work
from clipscale.run_model import build_model
from clipscale.throughput.flops import one_row
from clipscale.towers._text_tower import TextTower

Rounding = Literal["autocast", "weights"]
"""How the run's precision comes about: by autocast, or because the engine rounds the weights (fsdp2)."""


@dataclass(frozen=True)
class Pass:
    """The towers once forwards and backwards on some rows; inputs, weights and what the loss holds are not counted."""

    kept: int
    """Bytes alive after the forward pass, for the backward pass."""
    peak: int
    """Bytes at the fullest moment, gradients of weights that were made until then included."""
    gradients_at_peak: int
    """Of these, gradients of weights."""
    forward: Work
    backward: Work


class Passes:
    """The passes of one run's towers."""

    def __init__(self, run: Run, *, device: Literal["cpu", "cuda"], rounding: Rounding) -> None:
        """
        Raises:
            RequestError: a tower cannot be built.
        """
        self.run, self.device, self.rounding = run, device, rounding
        self.model = shapes_of(run)
        _arrange(run, self.model, norms_in_fp32=device == "cuda")
        self._rows = {modality: _one_prepared(modality, spec) for modality, spec in self.model.inputs().items()}
        self._fake = FakeTensorMode()
        with self._fake:
            _make_fake(self.model, ROUNDED[run.precision] if rounding == "weights" else None)
        self._done: dict[tuple[object, ...], Pass] = {}

    def input_bytes(self, rows: Mapping[str, int]) -> int:
        """Of prepared rows of every pair kind, as the towers are fed."""
        return sum(
            count * sum(tensor.nbytes for tensor in self._rows[modality].values())
            for kind, count in rows.items()
            for modality in self.run.pair_kinds[kind].modalities
        )

    def stored_bytes(self, modality: Modality) -> int:
        """Of one row of a modality on its way to the device."""
        return sum(tensor.nbytes for tensor in one_row(self.model.inputs()[modality], 1.0).values())

    def train(self, rows: Mapping[str, int], *, held: bool, again: bool = False) -> Pass:
        """Forwards and backwards.

        Args:
            rows: of every pair kind.
            held: gradients exist already, and are added to.
            again: locked towers' features are known from an earlier pass (cached gradients).

        Raises:
            ConfigError: a tower cannot be run on shapes.
        """
        known = again and any(self.model.tower(modality).locked == "wholly" for modality in self.model.modalities)
        key = (held, known, *sorted(rows.items()))
        if key not in self._done:
            try:
                self._done[key] = self._take(rows, held=held, known=known)
            except Exception as error:  # towers are other people's code, and some look at numbers
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise ConfigError(
                    f"the towers of '{self.run.name}' cannot be run on shapes alone ({why}); "
                    "benchmarks/step_time.py measures a step of any run on made-up data"
                ) from error
        return self._done[key]

    def estimate(self, rows: Mapping[str, int], *, held: bool, again: bool, anchor: int) -> Pass:
        """The same by the straight line through passes of `anchor` rows and of half as many, of the largest pair kind; no work is told."""
        largest = max(rows.values())
        sizes = [anchor, max(1, anchor // 2)]
        one, half = (
            self.train({kind: max(1, count * size // largest) for kind, count in rows.items()}, held=held, again=again) for size in sizes
        )
        ahead = (largest - sizes[0]) / max(1, sizes[0] - sizes[1])

        def line(whole: int, part: int) -> int:
            return max(0, round(whole + ahead * (whole - part)))

        peak = line(one.peak - one.gradients_at_peak, half.peak - half.gradients_at_peak)
        return Pass(line(one.kept, half.kept), peak + one.gradients_at_peak, one.gradients_at_peak, Work(), Work())

    def _take(self, rows: Mapping[str, int], *, held: bool, known: bool) -> Pass:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rounded = ROUNDED[self.run.precision] if self.rounding == "autocast" else None
        norms = NormsInFp32() if self.device == "cuda" else nullcontext()
        with self._fake, norms:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter) if held else None
            fed = self._fed(rows, known=known)
            ledger = Ledger()
            with ledger:
                with nullcontext() if rounded is None else torch.autocast("cpu", dtype=rounded):
                    outputs = self.model(fed)
                kept, forward = ledger.bytes, ledger.work
                ledger.work = Work()
                _backward(outputs)
            made = [parameter.grad for parameter in parameters if parameter.grad is not None and not held]
            at_peak = sum(ledger.made_before_peak(gradient) for gradient in made)
            del made, outputs
        return Pass(kept, ledger.peak, at_peak, forward, ledger.work)

    def _fed(self, rows: Mapping[str, int], *, known: bool) -> PreparedKinds:
        fed: PreparedKinds = {}
        for kind, count in rows.items():
            fed[kind] = {}
            for modality in self.run.pair_kinds[kind].modalities:
                tower = self.model.tower(modality)
                if known and tower.locked == "wholly":
                    fed[kind][modality] = {FEATURES: torch.empty(count, tower.embed_dim)}
                else:
                    fed[kind][modality] = {
                        name: _many(tensor, count, self._feed_dtype(tensor)) for name, tensor in self._rows[modality].items()
                    }
        return fed

    def _feed_dtype(self, tensor: Tensor) -> torch.dtype:
        rounded = ROUNDED[self.run.precision] if self.rounding == "weights" and tensor.is_floating_point() else None
        return tensor.dtype if rounded is None else rounded


def shapes_of(run: Run) -> Encoders:
    """The run's model on the meta device: nothing compiled, cached or made again."""
    towers = {}
    for modality, tower in run.towers.items():
        changes: dict[str, object] = {"compile": False, "recompute": None}
        if isinstance(tower, TextTower):
            changes["cached_rows"] = 0
        towers[modality] = tower.model_copy(update=changes)
    with torch.device("meta"):
        return build_model(run.model_copy(update={"towers": towers}))


def _arrange(run: Run, model: Encoders, *, norms_in_fp32: bool) -> None:
    """Blocks run as on the device, and are made again as the run says; what a budget of memory would keep is made again too."""
    for modality, tower in run.towers.items():
        module = model.tower(modality)
        for block in module.blocks() if norms_in_fp32 else []:
            block.forward = _with_norms_in_fp32(block.forward)
        if tower.recompute is not None:
            module.arrange(recompute=tower.recompute.model_copy(update={"keep_mb": None}), compiled=False)


def _with_norms_in_fp32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The mode is entered in the block itself: the backward pass, where blocks are made again, forgets modes around it."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with NormsInFp32():
            return forward(*args, **kwargs)

    return inside


def _one_prepared(modality: Modality, spec: Input) -> Prepared:
    """One row of the longest input, as the tower is fed."""
    with torch.device("cpu"):
        return prepare(modality, spec, one_row(spec, 1.0))


def _many(row: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((count, *row.shape[1:]), dtype=dtype)


def _make_fake(model: nn.Module, rounded: torch.dtype | None) -> None:
    """Parameters and buffers in place, fake instead of meta; inside a FakeTensorMode."""

    def fake(tensor: Tensor, *, rounds: bool) -> Tensor:
        dtype = rounded if rounded is not None and rounds and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    seen: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        rounds = not name.startswith(("log_scale", "bias"))
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in seen:
                    seen[parameter] = nn.Parameter(fake(parameter, rounds=rounds), requires_grad=parameter.requires_grad)
                module._parameters[key] = seen[parameter]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fake(buffer, rounds=False)


def _backward(outputs: Mapping[str, KindOutput]) -> None:
    """Gradients of embeddings and temperatures are given, as the loss gives them."""
    ends = [
        end
        for output in outputs.values()
        for end in (output.x, output.y, output.scale, output.bias)
        if end is not None and end.requires_grad
    ]
    torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
