"""DeepSpeed's ZeRO optimizers, as this package needs them: norms before the step, a factor for the gradients, whole tensors in and out.

Written for DeepSpeed 0.19.8. Only here and in deepspeed.py is DeepSpeed known; where it has a public way, that is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipscale.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, beside the count of steps."""


def start(module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, *, zero: Mapping[str, Any]) -> Any:
    """DeepSpeed's engine around a module, in fp32, for the ranks that there are."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if mesh.device.type == "cpu":  # its sums through shared memory are compiled at the first start, for minutes; gloo's serve
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": dict(zero),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


class Zero:
    """The optimizer of a DeepSpeed engine at stage 1, 2 or 3, around torch's AdamW."""

    def __init__(self, engine: Any, *, fused: bool) -> None:
        self._zero = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._adam: torch.optim.Optimizer = self._zero.optimizer
        self._whole_norm = 0.0
        for flat in self._flats():  # AdamW would make them at its first step; DeepSpeed looks for them before
            steps = torch.zeros((), device=flat.device if fused else "cpu")
            self._adam.state[flat] = {"step": steps, **{name: torch.zeros_like(flat) for name in MOMENTS}}
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self._adam.param_groups

    def norms(self) -> list[float]:
        """Of each parameter group's gradients over all ranks, after a step's last backward pass; infinite where they are no numbers."""
        squares = [0.0] * len(self.groups)
        for number, norm in self._measured():
            squares[number] += float("inf") if not math.isfinite(norm) or norm < 0 else norm**2  # DeepSpeed says -1 for what is no number
        self._whole_norm = math.sqrt(sum(squares))
        return [math.sqrt(square) for square in squares]

    def _measured(self) -> list[tuple[int, float]]:
        zero = self._zero
        if self._stage == 3:
            return [(zero.sub_group_to_group_id[number], float(norm)) for number, norm in enumerate(zero._get_norm_groups())]
        if zero.cpu_offload:
            parts = zero.params_in_partition
            return [(number, float(zero.complete_grad_norm_calculation_for_cpu_offload(parts[number]))) for number in range(len(parts))]
        return [
            (number, float(zero.get_grad_norm_direct(zero.averaged_gradients[number], parameters)))
            for number, parameters in enumerate(zero.params_in_partition)
        ]

    def scale_gradients(self, factor: float) -> None:
        """The step to come multiplies all gradients by a factor of at most 1: by DeepSpeed's clipping, which knows only their norm."""
        self._zero.clip_grad = 0.0 if factor == 1 else factor * (self._whole_norm + 1e-6)

    def discard(self) -> None:
        """Forget the gradients without a step."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self._stage == 3:
            zero._overflow_clean_up(zero.loss_scale)
        elif zero.cpu_offload:
            zero.reset_cpu_buffers()
        else:
            for number in zero.averaged_gradients:
                zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None

    # --- whole tensors -----------------------------------------------------------------------------------------

    def weight(self, parameter: Tensor, *, keep: bool) -> Tensor | None:
        """A whole weight on the CPU, where it is kept; all ranks ask together."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().to("cpu", copy=True) if keep else None

    def moment(self, parameter: Tensor, name: str, *, keep: bool) -> Tensor | None:
        """A whole moment on the CPU, where it is kept; all ranks ask together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Tensor = safe_get_full_optimizer_state(parameter, name)
        return found.view(shape(parameter)).to("cpu", copy=True) if keep else None

    @property
    def steps(self) -> float:
        """How many steps have been taken, of all parameters alike."""
        return float(self._adam.state[self._flats()[0]]["step"])

    def set_steps(self, steps: float) -> None:
        """The same after a checkpoint."""
        for flat in self._flats():
            self._adam.state[flat]["step"].fill_(steps)

    def set_weight(self, parameter: Any, value: Tensor) -> None:
        """Put a whole weight in its places on this rank: what is computed with, and what steps."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._stage < 3 or parameter.numel() == value.numel():  # at stage 3, small weights are kept whole
            parameter.data.copy_(value)
        if self._stage == 3:
            own = self._own_part(parameter, value)
            parameter.ds_tensor.data.copy_(own)
            safe_set_local_fp32_param(parameter, own)
        elif parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def set_moment(self, parameter: Any, name: str, value: Tensor) -> None:
        """Put this rank's part of a whole moment in its place."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), name)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """What this rank holds of a weight at stage 3: numbers in a row, zeros behind the end."""
        held = parameter.ds_tensor
        first = self._zero._get_param_partition_rank(parameter) * held.numel()
        own = torch.zeros(held.numel(), dtype=value.dtype)
        piece = value.flatten()[first : first + held.numel()]
        own[: len(piece)] = piece
        return own.to(held.device, held.dtype)


def shape(parameter: Any) -> torch.Size:
    """Of the whole weight."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
