"""Dense: the textbook loss. Every rank gathers everything and holds the whole matrix of logits; the reference for all other methods.

Terms are reduced in torch's own words and all gradients come from autograd. Each rank keeps its own rows' gradients; those of scale and
bias, which every rank computes in full, are divided by the number of ranks, so that adding over ranks gives them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipscale.contrast.logits import effective_bias, to_cosine, to_logits, unit_guide
from clipscale.contrast.pairs import Agreement, Request
from clipscale.contrast.result import SIDES, Gradients, Result, Tally, sum_rows
from clipscale.contrast.tiled import HARDEST, with_hardest
from clipscale.objectives import Block, Row, Side
from clipscale.parallel.collectives import gather_rows


def dense_loss(request: Request, agreement: Agreement) -> Result:
    """The exact loss over all ranks' pairs, from the full B×B matrix on every rank."""
    dtype, count = request.dtype, agreement.count

    def gather(rows: Tensor) -> Tensor:
        return gather_rows(rows, agreement.sizes, request.mesh.everyone)

    x, y = (gather(side.detach().to(dtype)).requires_grad_() for side in (request.pairs.x, request.pairs.y))
    scale = request.scale.detach().to(dtype).reshape(()).requires_grad_()
    bias = effective_bias(request)
    bias = bias if bias is None else bias.clone().requires_grad_()
    guide, ids = unit_guide(request, agreement), request.pairs.ids
    guide, ids = (None if rows is None else gather(rows) for rows in (guide, ids))
    with torch.enable_grad():
        cosine = (x * y).sum(1)
        block = Block(
            logits=to_logits(x @ y.T, scale, bias),
            positive=torch.eye(count, dtype=torch.bool, device=x.device),
            same_text=None if ids is None else ids.unsqueeze(1) == ids,
            guide=None if guide is None else guide @ guide.T,
        )
        terms = with_hardest(request.objective, block)
        reduced: dict[Side, dict[str, Tensor]] = {
            side: {name: term.reduce(1 if side == "x" else 0) for name, term in terms.items() if term.serves(side)} for side in SIDES
        }
        hardest = {side: to_cosine(reduced[side].pop(HARDEST), scale, bias).detach() for side in SIDES}
        positive = to_logits(cosine, scale, bias)
        loss = sum_rows([request.objective.row_loss(Row(side, positive, count, reduced[side])) for side in SIDES], count=count)
    metrics = Tally.of(cosine.detach(), hardest).metrics(count=count)
    leaves = [x, y, scale] if bias is None else [x, y, scale, bias]
    gradients = _own(torch.autograd.grad(loss, leaves), request, agreement) if agreement.wants_gradients else None
    return Result(loss.detach().to(dtype), metrics, gradients)


def _own(gradients: tuple[Tensor, ...], request: Request, agreement: Agreement) -> Gradients:
    rank = request.mesh.rank
    start = sum(agreement.sizes[:rank])
    rows = slice(start, start + agreement.sizes[rank])
    scale, bias = gradients[2], gradients[3] if len(gradients) == 4 else torch.zeros_like(gradients[2])
    return Gradients(gradients[0][rows], gradients[1][rows], scale / request.mesh.world, bias / request.mesh.world)
