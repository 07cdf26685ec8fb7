"""FLOPs: the arithmetic that training asks of a tower for one sample, whatever is done twice to save memory.

A tower's forward pass is run once, on the CPU, and its matrix products and convolutions are counted, two FLOPs for each multiplication;
everything else is of lower order. The backward pass takes twice the forward's (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery
et al. 2022, arXiv:2204.02311, appendix B): one product for the gradient of the weights, one for that of the input. A locked part has no
backward pass. Attention is counted in full, also where a mask leaves half of it out; padding is counted as what it is fed as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipscale.data.speech import collate_speech
from clipscale.inputs import ImageInput, Input, Modality, SpeechInput
from clipscale.model import Prepared, prepare
from clipscale.towers._module import TowerModule

_SHARES = (1.0, 0.5, 0.25)  # of the longest input: three points give the parabola that a transformer's FLOPs are


@dataclass(frozen=True)
class SampleFlops:
    """FLOPs of one sample, forward and backward, counted for a few lengths of its input."""

    counted: dict[int, int]
    """By length as a batch has it: pixels a side, waveform samples or tokens, padding included."""

    def at(self, length: int) -> int:
        """For an input of this length; between those counted by the polynomial through them, for attention is quadratic."""
        if length in self.counted:
            return self.counted[length]
        total = 0.0
        for own, flops in self.counted.items():
            others = [other for other in self.counted if other != own]
            total += flops * float(np.prod([(length - other) / (own - other) for other in others]))
        return round(total)


def count_sample(modality: Modality, tower: TowerModule) -> SampleFlops:
    """Count a tower that has its weights, on the CPU; it is left as it was."""
    counted: dict[int, int] = {}
    for share in _SHARES:
        rows = one_row(tower.input, share)
        length = input_length(rows)
        if length not in counted:
            try:
                counted[length] = _count(tower, prepare(modality, tower.input, rows))
            except Exception:
                if not counted:
                    raise
                break  # a tower that takes its full length only is never fed another
    return SampleFlops(counted)


def input_length(rows: Mapping[str, Tensor]) -> int:
    """The size along which rows of one modality differ from batch to batch."""
    main = next(rows[name] for name in ("pixels", "waveform", "tokens") if name in rows)
    return main.shape[-1]


def one_row(spec: Input, share: float) -> Prepared:
    """One sample as a batch brings it, of a share of the longest length."""
    if isinstance(spec, ImageInput):
        return {"pixels": torch.zeros(1, 3, spec.size, spec.size, dtype=torch.uint8)}
    if isinstance(spec, SpeechInput):
        return collate_speech([np.zeros(round(share * spec.max_seconds * spec.sample_rate), dtype=np.float32)], spec)
    tokens = torch.zeros(1, round(share * spec.context_length), dtype=torch.int64)
    return {"tokens": tokens, "mask": torch.ones_like(tokens)}


def _count(tower: TowerModule, inputs: Prepared) -> int:
    """Forward, and twice as much again from the first block on that trains."""
    counter = FlopCounterMode(display=False)
    locked: list[int] = []
    first = next((block for block in tower.blocks() if _trains(block)), None) if tower.locked == "partly" else None
    hook = first.register_forward_pre_hook(lambda *_: locked.append(counter.get_total_flops())) if first is not None else None
    try:
        with _left_alone(tower), _counted_kernels(), torch.no_grad(), counter:
            tower(inputs)
    finally:
        if hook is not None:
            hook.remove()
    forward = counter.get_total_flops()
    if tower.locked == "wholly":
        return forward
    return 3 * forward - 2 * (locked[0] if locked else 0)


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


@contextmanager
def _left_alone(tower: nn.Module) -> Iterator[None]:
    """Buffers (running means) and random states are put back."""
    before: dict[str, Tensor] = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        yield
    for name, buffer in tower.named_buffers():
        if name in before:
            buffer.copy_(before[name])


@contextmanager
def _counted_kernels() -> Iterator[None]:
    """Attention as products that the counter knows, and no fused layer that it does not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
