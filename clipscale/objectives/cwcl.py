"""CWCL: a locked second tower says how similar its own samples are, and those similarities become the targets.

Srinivasa et al. 2023, arXiv:2309.14580 (formula as restated with code by CellCLIP, suinleelab/CellCLIP). With guide features g of the
second modality y (the locked text tower, for speech–text), w_jk = ⟨g_j, g_k⟩/2 + 1/2 and P the softmax over x of y_j's logits:

    loss = 1/B Σ_j [ −Σ_k (w_jk / Σ_l w_jl) log P_jk ]  +  1/B Σ_i [ −log softmax over y of x_i's logits, at its pair ]

The weights act in the direction from y only (with `guided_by: first`, from x only); the other direction is plain; the loss is the
sum of both, about twice CLIP's. A row is computed as softplus(u − p) + Σ_k ŵ_jk (p − logit_jk), which keeps its digits on fitted
pairs. With identity weights it is twice CLIP.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from clipscale.objectives import Block, LogSumExp, Need, Objective, Row, SameText, Side, Sum, Term, softplus


class Cwcl(Objective):
    """Continuously weighted contrastive loss: soft targets from the locked second tower."""

    sharpen: float = Field(default=1.0, gt=0.0)
    """Power of each weight before rows are normalised; 1 is the paper's, more lets only close neighbours count."""
    centre: bool = False
    """Take the global batch's mean off the guide features before their cosines, which spreads the similarities of narrow
    feature clouds; the paper does not."""
    guided_by: Literal["first", "second"] = "second"
    """Whose locked tower supplies the weights: the second modality's (text, for speech–text) or the first's (image, for LiT)."""
    same_text: SameText = "negative"
    """`ignored`: combinations whose captions are equal, other than the pairs themselves, are neither candidates nor targets."""

    @property
    def needs(self) -> frozenset[Need]:
        guide: Need = "guide" if self.guided_by == "second" else "first_guide"
        return frozenset({guide, "ids"} if self.same_text == "ignored" else {guide})

    @property
    def centres_guide(self) -> bool:
        return self.centre

    @property
    def _guided_side(self) -> Side:
        return "y" if self.guided_by == "second" else "x"

    def terms(self, block: Block) -> dict[str, Term]:
        assert block.guide is not None, "the engine gives what `needs` names"
        side = self._guided_side
        left_out = block.left_out(self.same_text)
        weight = ((1 + block.guide) / 2).clamp(min=0) ** self.sharpen
        return {
            "negatives": LogSumExp(block.logits, left_out),
            "weight": Sum(weight, left_out, side),
            "weighted": Sum(weight * block.logits, left_out, side),
        }

    def row_loss(self, row: Row) -> Tensor:
        loss = softplus(row["negatives"] - row.positive)
        if row.side != self._guided_side:
            return loss
        return loss + (row["weight"] * row.positive - row["weighted"]) / (1 + row["weight"])  # a pair's own weight is 1
