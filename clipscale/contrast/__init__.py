"""The exact contrastive loss over the global batch: dense, tiled, or on a grid of ranks, for any objective."""

from clipscale.contrast.cost import Cost
from clipscale.contrast.loss import ContrastOutput, KnownGradients, check_method, contrastive_loss, contrastive_loss_and_gradients
from clipscale.contrast.module import ContrastiveLoss, LossAndGradients, contrastive_loss_and_grad
from clipscale.contrast.pairs import Pairs
from clipscale.contrast.settings import ContrastSettings

__all__ = [
    "ContrastOutput",
    "ContrastSettings",
    "ContrastiveLoss",
    "Cost",
    "KnownGradients",
    "LossAndGradients",
    "Pairs",
    "check_method",
    "contrastive_loss",
    "contrastive_loss_and_grad",
    "contrastive_loss_and_gradients",
]
