"""TrainingStep: rows of every pair kind that is due become one update of the weights.

What a step does depends only on (settings, step, rank, rows): the random state is seeded from (seed, step, rank, micro-batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from clipscale.config import Run
from clipscale.contrast import ContrastOutput, Pairs, contrastive_loss
from clipscale.data.sample import Batch
from clipscale.engines import Stepped, Trainable
from clipscale.errors import ContrastError, NonFiniteLoss
from clipscale.inputs import Modality
from clipscale.memory.grad_cache import cached_backward
from clipscale.model import KindOutput, Prepared, PreparedKinds, prepare
from clipscale.parallel.mesh import Mesh
from clipscale.phases import phase

Losses = dict[str, tuple[KindOutput, ContrastOutput]]
"""What every pair kind's batch was encoded to, and its exact loss over all ranks."""


class TrainingStep:
    """Takes a run's steps on a model under its engine."""

    def __init__(self, run: Run, trainable: Trainable, mesh: Mesh, data_mesh: Mesh, *, feed: Callable[[PreparedKinds], None]) -> None:
        """
        Args:
            data_mesh: the ranks that split the global batch.
            feed: is told this rank's rows of each step, as they were read.
        """
        self.run, self.trainable, self.mesh, self.data_mesh, self._feed = run, trainable, mesh, data_mesh, feed

    def take(self, step: int, batches: Mapping[str, Batch], *, lr: float, micro_batch: int | None) -> tuple[Losses, Stepped]:
        """One update of the weights.

        Args:
            batches: this rank's rows of every pair kind that is due.
            micro_batch: rows encoded at a time; None: all in one graph.

        Raises:
            NonFiniteLoss: the loss or the gradients are no numbers; the weights are as they were.
            ContrastError: ranks disagree about the batch, or its features are unusable.
        """
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
        if not (math.isfinite(stepped.norm) or stepped.skipped):
            raise NonFiniteLoss(
                f"the gradient's norm is {stepped.norm} at step {step}; the weights were not changed: lower the learning rate"
            )
        return losses, stepped

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
        """The weighted sum of the pair kinds' exact losses, and each of them."""
        losses = {name: (output, self._loss(step, name, output, batches[name])) for name, output in outputs.items()}
        total = torch.stack([self.run.pair_kinds[name].loss_weight * loss.loss for name, (_, loss) in losses.items()]).sum()
        if not math.isfinite(float(total.detach())):
            raise NonFiniteLoss(
                f"the loss is {float(total.detach())} at step {step}; the last checkpoint is from before: lower the learning rate"
            )
        return total, losses

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
        except ContrastError as error:
            raise ContrastError(f"step {step}, {name}: {error}; the last checkpoint is from before") from error
