"""What engines share that cut the weights into parts: whole tensors in and out, temperatures kept whole, one norm over all parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipscale.checkpoints import check_fit
from clipscale.engines._replicated import Replica
from clipscale.model import Encoders
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh
from clipscale.parallel.parts import norms_by_name, own_part, part_like, whole


class Shards(Replica):
    """A model whose parameters are in parts, and whose temperatures and biases are whole on every rank, in fp32."""

    def __init__(
        self,
        model: Encoders,
        optimizer: Optimizer,
        mesh: Mesh,
        data_mesh: Mesh,
        *,
        precision: str,
        row_orders: Mapping[str, Tensor],
        fused: bool,
    ) -> None:
        """
        Args:
            row_orders: for parameters whose rows are not kept in the order of checkpoints, which row of the checkpoint each one is.
        """
        super().__init__(model, optimizer, mesh.device, precision=precision, autocast=False, fused=fused)
        self._mesh, self._data_mesh = mesh, data_mesh
        self._row_orders = row_orders
        self._temperatures = temperatures(model)
        keep_apart(self._optimizer)

    def _norms(self) -> dict[str, float]:
        sum_gradients(self._temperatures, self._data_mesh)
        return norms_by_name(self._gradients(), self._mesh)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors, gathered one by one: only rank 0 keeps them, on the CPU."""
        moments = {key: (key.rpartition("/")[0], value) for key, value in self._moments().items()}
        files = {"model": {name: (name, value) for name, value in self.model.state_dict().items()}, "optimizer": moments}
        files |= {file: {name: (name, value) for name, value in tensors.items()} for file, tensors in self._average_state().items()}
        gathered = {file: {key: self._whole(*named) for key, named in tensors.items()} for file, tensors in files.items()}
        saved = {file: {key: value for key, value in tensors.items() if value is not None} for file, tensors in gathered.items()}
        saved["optimizer"] |= self._scale_state()
        return saved

    def _whole(self, name: str, value: Tensor) -> Tensor | None:
        gathered = whole(value)
        if not self._mesh.is_main:
            return None
        order = self._row_orders.get(name)
        if order is None or gathered.ndim == 0 or len(gathered) != len(order):
            return gathered.cpu()
        restored = torch.empty_like(gathered, device="cpu")
        restored[order] = gathered.cpu()
        return restored

    def _in_order(self, name: str, value: Tensor) -> Tensor:
        order = self._row_orders.get(name)
        return value if order is None or value.ndim == 0 or len(value) != len(order) else value[order]

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Each rank takes its own parts."""
        own = self.model.state_dict()
        check_fit(own, state["model"])
        with torch.no_grad():
            for name, tensor in own.items():
                self.fill(name, tensor, state["model"][name])
        self._load_optimizer(state["optimizer"])
        self._load_average(state.get("average", {}))

    def _placed(self, name: str, value: Tensor, parameter: Tensor) -> Tensor:
        if value.ndim == 0:  # the count of steps: not a part of anything
            return super()._placed(name, value, own_part(parameter))
        return part_like(self._in_order(name, value), parameter)

    def fill(self, name: str, tensor: Tensor, value: Tensor) -> None:
        """Put this rank's part of a whole tensor in its place."""
        own_part(tensor).copy_(own_part(part_like(self._in_order(name, value), tensor)))


def temperatures(model: Encoders) -> list[nn.Parameter]:
    """Logit scales and biases: a number each, which no engine may cut or round."""
    return [*model.log_scale.parameters(), *model.bias.parameters()]


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh, *, factor: float = 1.0) -> None:
    """Sum gradients over the mesh, in one piece, as the engine has summed all others in the backward pass; times a factor."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    total = mesh.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) * factor
    for gradient, summed in zip(gradients, torch.split(total, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def keep_apart(optimizer: torch.optim.Optimizer) -> None:
    """Split parameter groups until none mixes whole parameters with parts, or parts on different meshes: torch cannot step such a group."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kinds: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        groups += [{**group, "params": parameters} for parameters in kinds.values()]
    optimizer.param_groups[:] = groups
