"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) are cut over the ranks.

Rajbhandari et al. 2020, arXiv:1910.02054. DeepSpeed holds towers and projections in fp32, and they run under autocast as in ddp;
temperatures stay ours, as under fsdp2. Gradients of several passes are added up on each rank, and travel once a step.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipscale.checkpoints import check_fit
from clipscale.engines import Engine, Stepped, Trainable
from clipscale.engines._footprint import Collective, Footprint, StepShape, bytes_of
from clipscale.engines._loss_scale import KEY, LossScale
from clipscale.engines._replicated import ROUNDED
from clipscale.engines._sharded import sum_gradients, temperatures
from clipscale.engines._zero import MOMENTS, Zero, shape, start
from clipscale.errors import CheckpointError, ConfigError, MissingPackage
from clipscale.model import Encoders, KindOutput, PreparedKinds
from clipscale.optim import Optimizer
from clipscale.parallel.mesh import Mesh


class Deepspeed(Engine):
    """Train under DeepSpeed, which is configured from the run's settings."""

    stage: Literal[1, 2, 3] = 2
    """What is cut over the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep optimizer state in the CPU's memory, and step there."""
    bucket_numbers: int = Field(default=100_000_000, gt=0)
    """Gradients are exchanged in buckets of so many numbers."""

    def check_world(self, world: int) -> None:
        """Several ranks, and DeepSpeed itself."""
        if world == 1:
            raise ConfigError("engine 'deepspeed' cuts over ranks, and there is 1; set engine: local")
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingPackage("engine 'deepspeed' needs the package: pip install --constraint constraints.txt 'clipscale[deepspeed]'")

    def check_precision(self, precision: str) -> None:
        """No float8."""
        if precision == "fp8":
            raise ConfigError("engine 'deepspeed' trains in fp32, bf16 and fp16; for fp8 take engine fsdp2 or ddp")

    def whole_weights(self, world: int) -> bool:  # noqa: ARG002
        """Pieces of flat groups of them."""
        return False

    def check_model(self, model: Encoders, *, optimizer: Optimizer, steps_differ: bool) -> None:
        """ZeRO steps flat pieces of all weights at once: nothing may look at single weights, or leave some out."""
        mistakes = []
        if not optimizer.adam_state:
            name = optimizer.model_dump()["name"]
            mistakes.append(f"optimizer '{name}' looks at whole weights, and ZeRO steps pieces of them; use adamw")
        if optimizer.average_decay is not None:
            mistakes.append("it keeps no average of the weights; leave out optimizer.average_decay")
        compiled = [modality for modality in model.modalities if model.tower(modality).compiled]
        if compiled and self.stage == 3:
            mistakes.append(f"stage 3 gathers weights inside blocks, which {' and '.join(compiled)} compiles; set compile: false")
        if steps_differ:
            mistakes.append("every step is a step of every weight, and with `every` above 1 some steps leave out a tower; set every: 1")
        if mistakes:
            raise ConfigError("engine 'deepspeed' cannot train this: " + "; ".join(mistakes) + "; or use engine fsdp2")

    def footprint(self, model: Encoders, step: StepShape) -> Footprint:
        """Whole weights; state, and from stage 2 gradients, in parts."""
        if self.stage == 3:
            raise ConfigError(
                "what stage 3 gathers depends on what DeepSpeed finds while it runs; plan with engine fsdp2, which cuts as much"
            )
        return _footprint(self, model, step)

    def wrap(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, steps_differ: bool) -> Trainable:  # noqa: ARG002
        """The model on the device, its towers and projections under DeepSpeed."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": mesh.device.type == "cuda",
            "reduce_bucket_size": self.bucket_numbers,
        }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
        fused = mesh.device.type == "cuda" and not self.offload_optimizer
        return _UnderDeepSpeed(model.to(mesh.device), optimizer, mesh, precision=precision, zero=zero, fused=fused)


def _footprint(engine: Deepspeed, model: Encoders, step: StepShape) -> Footprint:
    world = step.world
    named = dict(_Weights(model).named_parameters())
    made = step.optimizer.build(named.items(), places=model.places(), fused=False)
    _split_by_part(made, named)
    groups = [sum(parameter.numel() for parameter in group["params"]) for group in made.param_groups]
    padded = sum(math.ceil(numbers / (2 * world)) * 2 * world for numbers in groups)  # parts begin at even numbers
    whole, own = 4 * sum(groups), temperatures(model)
    bucket = {"buckets": min(4 * engine.bucket_numbers, whole)} if engine.stage == 2 and step.parts == 1 else {"whole gradients": whole}
    state = 0 if engine.offload_optimizer else 1
    return Footprint(
        weights=bytes_of((*model.parameters(), *model.buffers())),
        gradients=4 * padded // world * state + bytes_of(own),
        state_share=state / world,
        gradients_exist=True,
        while_towers_run=bucket,
        always={"weights that are stepped": 4 * padded // world * state},
        collectives=[
            Collective("gradients", "all_reduce", whole, world),
            Collective("weights", "all_gather", 4 * padded, world, hidden=False),
            Collective("temperatures", "all_reduce", bytes_of(own), world, hidden=False),
            Collective("norms", "all_reduce", 2 * 4 * len(groups), world, hidden=False),
        ],
    )


class _Weights(nn.Module):
    """What DeepSpeed is given: all of the model but its temperatures and biases, under the same names."""

    def __init__(self, model: Encoders) -> None:
        super().__init__()
        self.towers, self.projections = model.towers, model.projections
        self._model = (model,)  # in a tuple it is no submodule
        self.outputs: dict[str, KindOutput] = {}

    def forward(self, kinds: PreparedKinds) -> dict[str, dict[str, Tensor]]:
        """The embeddings alone, in containers that DeepSpeed looks into; the rest of the outputs is left in `outputs`."""
        self.outputs = self._model[0](kinds)
        return {kind: {"x": output.x, "y": output.y} for kind, output in self.outputs.items()}


class _UnderDeepSpeed:
    """A model whose towers and projections DeepSpeed trains."""

    def __init__(self, model: Encoders, optimizer: Optimizer, mesh: Mesh, *, precision: str, zero: dict[str, Any], fused: bool) -> None:
        self.model = model
        self._mesh, self._settings = mesh, optimizer
        self._rounded = ROUNDED[precision]
        self._loss_scale = LossScale() if precision == "fp16" else None
        self._weights = _Weights(model)
        self._temperatures = temperatures(model)
        self._names = dict(self._weights.named_parameters())
        self._own_names = {name: parameter for name, parameter in model.named_parameters() if name not in self._names}
        places = model.places()
        self._own = optimizer.build(self._own_names.items(), places=places, fused=fused)
        theirs = optimizer.build(self._names.items(), places=places, fused=fused)
        _split_by_part(theirs, self._names)
        self._engine = start(self._weights, theirs, mesh, zero=zero)
        self._zero = Zero(self._engine, fused=fused)
        self._held: ExitStack | None = None
        self._more_to_come = False

    # --- a step ------------------------------------------------------------------------------------------------

    def encode(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Embeddings of every pair kind in one graph, in the run's precision."""
        with nullcontext() if self._rounded is None else torch.autocast(self._mesh.device.type, dtype=self._rounded):
            embeddings = self._engine(kinds)
        outputs, self._weights.outputs = self._weights.outputs, {}
        return {kind: replace(output, **embeddings[kind]) for kind, output in outputs.items()}

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Gradients are added up on this rank, and travel with those of the next pass outside."""
        return self._adding_up()

    @contextmanager
    def _adding_up(self) -> Iterator[None]:
        if self._held is None:
            self._held = ExitStack()
            self._held.enter_context(self._engine.coalesce_grad_reduction())
        self._more_to_come = True
        try:
            yield
        finally:
            self._more_to_come = False

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        self._engine.backward(loss * (self._scale * self._mesh.world), scale_wrt_gas=False)  # DeepSpeed averages over ranks
        if self._held is not None and not self._more_to_come:
            self._held.close()  # now they travel
            self._held = None

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def step(self, *, lr: float) -> Stepped:
        """Clip, update the weights, forget the gradients; a norm that is not finite changes nothing."""
        scale = self._scale
        norms = {part: norm / scale for part, norm in self._norms().items()}
        norm = math.hypot(*norms.values())
        skipped = False
        if math.isfinite(norm):
            limit = self._settings.clip_norm
            self._update(lr, factor=1 / scale * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6))))
        else:
            self._zero.discard()
            skipped = self._loss_scale is not None and self._loss_scale.overflowed()
        self._own.zero_grad(set_to_none=True)
        return Stepped(norm, norms, skipped, None if self._loss_scale is None else scale)

    def _norms(self) -> dict[str, float]:
        sum_gradients(self._temperatures, self._mesh, factor=1 / self._mesh.world)
        squares: dict[str, float] = {}
        for group, norm in zip(self._zero.groups, self._zero.norms(), strict=True):
            squares[group["part"]] = squares.get(group["part"], 0.0) + norm**2
        own = [float(parameter.grad.double().square().sum()) for parameter in self._temperatures if parameter.grad is not None]
        return {part: math.sqrt(square) for part, square in {**squares, "temperature": math.fsum(own)}.items()}

    def _update(self, lr: float, *, factor: float) -> None:
        self._zero.scale_gradients(factor)
        for parameter in self._temperatures:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        for group in (*self._zero.groups, *self._own.param_groups):
            group["lr"] = lr * group["lr_factor"]
        self._engine.step()
        self._own.step()
        if self._loss_scale is not None:
            self._loss_scale.went_well()

    # --- whole tensors -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors, gathered one by one: only rank 0 keeps them, on the CPU."""
        keep = self._mesh.is_main
        model = {name: value for name, value in self.model.state_dict().items() if name not in self._names}
        optimizer = {
            f"{name}/{field}": value
            for name, parameter in self._own_names.items()
            for field, value in self._own.state.get(parameter, {}).items()
        }
        for name, parameter in self._names.items():
            model[name] = self._zero.weight(parameter, keep=keep)
            if parameter.requires_grad:
                optimizer |= {f"{name}/{field}": self._zero.moment(parameter, field, keep=keep) for field in MOMENTS}
                optimizer[f"{name}/step"] = torch.tensor(self._zero.steps)
        if self._loss_scale is not None:
            optimizer |= self._loss_scale.state()
        return {"model": model, "optimizer": optimizer} if keep else {"model": {}, "optimizer": {}}

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Each rank takes its own parts."""
        own = self.model.state_dict()
        check_fit(own | {name: torch.empty(shape(parameter), device="meta") for name, parameter in self._names.items()}, state["model"])
        steps = self._check_moments(state["optimizer"])
        with torch.no_grad():
            for name, value in state["model"].items():
                if name in self._names:
                    self._zero.set_weight(self._names[name], value)
                else:
                    own[name].copy_(value)
        for name, parameter in self._names.items():
            for field in MOMENTS if parameter.requires_grad else ():
                saved = state["optimizer"].get(f"{name}/{field}")
                self._zero.set_moment(parameter, field, torch.zeros(shape(parameter)) if saved is None else saved)
        self._zero.set_steps(steps)
        self._load_own(state["optimizer"])

    def _check_moments(self, moments: dict[str, Tensor]) -> float:
        """The count of steps that all weights must share."""
        trained = {f"{name}/{field}" for name, parameter in self._names.items() if parameter.requires_grad for field in (*MOMENTS, "step")}
        others = [key for key in moments if key not in trained and key.rpartition("/")[0] not in (*self._own_names, KEY)]
        if others:
            raise CheckpointError(f"the checkpoint's optimizer holds '{others[0]}', which adamw under deepspeed does not have")
        steps = {float(moments.get(key, torch.zeros(()))) for key in trained if key.endswith("/step")}
        if len(steps) > 1:
            raise CheckpointError(
                f"the checkpoint's weights have taken different numbers of steps ({', '.join(f'{count:g}' for count in sorted(steps))}), "
                "and under deepspeed all take the same; go on with engine ddp or fsdp2"
            )
        return steps.pop() if steps else 0.0

    def _load_own(self, moments: dict[str, Tensor]) -> None:
        self._own.state.clear()
        if self._loss_scale is not None:
            self._loss_scale.take_up(moments)
        for key, value in moments.items():
            name, _, field = key.rpartition("/")
            if name in self._own_names:
                parameter = self._own_names[name]
                place = parameter.device if value.ndim or self._own.defaults.get("fused") else "cpu"
                self._own.state[parameter][field] = value.to(place, copy=True)


def _split_by_part(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> None:
    """Groups of one tower and its projection each, named by `part`: what norms are told of."""
    parts = {id(parameter): name.split(".")[1] for name, parameter in names.items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[Tensor]] = {}
        for parameter in group["params"]:
            by_part.setdefault(parts[id(parameter)], []).append(parameter)
        groups += [{**group, "part": part, "params": parameters} for part, parameters in by_part.items()]
    optimizer.param_groups[:] = groups
