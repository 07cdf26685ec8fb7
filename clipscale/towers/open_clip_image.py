"""The image half of any open_clip architecture: ViT, ResNet, ConvNeXt, SigLIP and timm towers, pretrained or from scratch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from clipscale.inputs import Modality
from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import OpenClipTower, configured_width, create
from clipscale.towers._open_clip_modules import image_module


class OpenClipImage(OpenClipTower):
    """An open_clip image tower with its own final projection."""

    modality: ClassVar[Modality] = "image"

    image_size: int | None = Field(default=None, gt=0)
    """Height and width, pixels, instead of the architecture's; position embeddings are resized."""
    patch_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of patches left out while training (FLIP, Li et al. 2023, arXiv:2212.00794); ViTs only."""

    def build(self) -> TowerModule:
        """Random weights, or those of `pretrained`."""
        options = {"force_image_size": self.image_size, "force_patch_dropout": self.patch_dropout}
        model = create(self.architecture, self.pretrained, unwanted="text_cfg", **options)
        return image_module(model, configured_width(self.architecture))
