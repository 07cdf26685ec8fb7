"""clipscale: contrastive pretraining of image, speech and text encoders, exact at any scale."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipscale.contrast.module import ContrastiveLoss, contrastive_loss_and_grad

__version__ = "0.1.0"
__all__ = ["ContrastiveLoss", "__version__", "contrastive_loss_and_grad"]


def __getattr__(name: str) -> object:
    """`ContrastiveLoss` and `contrastive_loss_and_grad`, imported when first asked for: the commands start without torch."""
    if name in __all__:
        from clipscale.contrast import module

        return getattr(module, name)
    raise AttributeError(f"module 'clipscale' has no attribute '{name}'")
