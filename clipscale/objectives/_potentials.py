"""Gaussian potentials between samples, and the logarithm of their mean: what uniformity is made of."""

from __future__ import annotations

from torch import Tensor

from clipscale.objectives import Block, Product
from clipscale.objectives._distances import block_distances


def potentials(block: Block, product: Product, sharpness: float) -> Tensor:
    """e^{−sharpness · squared distance} of the rows' views and the columns': [n, m], from e^{−4 · sharpness} to 1."""
    return (-sharpness * block_distances(block, product)).exp()


def log_mean(total: Tensor, count: int) -> Tensor:
    """Logarithm of the mean over the count·(count − 1) combinations of different samples, given their sum; 0 when there are none: 0-d."""
    return (total / (count * (count - 1))).log() if count > 1 else 0 * total
