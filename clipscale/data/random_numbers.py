"""Random numbers that depend on a key and nothing else: no state to save, the same in any batch, process or device.

splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), with int64 arithmetic that
wraps as uint64 does. b keys, n numbers each.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of this uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The next output of a generator whose state is x, int64 of any shape."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def named_key(name: str) -> int:
    """A key from a text, such as what the numbers are for: int64."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def combined(key: int, *parts: Tensor) -> Tensor:
    """One int64 key for each entry of equally long int64 tensors, and a key they share."""
    seeds = torch.full_like(parts[0], key)
    for part in parts:
        seeds = splitmix64(seeds ^ part)
    return seeds


def uniform(seeds: Tensor, n: int, *, purpose: str) -> Tensor:
    """Numbers in [0, 1), float64: keys int64 [b] -> [b, n]. Different purposes give independent numbers."""
    return _shifted(_bits(seeds, n, purpose), 11).double() * 2.0**-53


def _bits(seeds: Tensor, n: int, purpose: str) -> Tensor:
    starts = splitmix64(seeds ^ named_key(purpose))[:, None]
    return splitmix64(starts + torch.arange(n, device=seeds.device) * _STEP)


def between(seeds: Tensor, low: float, high: float, *, purpose: str) -> Tensor:
    """One number in [low, high) for each key, float32 [b]."""
    return (low + (high - low) * uniform(seeds, 1, purpose=purpose)[:, 0]).float()


def white_noise(seeds: Tensor, n: int, *, purpose: str) -> Tensor:
    """Numbers in [-1, 1) of 16 bits each, float32: keys int64 [b] -> [b, n]; four from each 64 bits, so cheap by the million."""
    return _bits(seeds, -(-n // 4), purpose).view(torch.int16)[:, :n].float() / 32768
