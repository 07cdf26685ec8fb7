"""Softmax cross-entropy of a row, with smoothed labels: of any logits, precise for fitted pairs.

Of a sample with pair logit p and u = log Σ e^logit over the negatives, it is softplus(u − p): the same number as logsumexp(all) − p, but
exact to the last digits for fitted pairs too. With label smoothing ε the target gives ε evenly to all candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipscale.objectives import LogSumExp, Row, Sum, Term, softplus


def candidate_terms(logits: Tensor, left_out: Tensor | None, *, label_smoothing: float) -> dict[str, Term]:
    """What `cross_entropy` asks of a row's candidates besides its own pair, `left_out` with it: logits [n, m]."""
    terms: dict[str, Term] = {"negatives": LogSumExp(logits, left_out)}
    if label_smoothing:
        terms |= {"sum": Sum(logits, left_out), "count": Sum(torch.ones_like(logits), left_out)}
    return terms


def cross_entropy(row: Row, positive: Tensor, *, label_smoothing: float) -> Tensor:
    """Of each row, given its pair's logit: [n] -> [n]."""
    loss = softplus(row["negatives"] - positive)
    if not label_smoothing:
        return loss
    mean = (row["sum"] + positive) / (row["count"] + 1)
    return loss + label_smoothing * (positive - mean)
