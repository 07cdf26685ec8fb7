"""What engines share that keep a whole replica of the weights on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from clipscale.checkpoints import load_weights
from clipscale.engines import Stepped
from clipscale.engines._loss_scale import KEY, LossScale
from clipscale.errors import CheckpointError
from clipscale.model import Encoders, KindOutput, PreparedKinds
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh
from clipscale.parallel.parts import norms_by_name, own_part

ROUNDED: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What towers compute in, by the run's precision (under fp8, all but the layers that are float8's); None: in the weights' own."""


class Replica:
    """A whole model with its optimizer on one device."""

    def __init__(
        self,
        model: Encoders,
        optimizer: Optimizer,
        device: torch.device,
        *,
        precision: str,
        autocast: bool = True,
        fused: bool | None = None,
    ) -> None:
        """
        Args:
            autocast: round by autocast; false when the engine rounds the weights itself.
            fused: whether the optimizer may use its kernel for GPUs; None: when the device is one.
        """
        self.model = model
        self.device = device
        self._rounded = ROUNDED[precision] if autocast else None
        self._loss_scale = LossScale() if precision == "fp16" else None
        self._settings = optimizer
        fused = device.type == "cuda" if fused is None else fused
        self._optimizer = optimizer.build(model.named_parameters(), places=model.places(), fused=fused)
        self._trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average: dict[str, Tensor] | None = None

    def encode(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Embeddings of every pair kind in one graph, in the run's precision."""
        with self._autocast():
            return self._forward(kinds)

    def _forward(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        outputs: dict[str, KindOutput] = self.model(kinds)
        return outputs

    def _autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self._rounded is None else torch.autocast(self.device.type, dtype=self._rounded)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the loss."""
        self._scaled(loss).backward()  # type: ignore[no-untyped-call]

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._loss_scale is None else loss * self._loss_scale.value

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Gradients stay on this rank until the next pass outside; alone there is nothing to hold back."""
        return nullcontext()

    def step(self, *, lr: float) -> Stepped:
        """Clip, update the weights and their average, forget the gradients; a norm that is not finite changes nothing."""
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        norms = {name: norm / scale for name, norm in self._norms().items()}
        norm = math.hypot(*norms.values())
        skipped = False
        if math.isfinite(norm):
            self._shrink(scale, norm)
            self._update(lr)
        elif self._loss_scale is not None:
            skipped = self._loss_scale.overflowed()
        self._optimizer.zero_grad(set_to_none=True)
        return Stepped(norm, norms, skipped, None if self._loss_scale is None else scale)

    def _norms(self) -> dict[str, float]:
        """Norms of the gradients as they are, by part of the model."""
        return norms_by_name(self._gradients(), Mesh.single(self.device))

    def _gradients(self) -> dict[str, list[Tensor]]:
        """By tower, a projection with its tower's; temperatures and biases together."""
        gradients: dict[str, list[Tensor]] = {**{str(name): [] for name in self.model.modalities}, "temperature": []}
        for name, parameter in self._trainable.items():
            place, _, rest = name.partition(".")
            part = rest.partition(".")[0] if place in ("towers", "projections") else "temperature"
            if parameter.grad is not None:
                gradients[part].append(parameter.grad)
        return gradients

    def _shrink(self, scale: float, norm: float) -> None:
        """Take the loss scale out of the gradients, and clip them."""
        limit = self._settings.clip_norm
        factor = 1 / scale * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6)))
        gradients = [own_part(gradient) for part in self._gradients().values() for gradient in part]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _update(self, lr: float) -> None:
        decay = self._settings.average_decay
        if decay is not None and self._average is None:
            self._average = {name: parameter.detach().clone() for name, parameter in self._trainable.items()}
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.step()
        if decay is not None and self._average is not None:
            weights = [own_part(parameter.detach()) for parameter in self._trainable.values()]
            torch._foreach_lerp_([own_part(self._average[name]) for name in self._trainable], weights, 1 - decay)
        if self._loss_scale is not None:
            self._loss_scale.went_well()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """`model`: parameters and buffers by name; `optimizer`: each parameter's state as `name/field`; `average`: of what trains."""
        return {"model": dict(self.model.state_dict()), "optimizer": {**self._moments(), **self._scale_state()}, **self._average_state()}

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}/{field}": self._settings.plain(value)
            for name, parameter in self._trainable.items()
            for field, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _scale_state(self) -> dict[str, Tensor]:
        return {} if self._loss_scale is None else self._loss_scale.state()

    def _average_state(self) -> dict[str, dict[str, Tensor]]:
        if self._settings.average_decay is None:
            return {}
        return {"average": self._average or {name: parameter.detach() for name, parameter in self._trainable.items()}}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up weights, optimizer state and average by parameter name."""
        load_weights(self.model, state["model"])
        self._load_optimizer(state["optimizer"])
        self._load_average(state.get("average", {}))

    def _load_optimizer(self, moments: Mapping[str, Tensor]) -> None:
        self._optimizer.state.clear()
        if self._loss_scale is not None:
            self._loss_scale.take_up(moments)
        for key, value in moments.items():
            name, _, field = key.rpartition("/")
            if name == KEY:
                continue
            if name not in self._trainable:
                raise CheckpointError(f"the checkpoint's optimizer holds '{name}', which this model does not train")
            self._optimizer.state[self._trainable[name]][field] = self._placed(name, value, self._trainable[name])

    def _load_average(self, average: Mapping[str, Tensor]) -> None:
        if self._settings.average_decay is not None and average:
            self._average = {name: self._placed(name, average[name], parameter) for name, parameter in self._trainable.items()}

    def _placed(self, name: str, value: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002
        """A saved tensor where a parameter's optimizer state lies."""
        counts_steps = value.ndim == 0 and not self._optimizer.defaults.get("fused")
        return value.to("cpu" if counts_steps else parameter.device, copy=True)
