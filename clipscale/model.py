"""Encoders: one tower and one projection per modality, one temperature (and bias) per pair kind.

b pairs on this rank, D width of the shared embedding space, Dg width of a locked tower's features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipscale.data.images import ImageAugment, prepare_images
from clipscale.data.speech import SpeechAugment, prepare_speech
from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, Input, Modality, SpeechInput
from clipscale.optim import Place
from clipscale.towers import Tower
from clipscale.towers._feature_cache import FeatureCache
from clipscale.towers._module import TowerModule, parameters_of
from clipscale.towers._text_tower import TextTower
from clipscale.towers._transformer import widened

Prepared = dict[str, Tensor]
"""What one tower is fed: see the table in clipscale/inputs.py."""
PreparedKinds = dict[str, dict[Modality, Prepared]]
"""Pair kind -> modality -> what its tower is fed; or, for a wholly locked tower, `{FEATURES: [b, Dg]}`, what it gave before."""
FEATURES = "features"


@dataclass(frozen=True)
class PairKindModel:
    """What a pair kind adds to the model."""

    modalities: tuple[Modality, Modality]
    """The modality of x, then that of y."""
    init_scale: float = 1 / 0.07
    """The logit scale at the start; CLIP's 1/0.07 (Radford et al. 2021, arXiv:2103.00020)."""
    max_scale: float = 100.0
    """The logit scale is held at or below this."""
    init_bias: float | None = None
    """The logit bias at the start; None: no bias."""


@dataclass(frozen=True)
class KindOutput:
    """One pair kind's batch, encoded."""

    x: Tensor
    """[b, D], normalised, fp32: the first modality."""
    y: Tensor
    """[b, D], normalised, fp32: the second modality."""
    scale: Tensor
    """[1], fp32: exp of the learned logarithm."""
    features_x: Tensor | None = None
    """[b, Dg], no gradient: the features behind x when its tower is wholly locked."""
    features_y: Tensor | None = None
    """The same behind y."""
    bias: Tensor | None = None
    """[1], fp32, when the pair kind has one."""

    @property
    def guide_x(self) -> Tensor | None:
        """[b, Dg], normalised, fp32: what objectives that take their weights from a locked tower are given."""
        return None if self.features_x is None else _normalise(self.features_x)

    @property
    def guide_y(self) -> Tensor | None:
        """The same behind y."""
        return None if self.features_y is None else _normalise(self.features_y)


