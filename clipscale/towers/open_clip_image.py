"""The image half of any open_clip architecture: ViT, ResNet, ConvNeXt, SigLIP and timm towers, pretrained or from scratch.

b samples, d the architecture's own embedding width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import open_clip
from open_clip.timm_model import TimmModel
from pydantic import Field
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, Modality
from clipscale.towers import Tower
from clipscale.towers._blocks import flatten_stages, standing_after
from clipscale.towers._module import TowerModule
from clipscale.towers._open_clip import configured_width, create


class OpenClipImage(Tower):
    """An open_clip image tower with its own final projection."""

    modality: ClassVar[Modality] = "image"

    architecture: str
    """open_clip's name, such as ViT-B-16; or `local-dir:FOLDER` or `hf-hub:NAME`, which bring their weights."""
    pretrained: str | None = None
    """A checkpoint of the whole CLIP model (.pt, .safetensors), or a tag of open_clip's; none: random weights."""
    image_size: int | None = Field(default=None, gt=0)
    """Height and width, pixels, instead of the architecture's; position embeddings are resized."""
    patch_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of patches left out while training (FLIP, Li et al. 2023, arXiv:2212.00794); ViTs only."""

    def build(self) -> TowerModule:
        """Random weights, or those of `pretrained`."""
        options = {"force_image_size": self.image_size, "force_patch_dropout": self.patch_dropout}
        model = create(self.architecture, self.pretrained, unwanted="text_cfg", **options)
        return _OpenClipImage(model, configured_width(self.architecture))


class _OpenClipImage(TowerModule):
    def __init__(self, model: Any, embed_dim: int) -> None:
        super().__init__()
        self.visual = model.visual
        if hasattr(self.visual, "output_tokens"):
            self.visual.output_tokens = False
        self.input = _image_input(open_clip.get_model_preprocess_cfg(model))
        self.embed_dim = embed_dim

    def blocks(self) -> list[nn.Module]:
        visual = self.visual
        if isinstance(visual, TimmModel):
            return (
                flatten_stages(visual.trunk.get_submodule(path)) if (path := _timm_blocks(visual.trunk)) else _resnet_blocks(visual.trunk)
            )
        return list(visual.transformer.resblocks) if hasattr(visual, "transformer") else _resnet_blocks(visual)

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        visual = self.visual
        if isinstance(visual, TimmModel):
            return [*standing_after(visual.trunk, _timm_blocks(visual.trunk) or "layer4"), visual.head]
        named = [getattr(visual, name, None) for name in ("attnpool", "attn_pool", "attn_pool_contrastive", "ln_post", "proj")]
        return [part for part in named if isinstance(part, (nn.Module, nn.Parameter))]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """`pixels` [b, 3, H, W] to features [b, d]."""
        return self.visual(inputs["pixels"])  # type: ignore[no-any-return]


def _timm_blocks(trunk: nn.Module) -> str:
    """Name of a timm model's blocks (ViTs) or stages (ConvNeXt, Swin); '' for ResNets."""
    names = [name for name in ("blocks", "stages", "layers") if hasattr(trunk, name)]
    return names[0] if names else ""


def _resnet_blocks(visual: nn.Module) -> list[nn.Module]:
    return [block for number in range(1, 5) for block in visual.get_submodule(f"layer{number}").children()]


def _image_input(preprocess: dict[str, Any]) -> ImageInput:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise RequestError(f"this architecture wants images of {height} × {width}; only square ones are read: set image_size")
    fits = {"shortest": "crop", "squash": "squash", "longest": "pad"}
    interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
    return ImageInput(height, tuple(preprocess["mean"]), tuple(preprocess["std"]), interpolation, fits[preprocess["resize_mode"]])  # type: ignore[arg-type]
