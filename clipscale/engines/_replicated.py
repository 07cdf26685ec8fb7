"""What engines share that keep a whole replica of the weights on every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clipscale.checkpoint import load_weights
from clipscale.errors import CheckpointError
from clipscale.model import Encoders, KindOutput, PreparedKinds
from clipscale.optim import Optimizer


class Replica:
    """A whole model with its optimizer on one device."""

    def __init__(self, model: Encoders, optimizer: Optimizer, device: torch.device, *, precision: str, fused: bool | None = None) -> None:
        self.model = model
        self.device = device
        self._precision = precision
        self._clip_norm = optimizer.clip_norm
        self._optimizer = optimizer.build(model.named_parameters(), fused=device.type == "cuda" if fused is None else fused)
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def encode(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Embeddings of every pair kind in one graph, in the run's precision."""
        with self._autocast():
            return self._forward(kinds)

    def _forward(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        outputs: dict[str, KindOutput] = self.model(kinds)
        return outputs

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Gradients stay on this rank until the next pass outside; alone there is nothing to hold back."""
        return nullcontext()

    def step(self, *, lr: float) -> float:
        """Clip, update the weights, forget the gradients; a norm that is not finite changes nothing."""
        norm = self._clip()
        if norm < float("inf"):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> float:
        """Scale gradients down to the limit, if there is one; their global norm before that."""
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        return float(nn.utils.clip_grad_norm_(self._trainable, limit))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """`model`: parameters and buffers by name; `optimizer`: each parameter's state as `name/field`."""
        optimizer = {
            f"{name}/{field}": value
            for name, parameter in self.model.named_parameters()
            for field, value in self._optimizer.state.get(parameter, {}).items()
        }
        return {"model": dict(self.model.state_dict()), "optimizer": optimizer}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up weights and optimizer state by parameter name."""
        load_weights(self.model, state["model"])
        parameters = dict(self.model.named_parameters())
        self._optimizer.state.clear()
        for key, value in state["optimizer"].items():
            name, _, field = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"the checkpoint's optimizer holds '{name}', which this model does not have")
            parameter = parameters[name]
            place = torch.device("cpu") if value.ndim == 0 and not self._fused() else parameter.device
            self._optimizer.state[parameter][field] = value.to(place, copy=True)

    def _fused(self) -> bool:
        return bool(self._optimizer.defaults.get("fused"))