class Encoders(nn.Module):
    """Everything that is trained. Parameter names are the keys of checkpoints, the optimizer's too."""

    def __init__(
        self,
        modules: Mapping[Modality, TowerModule],
        *,
        embed_dim: int,
        pair_kinds: Mapping[str, PairKindModel],
        seed: int,
        cached_rows: int = 0,
    ) -> None:
        """
        Args:
            seed: Of the projections' weights.
            cached_rows: Features of so many captions are kept when the text tower is wholly locked.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.pair_kinds = dict(pair_kinds)
        self.towers = nn.ModuleDict({str(name): module for name, module in modules.items()})
        self.projections = nn.ModuleDict({name: _projection(name, module.embed_dim, embed_dim, seed) for name, module in modules.items()})
        self.log_scale = nn.ParameterDict({kind: torch.tensor([math.log(made.init_scale)]) for kind, made in pair_kinds.items()})
        biases = {kind: torch.tensor([made.init_bias]) for kind, made in pair_kinds.items() if made.init_bias is not None}
        self.bias = nn.ParameterDict(biases)
        self._cache = FeatureCache(cached_rows) if cached_rows and self._is_locked("text") else None
        self.register_load_state_dict_post_hook(lambda model, _: model._forget())  # type: ignore[no-untyped-call]

    def inputs(self) -> dict[Modality, Input]:
        """What each tower wants to be fed."""
        return {modality: self.tower(modality).input for modality in self.modalities}

    @property
    def modalities(self) -> list[Modality]:
        """The modalities this model encodes."""
        return list(self.towers)  # type: ignore[arg-type]

    def tower(self, modality: Modality) -> TowerModule:
        """The tower of a modality.

        Raises:
            RequestError: the model has none.
        """
        if modality not in self.towers:
            raise RequestError(f"the model has no {modality} tower; it encodes {', '.join(self.towers)}")
        return self.towers[modality]  # type: ignore[return-value]

    def places(self) -> dict[str, Place]:
        """Where each parameter stands, for optimizers that treat blocks apart; by parameter name."""
        places = {name: Place() for name, _ in self.named_parameters()}
        for modality in self.modalities:
            tower = self.tower(modality)
            blocks, after = tower.blocks(), {id(parameter) for part in tower.after_blocks() for parameter in parameters_of(part)}
            depths = {id(parameter): len(blocks) - number for number, block in enumerate(blocks) for parameter in block.parameters()}
            for name, parameter in tower.named_parameters():
                before = 0 if id(parameter) in after else len(blocks) + 1
                depth = depths.get(id(parameter), before)
                places[f"towers.{modality}.{name}"] = Place(from_output=depth, in_block=id(parameter) in depths)
        return places

    def features(self, modality: Modality, inputs: Prepared) -> Tensor:
        """Prepared inputs to the tower's features, before projection: [b, the tower's embed_dim]; no gradient when it is locked."""
        if FEATURES in inputs:
            return inputs[FEATURES]
        tower = self.tower(modality)
        if not self._is_locked(modality):
            return tower(inputs)  # type: ignore[no-any-return]
        with torch.no_grad():
            if modality == "text" and self._cache is not None and self.training:  # evaluations rarely repeat a caption
                return self._cache.features(tower, inputs)
            return tower(inputs)  # type: ignore[no-any-return]

    def encode(self, modality: Modality, inputs: Prepared) -> Tensor:
        """Prepared inputs to embeddings [b, D], normalised, fp32."""
        return self._project(modality, self.features(modality, inputs))

    def forward(self, kinds: PreparedKinds) -> dict[str, KindOutput]:
        """Encode a batch of every pair kind in one graph."""
        self._hold_scales()
        return {kind: self._encode_pairs(kind, batch) for kind, batch in kinds.items()}

    def _encode_pairs(self, kind: str, batch: dict[Modality, Prepared]) -> KindOutput:
        first, second = self.pair_kinds[kind].modalities
        x, y = self.features(first, batch[first]), self.features(second, batch[second])
        return KindOutput(
            x=self._project(first, x),
            y=self._project(second, y),
            scale=self.log_scale[kind].exp(),
            features_x=x if self._is_locked(first) else None,
            features_y=y if self._is_locked(second) else None,
            bias=self.bias.get(kind),
        )

    def _is_locked(self, modality: Modality) -> bool:
        return modality in self.towers and self.tower(modality).locked == "wholly"

    def _project(self, modality: Modality, features: Tensor) -> Tensor:
        return _normalise(self.projections[modality](features))

    @torch.no_grad()
    def _hold_scales(self) -> None:
        """The parameter itself is held, as in CLIP: clamping the scale would leave it without gradient beyond the limit, for good."""
        for kind, made in self.pair_kinds.items():
            self.log_scale[kind].clamp_(max=math.log(made.max_scale))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._forget()  # another device or precision
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.clear()


def _projection(modality: Modality, features: int, embed_dim: int, seed: int) -> nn.Linear:
    with _seeded(seed, f"projection of {modality}"):
        projection = nn.Linear(features, embed_dim, bias=False)
        nn.init.normal_(projection.weight, std=features**-0.5)  # as in CLIP
    return projection


def _normalise(x: Tensor) -> Tensor:
    return functional.normalize(widened(x), dim=-1)


def build_encoders(towers: Mapping[Modality, Tower], *, embed_dim: int, pair_kinds: Mapping[str, PairKindModel], seed: int) -> Encoders:
    """Build every tower, lock and recompute what its settings say, and join them.

    Each tower draws its weights from its own seed: adding a tower changes no other.

    Raises:
        RequestError: a tower cannot be built, or has fewer blocks than `unlocked_blocks`.
    """
    modules = {modality: _build_tower(modality, tower, seed) for modality, tower in towers.items()}
    text = towers.get("text")
    cached_rows = text.cached_rows if isinstance(text, TextTower) else 0
    return Encoders(modules, embed_dim=embed_dim, pair_kinds=pair_kinds, seed=seed, cached_rows=cached_rows)


def _build_tower(modality: Modality, tower: Tower, seed: int) -> TowerModule:
    with _seeded(seed, modality):
        module = tower.build()
    if tower.locked:
        module.lock(unlocked_blocks=tower.unlocked_blocks)
    module.arrange(recompute=tower.recompute, compiled=tower.compile)
    return module


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Torch's CPU generator seeded by (seed, name), and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little"))
        yield


def prepare(
    modality: Modality,
    spec: Input,
    inputs: Prepared,
    *,
    augment: ImageAugment | SpeechAugment | None = None,
    seeds: Tensor | None = None,
) -> Prepared:
    """A batch as read to what the tower is fed, on the device it lies on: augmented, normalised, log-mel.

    Args:
        augment: For training only; the random numbers are keyed by `seeds` [b].
    """
    if isinstance(spec, ImageInput):
        assert not isinstance(augment, SpeechAugment), f"{modality} is augmented by ImageAugment"
        return prepare_images(inputs["pixels"], spec, augment, seeds)
    if isinstance(spec, SpeechInput):
        assert not isinstance(augment, ImageAugment), f"{modality} is augmented by SpeechAugment"
        return prepare_speech(inputs, spec, augment, seeds)
    return inputs
