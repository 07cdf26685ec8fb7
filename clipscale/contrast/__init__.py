"""The exact contrastive loss over the global batch: dense, tiled, or on a grid of ranks, for any objective."""

from clipscale.contrast.loss import ContrastOutput, check_method, contrastive_loss
from clipscale.contrast.module import ContrastiveLoss
from clipscale.contrast.pairs import Pairs
from clipscale.contrast.settings import ContrastSettings

__all__ = ["ContrastOutput", "ContrastSettings", "ContrastiveLoss", "Pairs", "check_method", "contrastive_loss"]
