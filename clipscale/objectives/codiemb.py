"""CoDiEmb's retrieval loss: a query has several positives, and each is compared with its own kind and with everybody's hard negatives.

Zhang et al. 2025, arXiv:2508.11442 (formula as in the official code). With M positives a query, positive m of query j being sample j of
view m (y, z, ...), and hard negatives given as extra y samples,

    loss_i = 1/M Σ_m softplus( log Σ e^logit over the m-th positives of other queries and all hard negatives − logit_im )

One direction, from queries x: the other positives of a query are never its negatives. The paper's temperature is 0.02, M = 2 and four hard
negatives; a run has one positive a query and no hard negatives, which makes it CLIP's direction from x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Objective, Product, Row, Side, Terms, View, softplus
from clipscale.objectives._views import view_names


class Codiemb(Objective):
    """Softmax cross-entropy from the queries, for each of their positives apart."""

    takes_extras: ClassVar[bool] = True

    num_positives: int = Field(default=1, ge=1)
    """Positives of a query: y, z, view_4 and so on."""

    @property
    def views(self) -> tuple[View, ...]:
        return view_names(self.num_positives + 1)

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(("x", view) for view in self.views[1:])

    def terms(self, block: Block) -> Terms:
        if block.extra is not None:
            return {view: LogSumExp(block.logits, None, "x") for view in self.views[1:]}
        return {view: LogSumExp(block.products["x", view], block.left_out(), "x") for view in self.views[1:]}

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        row = rows["x"]
        losses = [softplus(row[view] - row.pairs["x", view]) for view in self.views[1:]]
        return torch.stack(losses).mean(0)
