"""ContrastiveLoss: the exact loss for other people's trainers, in place of open_clip's ClipLoss and SigLipLoss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from clipscale.contrast.cost import Cost, cost_of
from clipscale.contrast.loss import check_method, contrastive_loss, contrastive_loss_and_gradients
from clipscale.contrast.pairs import Pairs
from clipscale.contrast.settings import ContrastSettings, WireDtype
from clipscale.errors import ConfigError
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh


class LossAndGradients(NamedTuple):
    """The loss, and its gradients as the trainer's convention wants them."""

    loss: Tensor
    """The global mean loss, the same on every rank."""
    image_gradient: Tensor
    """[b, D], float32 (float64 for float64 features)."""
    text_gradient: Tensor
    """[b, D]."""
    scale_gradient: Tensor
    """With respect to the scale itself, not its logarithm."""
    bias_gradient: Tensor | None
    """None when no bias was given."""
    metrics: dict[str, Tensor]


class ContrastiveLoss(nn.Module):
    """Call it like open_clip's losses: `loss(image_features, text_features, logit_scale, logit_bias)`, features normalised.

    Args:
        objective: an objective's name ("clip", "siglip", ...), or an objective with its settings.
        group: the ranks whose pairs make the global batch; none: all, or this process alone when torch.distributed is not running.
        grid: "auto", as square as can be, or (rows, columns) of ranks.
        tile: "auto", what suits the device; or the rows and columns of a tile, as one number or two.
        cache: bytes of logits that the first sweep may keep for the gradient's, 0 for none; "auto": all where they fit 64 MiB.
        backend: "torch", "compile" (the objective's terms by torch.compile) or "triton" (fused kernels on CUDA for the softmax and sigmoid
            families); "auto": on the CPU torch, on CUDA triton for bfloat16 features where its kernels know the objective, else compile.
        gradients: "ddp" when the engine then averages gradients over the ranks (DDP, FSDP), "global" when it adds them.
        feature_wire: round features to this dtype when they are sent to other ranks; none: not at all.
        gradient_wire: the same for parts of gradients.

    Raises:
        ConfigError: at the first call, when the grid does not fit the number of ranks.
        ContrastError: on every rank alike, when any rank's input is unusable or the ranks disagree.
    """

    metrics: dict[str, Tensor]
    """Of the last call: `x_to_y_top1`, `y_to_x_top1`, `mean_positive`, `hardest_negative` (cosines), from the same sweep as the loss."""

    def __init__(
        self,
        objective: str | Objective = "clip",
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        grid: Literal["auto"] | tuple[int, int] = "auto",
        tile: Literal["auto"] | int | tuple[int, int] = "auto",
        cache: Literal["auto"] | int = "auto",
        backend: Literal["auto", "torch", "compile", "triton"] = "auto",
        gradients: Literal["ddp", "global"] = "ddp",
        feature_wire: WireDtype | None = None,
        gradient_wire: Literal["bfloat16"] | None = None,
    ) -> None:
        super().__init__()
        if gradients not in ("ddp", "global"):
            raise ConfigError(f"gradients must be 'ddp' or 'global', it is '{gradients}'")
        self.objective = Objective.model_validate(objective)
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.grid, self.gradients, self.metrics = grid, gradients, {}
        sizes: tuple[int | None, int | None] = (None, None) if tile == "auto" else (tile, tile) if isinstance(tile, int) else tile
        self.settings = ContrastSettings(
            grid_rows=None if grid == "auto" else grid[0],
            tile_rows=sizes[0],
            tile_columns=sizes[1],
            cache_bytes=None if cache == "auto" else cache,
            backend=backend,
            feature_wire=feature_wire,
            gradient_wire=gradient_wire,
        )
        self._meshes: dict[torch.device, Mesh] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **others: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The global mean loss, the same on every rank; with `output_dict`, as {"contrastive_loss": loss}.

        Args:
            image_features: [b, D], or any other first modality's.
            text_features: [b, D].
            logit_scale: already exponentiated, one number.
            logit_bias: one number; only objectives that need it use it.
            output_dict: return a dictionary, as open_clip does.
            others: what else the objective needs, see `make_pairs`.
        """
        mesh = self._mesh(image_features.device)
        pairs = make_pairs(image_features, text_features, **others)
        output = contrastive_loss(self.objective, pairs, logit_scale, logit_bias, settings=self.settings, mesh=mesh)
        loss, self.metrics = output.loss, output.metrics
        if self.gradients == "ddp" and loss.requires_grad:
            loss = loss + (mesh.world - 1) * (loss - loss.detach())  # the value stays; averaging over W ranks undoes the factor
        return {"contrastive_loss": loss} if output_dict else loss

    def loss_and_grad(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, **others: Any
    ) -> LossAndGradients:
        """The same loss with its gradients in hand, outside autograd: for trainers that cache gradients."""
        mesh = self._mesh(image_features.device)
        pairs = make_pairs(image_features, text_features, **others)
        known = contrastive_loss_and_gradients(self.objective, pairs, logit_scale, logit_bias, settings=self.settings, mesh=mesh)
        self.metrics = known.metrics
        factor = mesh.world if self.gradients == "ddp" else 1
        bias = None if known.bias is None else known.bias * factor
        image, text = known.leaves["x"].mul_(factor), known.leaves["y"].mul_(factor)
        return LossAndGradients(known.loss, image, text, known.scale * factor, bias, known.metrics)

    def cost(self, global_batch: int, dim: int, world: int, ranks_per_node: int | None = None, dtype: torch.dtype = torch.float32) -> Cost:
        """What one call with gradients takes on each of `world` ranks with equal shares of the batch; see `Cost`.

        Raises:
            ConfigError: the batch, the grid or the groups do not fit the ranks.
        """
        self._check_grid(world)
        return cost_of(self.objective, self.settings, global_batch, dim, world=world, ranks_per_node=ranks_per_node, dtype=dtype)

    def _mesh(self, device: torch.device) -> Mesh:
        """The ranks that share the batch, found at the first call, when the process group is sure to stand."""
        if device not in self._meshes:
            running = dist.is_initialized()
            rank, world = (dist.get_rank(self.group), dist.get_world_size(self.group)) if running else (0, 1)
            self._check_grid(world)
            check_method(self.settings, world=world, objective=self.objective)
            self._meshes[device] = Mesh(rank=rank, world=world, local_rank=device.index or 0, device=device, group=self.group)
        return self._meshes[device]

    def _check_grid(self, world: int) -> None:
        if self.grid != "auto" and self.grid[0] * self.grid[1] != world:
            raise ConfigError(f"grid {self.grid[0]}×{self.grid[1]} is {self.grid[0] * self.grid[1]} ranks, there are {world}")


def make_pairs(
    image_features: Tensor,
    text_features: Tensor,
    *,
    text_guide: Tensor | None = None,
    image_guide: Tensor | None = None,
    text_ids: Tensor | None = None,
    views: Mapping[str, Tensor] | None = None,
    numbers: Mapping[str, Tensor] | None = None,
    extra_images: Tensor | None = None,
    extra_texts: Tensor | None = None,
) -> Pairs:
    """Pairs in a trainer's words.

    Args:
        image_features: [b, D].
        text_features: [b, D].
        text_guide: a locked text tower's features [b, Dg], for cwcl.
        image_guide: a locked image tower's features [b, Dg].
        text_ids: captions' identities, int64 [b], for `same_text: ignored` and multi-positive objectives.
        views: further modalities or views by name, [b, D] each.
        numbers: numbers of each pair by name, [b] each.
        extra_images: this rank's share of extra images, negatives of every text: [M, D].
        extra_texts: this rank's share of extra texts, negatives of every image (hard-negative captions, a queue): [M, D].
    """
    return Pairs(
        image_features,
        text_features,
        guide_x=image_guide,
        guide_y=text_guide,
        ids=text_ids,
        views=views or {},
        numbers=numbers or {},
        extra_x=extra_images,
        extra_y=extra_texts,
    )


def contrastive_loss_and_grad(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    objective: str | Objective = "clip",
    others: Mapping[str, Any] | None = None,
    **options: Any,
) -> LossAndGradients:
    """The exact loss and its gradients without autograd, in one call.

    Args:
        image_features: [b, D].
        text_features: [b, D].
        logit_scale: already exponentiated, one number.
        logit_bias: one number.
        objective: as for `ContrastiveLoss`.
        others: what else the objective needs, see `make_pairs`.
        options: further options of `ContrastiveLoss`.
    """
    loss = ContrastiveLoss(objective, **options)
    return loss.loss_and_grad(image_features, text_features, logit_scale, logit_bias, **(others or {}))
