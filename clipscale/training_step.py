"""TrainingStep: rows of every pair kind that is due become one update of the weights.

What a step does depends only on (settings, step, rank, rows): the random state is seeded from (seed, step, rank, micro-batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipscale.config import Run
from clipscale.contrast import ContrastOutput, Pairs, contrastive_loss
from clipscale.data.sample import Batch
from clipscale.engines import Stepped, Trainable
from clipscale.errors import ContrastError, NonFiniteFeatures
from clipscale.inputs import Modality
from clipscale.memory.grad_cache import cached_backward
from clipscale.model import KindOutput, Prepared, PreparedKinds, prepare
from clipscale.parallel.mesh import Mesh
from clipscale.phases import phase

Losses = dict[str, tuple[KindOutput, ContrastOutput]]
"""What every pair kind's batch was encoded to, and its exact loss over all ranks."""


@dataclass(frozen=True)
class Taken:
    """A step, as it went."""

    losses: Losses
    """Without the pair kinds whose features were not finite."""
    stepped: Stepped
    fault: str | None
    """Why the step changed nothing, on all ranks alike; None when it counted, or fp16's scale was found too high."""


class TrainingStep:
    """Takes a run's steps on a model under its engine."""

    def __init__(self, run: Run, trainable: Trainable, mesh: Mesh, data_mesh: Mesh, *, feed: Callable[[PreparedKinds], None]) -> None:
        """
        Args:
            data_mesh: the ranks that split the global batch.
            feed: is told this rank's rows of each step, as they were read.
        """
        self.run, self.trainable, self.mesh, self.data_mesh, self._feed = run, trainable, mesh, data_mesh, feed
        self._fault: str | None = None
        self._loss_limits: Mapping[str, float] = {}

    def take(
        self, step: int, batches: Mapping[str, Batch], *, lr: float, micro_batch: int | None, loss_limits: Mapping[str, float] | None = None
    ) -> Taken:
        """One update of the weights; none where losses or gradients are not finite, or a loss is above its limit.

        Such a loss goes backward as one that is no number: gradients are none either, on any rank, and every engine drops those.

        Args:
            batches: this rank's rows of every pair kind that is due.
            micro_batch: rows encoded at a time; None: all in one graph.
            loss_limits: by pair kind, the largest loss that counts; without a limit every finite one does.

        Raises:
            ContrastError: ranks disagree about the batch.
        """
        self._fault, self._loss_limits = None, loss_limits or {}
        rows: PreparedKinds = {name: batch.rows() for name, batch in batches.items()}
        self._feed(rows)
        contrast, seed = partial(self._contrast, step, batches), partial(self.seed, step)
        if micro_batch is None:
            seed(0)
            with phase("encode"):
                outputs = self.trainable.encode(self._prepare(rows))
            with phase("contrast"):
                total, losses = contrast(outputs)
            with phase("backward"):
                self.trainable.backward(total)
        else:
            losses = cached_backward(self.trainable, rows, contrast, micro_batch=micro_batch, seed=seed, prepare=self._prepare)
        with phase("optimizer"):
            stepped = self.trainable.step(lr=lr)
        return Taken(losses, stepped, self._fault_of(stepped))

    def _fault_of(self, stepped: Stepped) -> str | None:
        """The norm is the same number on all ranks, so that they cannot disagree."""
        if math.isfinite(stepped.norm) or (stepped.skipped and self._fault is None):
            return None
        parts = ", ".join(f"{name} {norm:g}" for name, norm in stepped.norms.items())
        return self._fault or f"the gradient's norm is {stepped.norm:g} ({parts})"

    def seed(self, step: int, micro_batch: int) -> None:
        """The random state of a micro-batch: dropout and its kin depend on nothing else."""
        torch.manual_seed((self.run.seed * 1_000_003 + step) * 65_537 + self.data_mesh.rank * 4_099 + micro_batch)

    def _prepare(self, rows: PreparedKinds) -> PreparedKinds:
        """Rows as read to what the towers are fed: on the device, augmented, normalised, log-mel."""
        inputs = self.trainable.model.inputs()
        augments = {"image": self.run.augment.image, "speech": self.run.augment.speech}

        def fed(modality: Modality, tensors: Prepared) -> Prepared:
            placed = {name: tensor.to(self.mesh.device, non_blocking=True) for name, tensor in tensors.items()}
            seeds = placed.pop("seeds")
            return prepare(modality, inputs[modality], placed, augment=augments.get(modality), seeds=seeds)

        with phase("prepare"):
            return {kind: {name: fed(name, tensors) for name, tensors in modalities.items()} for kind, modalities in rows.items()}

    def _contrast(self, step: int, batches: Mapping[str, Batch], outputs: Mapping[str, KindOutput]) -> tuple[Tensor, Losses]:
        """The weighted sum of the pair kinds' exact losses, and each of them; no number where the step must not count."""
        losses: Losses = {}
        for name, output in outputs.items():
            try:
                losses[name] = (output, self._loss(step, name, output, batches[name]))
            except NonFiniteFeatures as error:  # raised by all ranks
                self._fault = f"{error}{self._samples(output, batches[name])}"
                return _everything(outputs) * math.nan, losses
        total = torch.stack([self.run.pair_kinds[name].loss_weight * loss.loss for name, (_, loss) in losses.items()]).sum()
        self._fault = self._fault_of_losses({name: float(loss.loss.detach()) for name, (_, loss) in losses.items()})
        return total if self._fault is None else total * math.nan, losses

    def _fault_of_losses(self, losses: Mapping[str, float]) -> str | None:
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"{name}: the loss is {loss:g}"
            if loss > (limit := self._loss_limits.get(name, math.inf)):
                return f"{name}: the loss is {loss:.5g}, a spike: the limit was {limit:.5g}"
        return None

    def _samples(self, output: KindOutput, batch: Batch) -> str:
        """The samples whose embeddings are not finite, of all ranks."""
        finite = torch.isfinite(output.x).all(1) & torch.isfinite(output.y).all(1)
        keys = [key for key, well, valid in zip(batch.keys, finite.tolist(), batch.valid.tolist(), strict=True) if valid and not well]
        every = [key for rank in self.data_mesh.gather_objects(keys[:3]) for key in rank]
        return f" (samples {', '.join(every[:6])})" if every else ""

    def _loss(self, step: int, name: str, output: KindOutput, batch: Batch) -> ContrastOutput:
        """The exact loss of one pair kind over the valid pairs of all ranks."""

        def valid(tensor: Tensor) -> Tensor:
            return tensor if not batch.bad else tensor[batch.valid.to(tensor.device)]

        pairs = Pairs(
            x=valid(output.x),
            y=valid(output.y),
            guide_x=None if output.guide_x is None else valid(output.guide_x),
            guide_y=None if output.guide_y is None else valid(output.guide_y),
            ids=valid(batch.caption_ids.to(self.mesh.device)),
        )
        objective = self.run.pair_kinds[name].objective
        try:
            return contrastive_loss(objective, pairs, output.scale, output.bias, settings=self.run.contrast, mesh=self.data_mesh)
        except NonFiniteFeatures as error:
            raise NonFiniteFeatures(f"{name}: {error}") from error
        except ContrastError as error:
            raise ContrastError(f"step {step}, {name}: {error}; the last checkpoint is from before") from error


def _everything(outputs: Mapping[str, KindOutput]) -> Tensor:
    """A number that depends on every embedding and temperature: no engine may wait for a gradient that does not come."""
    parts = [part.float().sum() for output in outputs.values() for part in (output.x, output.y, output.scale)]
    return torch.stack([*parts, *(output.bias.float().sum() for output in outputs.values() if output.bias is not None)]).sum()
