"""clipscale: contrastive pretraining of image, speech and text encoders, exact at any scale."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipscale.contrast.module import ContrastiveLoss

__version__ = "0.1.0"
__all__ = ["ContrastiveLoss", "__version__"]


def __getattr__(name: str) -> object:
    """`clipscale.ContrastiveLoss`, imported when it is first asked for: the commands start without torch."""
    if name == "ContrastiveLoss":
        from clipscale.contrast.module import ContrastiveLoss

        return ContrastiveLoss
    raise AttributeError(f"module 'clipscale' has no attribute '{name}'")
