"""Logits and guides: the numbers that every method starts from.

Legend: b pairs on this rank, Dg guide width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clipscale.contrast.pairs import Agreement, Request


def effective_bias(request: Request) -> Tensor | None:
    """The bias as a 0-d number, for objectives that use one; a softmax does not change with it."""
    if request.bias is None or "bias" not in request.objective.needs:
        return None
    return request.bias.detach().to(request.dtype).reshape(())


def unit_guide(request: Request, agreement: Agreement) -> Tensor | None:
    """Guide features whose products are cosines, centred on the global batch if the objective asks: [b, Dg]."""
    guide = request.pairs.guide(request.objective)
    if guide is None:
        return None
    guide = guide.detach().to(request.dtype)
    if request.objective.centres_guide:
        total = request.mesh.gather(guide.sum(0, dtype=torch.float64)).sum(0)
        guide = guide - (total / agreement.count).to(request.dtype)
    return functional.normalize(guide, dim=1)


def to_logits(cosine: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale · cosine + bias."""
    return cosine * scale if bias is None else cosine * scale + bias


def to_cosine(logits: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The cosine that a logit was made of."""
    return logits / scale if bias is None else (logits - bias) / scale
