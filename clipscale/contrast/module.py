"""ContrastiveLoss: the exact loss for other people's trainers, in place of open_clip's ClipLoss and SigLipLoss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from clipscale.contrast.loss import check_method, contrastive_loss
from clipscale.contrast.pairs import Pairs
from clipscale.contrast.settings import ContrastSettings
from clipscale.errors import ConfigError
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh


class ContrastiveLoss(nn.Module):
    """Call it like open_clip's losses: `loss(image_features, text_features, logit_scale, logit_bias)`, features normalised.

    Args:
        objective: an objective's name ("clip", "siglip", ...), or an objective with its settings.
        group: the ranks whose pairs make the global batch; none: all, or this process alone when torch.distributed is not running.
        grid: "auto", as square as can be, or (rows, columns) of ranks.
        tile: "auto", 1024, or the rows and columns of a tile.
        gradients: "ddp" when the engine then averages gradients over the ranks (DDP, FSDP), "global" when it adds them.

    Raises:
        ConfigError: at the first call, when the grid does not fit the number of ranks.
        ContrastError: on every rank alike, when any rank's input is unusable or the ranks disagree.
    """

    def __init__(
        self,
        objective: str | Objective = "clip",
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        grid: Literal["auto"] | tuple[int, int] = "auto",
        tile: Literal["auto"] | int = "auto",
        gradients: Literal["ddp", "global"] = "ddp",
    ) -> None:
        super().__init__()
        self.objective = Objective.model_validate(objective)
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.grid, self.gradients = grid, gradients
        size = ContrastSettings().tile_rows if tile == "auto" else tile
        self.settings = ContrastSettings(grid_rows=None if grid == "auto" else grid[0], tile_rows=size, tile_columns=size)
        self._meshes: dict[torch.device, Mesh] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        text_guide: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The global mean loss, the same on every rank; with `output_dict`, as {"contrastive_loss": loss}.

        Args:
            image_features: [b, D], or any other first modality's.
            text_features: [b, D].
            logit_scale: already exponentiated, one number.
            logit_bias: one number; only objectives that need it use it.
            output_dict: return a dictionary, as open_clip does.
            text_guide: a locked text tower's features [b, Dg], for cwcl.
            text_ids: captions' identities, int64 [b], for `same_text: ignored`.
        """
        mesh = self._mesh(image_features.device)
        pairs = Pairs(image_features, text_features, guide_y=text_guide, ids=text_ids)
        loss = contrastive_loss(self.objective, pairs, logit_scale, logit_bias, settings=self.settings, mesh=mesh).loss
        if self.gradients == "ddp":
            loss = loss + (mesh.world - 1) * (loss - loss.detach())  # the value stays; averaging over W ranks undoes the factor
        return {"contrastive_loss": loss} if output_dict else loss

    def _mesh(self, device: torch.device) -> Mesh:
        """The ranks that share the batch, found at the first call, when the process group is sure to stand."""
        if device not in self._meshes:
            running = dist.is_initialized()
            rank, world = (dist.get_rank(self.group), dist.get_world_size(self.group)) if running else (0, 1)
            check_method(self.settings, world=world)
            self._check_grid(world)
            self._meshes[device] = Mesh(rank=rank, world=world, local_rank=device.index or 0, device=device, group=self.group)
        return self._meshes[device]

    def _check_grid(self, world: int) -> None:
        if self.grid != "auto" and self.grid[0] * self.grid[1] != world:
            raise ConfigError(f"grid {self.grid[0]}×{self.grid[1]} is {self.grid[0] * self.grid[1]} ranks, there are {world}")
