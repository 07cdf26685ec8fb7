"""Textbook contrastive losses, a few lines of torch each, written without clipscale: what the exact engine must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Batch:
    """A global batch of B pairs of width D, with everything any objective may need."""

    x: Tensor
    y: Tensor
    guide_x: Tensor
    guide_y: Tensor
    ids: Tensor
    scale: Tensor
    bias: Tensor
    z: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch in another precision, ids excepted."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value if name == "ids" else value.detach().to(dtype) for name, value in values.items()})


def make_batch(count: int, *, width: int = 12, scale: float = 14.0, correlation: float = 1.0, seed: int = 0) -> Batch:
    """Random unit embeddings, partners correlated; every third caption is a repeated one."""
    draw = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(count, columns, generator=draw, dtype=torch.float64)

    x = normal(width)
    y = normal(width) + correlation * x
    return Batch(
        x=functional.normalize(x, dim=1),
        y=functional.normalize(y, dim=1),
        guide_x=functional.normalize(normal(5), dim=1),
        guide_y=functional.normalize(normal(7) + 1.0, dim=1),
        ids=torch.where(torch.arange(count) % 3 == 0, torch.arange(count) % 4, torch.arange(count) + 100),
        scale=torch.tensor([scale], dtype=torch.float64),
        bias=torch.tensor([-7.0], dtype=torch.float64),
        z=functional.normalize(normal(width) + correlation * x, dim=1),
    )


def _logits(batch: Batch) -> Tensor:
    return batch.scale * batch.x @ batch.y.T


def _equal_captions(batch: Batch) -> Tensor:
    """Combinations of equal captions, other than the pairs themselves."""
    return (batch.ids[:, None] == batch.ids[None, :]) & ~torch.eye(len(batch.ids), dtype=torch.bool)


def clip(batch: Batch) -> Tensor:
    targets = torch.arange(len(batch.x))
    logits = _logits(batch)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def clip_smoothed(batch: Batch) -> Tensor:
    targets = torch.arange(len(batch.x))
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits = _logits(batch)
    return (loss(logits, targets) + loss(logits.T, targets)) / 2


def clip_ignoring_same_text(batch: Batch) -> Tensor:
    logits = _logits(batch).masked_fill(_equal_captions(batch), -torch.inf)
    pair = logits.diagonal()
    return ((logits.logsumexp(1) - pair).mean() + (logits.logsumexp(0) - pair).mean()) / 2


def clip_smoothed_ignoring_same_text(batch: Batch) -> Tensor:
    logits, dropped = _logits(batch), _equal_captions(batch)
    total = torch.zeros((), dtype=logits.dtype)
    for matrix, left_out in ((logits, dropped), (logits.T, dropped.T)):
        for row in range(len(matrix)):
            kept = matrix[row][~left_out[row]]
            uniform = torch.full_like(kept, 0.3 / len(kept))
            log_p = kept.log_softmax(0)
            total = total - (uniform * log_p).sum() - 0.7 * (matrix[row, row] - kept.logsumexp(0))
    return total / (2 * len(logits))


def siglip(batch: Batch) -> Tensor:
    sign = 2 * torch.eye(len(batch.x), dtype=batch.x.dtype) - 1
    return -functional.logsigmoid(sign * (_logits(batch) + batch.bias)).sum() / len(batch.x)


def _cwcl(logits: Tensor, weight: Tensor, plain: Tensor) -> Tensor:
    """Rows of `logits` belong to the modality that supplies the weights, rows of `plain` to the other."""
    soft = weight / weight.sum(1, keepdim=True)
    weighted = -(soft * logits.log_softmax(1).masked_fill(soft == 0, 0)).sum(1).mean()
    return weighted - plain.log_softmax(1).diagonal().mean()


def cwcl(batch: Batch) -> Tensor:
    weight = batch.guide_y @ batch.guide_y.T / 2 + 0.5
    return _cwcl(_logits(batch).T, weight, _logits(batch))


def cwcl_from_first(batch: Batch) -> Tensor:
    weight = batch.guide_x @ batch.guide_x.T / 2 + 0.5
    return _cwcl(_logits(batch), weight, _logits(batch).T)


def cwcl_sharpened_centred_ignoring(batch: Batch) -> Tensor:
    guide = functional.normalize(batch.guide_y - batch.guide_y.mean(0), dim=1)
    weight = ((guide @ guide.T / 2 + 0.5) ** 3).masked_fill(_equal_captions(batch), 0)
    logits = _logits(batch).masked_fill(_equal_captions(batch), -torch.inf)
    return _cwcl(logits.T, weight, logits)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), -torch.inf)


def dcl(batch: Batch) -> Tensor:
    logits = _logits(batch)
    return sum((_off_diagonal(logits).logsumexp(dim) - logits.diagonal()).mean() for dim in (0, 1)) / 2


def _two_view_negatives(batch: Batch) -> tuple[Tensor, Tensor]:
    logits = _off_diagonal(_logits(batch))
    own = [_off_diagonal(batch.scale * side @ side.T) for side in (batch.x, batch.y)]
    return torch.cat([logits, own[0]], 1).logsumexp(1), torch.cat([logits.T, own[1]], 1).logsumexp(1)


def dcl_two_view(batch: Batch) -> Tensor:
    return sum((negatives - _logits(batch).diagonal()).mean() for negatives in _two_view_negatives(batch)) / 2


def dclw_two_view(batch: Batch) -> Tensor:
    weight = 2 - len(batch.x) * ((batch.x * batch.y).sum(1) / 0.3).softmax(0).detach()
    return sum((negatives - weight * _logits(batch).diagonal()).mean() for negatives in _two_view_negatives(batch)) / 2


def supcon(batch: Batch, *, mean: bool = True) -> Tensor:
    belongs = (batch.ids[:, None] == batch.ids[None, :]).to(batch.x.dtype)
    total = torch.zeros((), dtype=batch.x.dtype)
    for logits in (_logits(batch), _logits(batch).T):
        rows = -(belongs * logits.log_softmax(1)).sum(1)
        total = total + (rows / belongs.sum(1) if mean else rows).mean() / 2
    return total


def multi_positive(batch: Batch) -> Tensor:
    return supcon(batch, mean=False)


def decoupled(batch: Batch) -> Tensor:
    belongs = batch.ids[:, None] == batch.ids[None, :]
    total = torch.zeros((), dtype=batch.x.dtype)
    for logits in (_logits(batch), _logits(batch).T):
        for row in range(len(logits)):
            negatives = logits[row][~belongs[row]]
            for positive in logits[row][belongs[row]]:
                both = torch.cat([negatives, positive.reshape(1)])
                total = total + (both.logsumexp(0) - positive) / belongs[row].sum() / len(logits) / 2
    return total


def mv_infonce(batch: Batch, *, same_view: bool = False) -> Tensor:
    views = (batch.x, batch.y, batch.z)
    own = torch.stack([batch.scale * (a * b).sum(1) for a in views for b in views if a is not b]).logsumexp(0)
    parts = [batch.scale * a @ b.T for a in views for b in views if a is not b]
    parts += [_off_diagonal(batch.scale * a @ a.T) for a in views] if same_view else []
    return (torch.cat(parts, 1).logsumexp(1) - own).mean()


def mv_infonce_code(batch: Batch) -> Tensor:
    return mv_infonce(batch, same_view=True)


def mv_dhel(batch: Batch) -> Tensor:
    views = (batch.x, batch.y, batch.z)
    own = torch.stack([batch.scale * (a * b).sum(1) for a in views for b in views if a is not b]).logsumexp(0)
    return (sum((batch.scale * view @ view.T).logsumexp(1) for view in views) - own).mean()


def mv_dhel_code(batch: Batch) -> Tensor:
    own = batch.scale * (batch.x * batch.y).sum(1)
    return (sum(_off_diagonal(batch.scale * view @ view.T).logsumexp(1) for view in (batch.x, batch.y)) - own).mean()


def uniformity(batch: Batch, *, sharpness: float = 2.0) -> Tensor:
    return (_log_mean_potential(batch.x, batch.x, sharpness) + _log_mean_potential(batch.y, batch.y, sharpness)) / 2


def cross_uniformity(batch: Batch, *, sharpness: float = 2.0) -> Tensor:
    return _log_mean_potential(batch.x, batch.y, sharpness)


def _log_mean_potential(one: Tensor, other: Tensor, sharpness: float) -> Tensor:
    count = len(one)
    potentials = [(-sharpness * (one[i] - other[j]).square().sum()).exp() for i in range(count) for j in range(count) if i != j]
    return torch.stack(potentials).mean().log()


def alignment(batch: Batch) -> Tensor:
    return (batch.x - batch.y).square().sum() / len(batch.x)


def soft_clip(batch: Batch) -> Tensor:
    targets, logits = (batch.x @ batch.x.T / 0.2).softmax(1), _logits(batch)
    return sum((-targets * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T)) / 2


def inverse_propensity(batch: Batch, *, power: float = 0.5) -> Tensor:
    often = (batch.ids[:, None] == batch.ids[None, :]).sum(1)
    total = torch.zeros((), dtype=batch.x.dtype)
    for logits in (_logits(batch), _logits(batch).T):
        for row in range(len(logits)):
            weight = often.to(logits.dtype) ** -power
            weight[row] = 1
            total = total + ((weight * logits[row].exp()).sum().log() - logits[row, row]) / len(logits) / 2
    return total


def multi_label(batch: Batch) -> Tensor:
    belongs = (batch.ids[:, None] == batch.ids[None, :]).to(batch.x.dtype)
    return functional.binary_cross_entropy_with_logits(_logits(batch), belongs)


def hinge(batch: Batch) -> Tensor:
    """Largest logit among the others, kept 3 below the pair's, from both sides."""
    logits = _logits(batch)
    others = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    return sum((3 + others.amax(dim) - logits.diagonal()).relu().mean() for dim in (0, 1))


def gradients(loss: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
    """Loss and its gradients by autograd, in float64."""
    exact = batch.to(torch.float64)
    leaves = {name: getattr(exact, name).requires_grad_() for name in ("x", "y", "z", "scale", "bias")}
    value = loss(exact)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    named = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), found, strict=True)}
    return {"loss": value.detach().reshape(1), **named}
