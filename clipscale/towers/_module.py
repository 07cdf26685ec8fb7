"""TowerModule: what every tower's `build` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from clipscale.errors import RequestError
from clipscale.inputs import Input
from clipscale.towers._compile import compile_blocks
from clipscale.towers._recompute import Recompute, undo
from clipscale.towers._recompute import recompute as recomputed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from clipscale.towers._tensor_parallel import Split


class TowerModule(nn.Module):
    """An encoder from prepared inputs (clipscale/inputs.py) to one feature vector per sample."""

    embed_dim: int
    """Width of the features, before the model's projection into the shared space."""
    input: Input
    """What `forward` must be fed."""
    locked: Literal["no", "partly", "wholly"] = "no"
    """How much of the tower `lock` has locked."""
    compiled: bool = False
    """Whether its blocks run compiled."""
    _recompute: Recompute | None = None
    _arranged: Sequence[nn.Module] = ()

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks from input to output: units of recomputation, sharding and unlocking."""
        raise NotImplementedError

    def after_blocks(self) -> list[nn.Module | nn.Parameter]:
        """What stands after the last block (final norm, pooling, projection): unlocked together with the last blocks."""
        raise NotImplementedError

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prepared inputs of b samples to features [b, embed_dim], not normalised."""
        raise NotImplementedError

    def splits(self, block: nn.Module) -> Sequence[Split]:
        """Which layers of a block tensor ranks can share; none: the block stays whole on every rank."""
        from clipscale.towers._tensor_parallel import known_splits  # knows open_clip, which takes seconds to import

        return known_splits(block)

    def check_tensor_ranks(self, ranks: int) -> None:
        """Refuse a number of tensor ranks that the blocks cannot be cut into.

        Raises:
            RequestError: says what there is to cut, and how many ranks would fit.
        """
        from clipscale.towers._tensor_parallel import check_splits

        blocks = self.blocks()
        check_splits(blocks, [self.splits(block) for block in blocks], ranks=ranks)

    def cut(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Cut the blocks over the tensor ranks of `mesh`, in place, before sharding.

        Returns:
            For parameters whose rows are no longer in order: which row of the whole one each row is, by parameter name.
        """
        from clipscale.towers._tensor_parallel import cut_block

        names = {module: name for name, module in self.named_modules()}
        undo(self._arranged)
        orders = {
            f"{names[block]}.{path}": order for block in self.blocks() for path, order in cut_block(block, self.splits(block), mesh).items()
        }
        self.arrange(recompute=self._recompute, compiled=self.compiled)
        return orders

    def arrange(self, *, recompute: Recompute | None, compiled: bool) -> None:
        """How blocks run from now on; parameters and their names stay as they are.

        Raises:
            RequestError: they cannot.
        """
        self._recompute, self.compiled = recompute, compiled
        arranged = compile_blocks(self.blocks()) if compiled else []
        self._arranged = [*arranged, *([] if recompute is None else recomputed(self.blocks(), recompute))]

    def lock(self, *, unlocked_blocks: int) -> None:
        """Train nothing, or only the last blocks and what stands after them.

        Raises:
            RequestError: there are fewer blocks.
        """
        blocks = self.blocks()
        if unlocked_blocks > len(blocks):
            raise RequestError(f"unlocked_blocks {unlocked_blocks} is more than the {len(blocks)} blocks of this tower")
        last = [*blocks[len(blocks) - unlocked_blocks :], *self.after_blocks()] if unlocked_blocks else []
        trainable = {parameter for part in last for parameter in parameters_of(part) if parameter.requires_grad}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in trainable)
        self.locked = "partly" if trainable else "wholly"
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what trains; what is locked stays as in evaluation: no dropout, batch statistics as stored."""
        super().train(mode)
        if self.locked != "no":
            _evaluate_locked(self)
        return self


def on_meta_device() -> bool:
    """Whether modules are being built on the meta device, for their names and shapes only."""
    return torch.get_default_device().type == "meta"


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """The parameters of what `after_blocks` names."""
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _evaluate_locked(module: nn.Module) -> None:
    """Evaluation mode for every module without trainable parameters, except inside one that trains wholly."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if not any(trains):
        for child in module.modules():
            child.training = False
    elif not all(trains):
        for child in module.children():
            _evaluate_locked(child)
