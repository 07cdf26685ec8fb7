"""Run: every setting of a training run; and how YAML files and overrides become one.

`clipscale train WHAT.yaml [WHERE.yaml ...] key.path=value ...`: layers are merged left to right by one rule, and
`extends: other.yaml` inside a file is the same merge. Mappings merge key by key, everything else replaces; a mapping
whose `name` changes replaces the other whole, because the old part's settings mean nothing to the new one; and an empty
mapping empties.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from clipscale.checkpoints.settings import Checkpoints
from clipscale.contrast import ContrastSettings, check_method
from clipscale.credentials import refuse_literal_secrets
from clipscale.data.images import ImageAugment
from clipscale.data.position import check_weights
from clipscale.data.sources import Source
from clipscale.data.speech import SpeechAugment
from clipscale.engines import Engine
from clipscale.errors import ConfigError
from clipscale.evaluators import Evaluator
from clipscale.guard import GuardSettings
from clipscale.inputs import Modality
from clipscale.metrics import Logging
from clipscale.objectives import Objective
from clipscale.optim import Optimizer, Schedule
from clipscale.settings import Part, Settings
from clipscale.towers import Tower
from clipscale.watch import WatchSettings
from clipscale.yaml_reading import parse_yaml

AnySettings = TypeVar("AnySettings", bound=Settings)


class Temperature(Settings):
    """The learned logit scale s = 1/temperature of one pair kind; always fp32."""

    initial_scale: float = Field(default=1 / 0.07, gt=0)
    """s at the start; CLIP's 1/0.07 (Radford et al. 2021, arXiv:2103.00020)."""
    max_scale: float = Field(default=100.0, gt=0)
    """s is held at or below this."""
    initial_bias: float | None = None
    """The learned logit bias at the start, for objectives that use one; none: the objective's own."""


class PairKind(Settings):
    """Which two modalities meet, where their pairs come from, and the loss between them."""

    modalities: tuple[Modality, Modality] = Field(strict=False)
    """First and second modality, as in `[image, text]`."""
    sources: dict[str, Source] = Field(min_length=1)
    """Data sets by a name of your own, mixed by their weights."""
    objective: Objective
    global_batch: int = Field(gt=0)
    """Pairs in one step, over all ranks."""
    bucket_batches: int = Field(default=1, gt=0)
    """Global batches whose rows are regrouped by length (seconds of speech, else bytes of caption), so that a batch needs little padding;
    1: none. 64 leave 3 to 5 % of padding where recordings are from 1 to 30 s long, and three quarters would be padding."""
    every: int = Field(default=1, gt=0)
    """Take a global batch of this kind at every n-th step."""
    loss_weight: float = Field(default=1.0, gt=0)
    """Factor of this kind's loss in the sum."""
    temperature: Temperature = Temperature()


class Augment(Settings):
    """Augmentation while training, by modality; keyed by (seed, epoch, sample), so it needs no state."""

    image: ImageAugment | None = None
    speech: SpeechAugment | None = None


class Data(Settings):
    """How a run treats its data."""

    allow_change: bool = False
    """Resume although sources, weights, lanes or buckets are not those of the checkpoint: unchanged sources go on where they stand,
    changed ones begin an epoch."""


class Run(Settings):
    """Every setting of a training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder: letters, digits, '.', '_' and '-'."""
    folder: str = "runs"
    """The run folder is `folder`/`name`."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(gt=0)
    """Optimizer steps; a step takes one global batch of every pair kind that is due."""
    embed_dim: int = Field(default=512, gt=0)
    """Width of the shared embedding space."""
    towers: dict[Modality, Tower]
    """One encoder per modality."""
    pair_kinds: dict[str, PairKind] = Field(min_length=1)
    contrast: ContrastSettings = ContrastSettings()
    engine: Engine
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    data: Data = Data()
    checkpoints: Checkpoints = Checkpoints()
    guard: GuardSettings = GuardSettings()
    watch: WatchSettings = WatchSettings()
    logging: Logging = Logging()
    evaluations: dict[str, Evaluator] = {}
    """Evaluations by a name of your own; run by `clipscale eval`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Arithmetic of the towers; loss, statistics and temperature are fp32 under all. fp16 scales the loss, and leaves out steps whose
    gradients overflow. fp8 is bf16 with the blocks' linear layers in float8, on GPUs that have it (Ada, Hopper and later)."""
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Pairs a rank encodes at a time; smaller than its share of the global batch: gradients are cached, and stay exact. `auto`: the
    most that fits, found by the first steps' memory, and remembered."""
    memory_gb: float | None = Field(default=None, gt=0)
    """With `micro_batch: auto`: what a rank may hold, GiB; none: nine tenths of its GPU. On the CPU, where it is the whole process's, it
    must be said."""
    workers: int = Field(default=4, ge=0)
    """Processes that read and decode, per rank and pair kind; 0: in the training process."""
    lanes: int | None = Field(default=None, gt=0)
    """Lanes the data order is cut into; every world size that divides it reads the same batches. None: chosen from the global batch."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of unreadable samples that ends the run; so do 100 in a row."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long a collective may wait for another rank, seconds."""

    @property
    def run_folder(self) -> Path:
        """Where everything this run writes goes."""
        return Path(self.folder) / self.name

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        mistakes = [*self._tower_mistakes(), *self._kind_mistakes()]
        if self.memory_gb is not None and self.micro_batch != "auto":
            mistakes.append("memory_gb: it is what `micro_batch: auto` may use; set that, or leave memory_gb out")
        if self.watch.hang_s is not None and self.watch.hang_s >= self.timeout_s:
            mistakes.append(
                f"watch.hang_s: {self.watch.hang_s:g} s is not less than timeout_s = {self.timeout_s:g} s, after which a collective fails "
                "without naming a rank; lower it, or raise timeout_s"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _tower_mistakes(self) -> list[str]:
        wrong = [
            f"towers.{modality}: '{_name_of(tower)}' encodes {tower.modality}, not {modality}"
            for modality, tower in self.towers.items()
            if tower.modality != modality
        ]
        used = {modality for kind in self.pair_kinds.values() for modality in kind.modalities}
        unused = [
            f"towers.{modality}: no pair kind uses it; remove it or add a pair kind" for modality in self.towers if modality not in used
        ]
        return wrong + unused

    def _kind_mistakes(self) -> list[str]:
        mistakes = []
        for name, kind in self.pair_kinds.items():
            missing = [modality for modality in kind.modalities if modality not in self.towers]
            if missing:
                mistakes.append(f"pair_kinds.{name}: no tower for {' and '.join(missing)}; towers has {', '.join(self.towers)}")
            if kind.modalities[0] == kind.modalities[1]:
                mistakes.append(f"pair_kinds.{name}: both modalities are {kind.modalities[0]}; a pair needs two different ones")
            for need, modality in (("first_guide", kind.modalities[0]), ("guide", kind.modalities[1])):
                tower = self.towers.get(modality)
                asking = [part for part in kind.objective.parts if need in part.needs]
                if asking and tower is not None and (not tower.locked or tower.unlocked_blocks):
                    mistakes.append(
                        f"pair_kinds.{name}: objective '{_name_of(asking[0])}' takes its weights from the locked {modality} tower; "
                        f"set towers.{modality}.locked: true and no unlocked_blocks"
                    )
            mistakes += [mistake for part in kind.objective.parts for mistake in _unmet(name, part)]
            mistakes += _without_weight(name, kind)
            if self.lanes is not None and kind.global_batch % self.lanes:
                mistakes.append(f"pair_kinds.{name}.global_batch: {kind.global_batch} is not a multiple of lanes = {self.lanes}")
        return mistakes

    def check_world(self, world: int) -> None:
        """Refuse a number of ranks that this run cannot be split over.

        Raises:
            ConfigError: a global batch is not a multiple of the ranks, or the lanes are not; names the nearest that fit.
        """
        self.engine.check_world(world)  # first and alone: what follows depends on how the engine divides the ranks
        self.engine.check_precision(self.precision)
        self.optimizer.check()
        mistakes = self._optimizer_mistakes(world)
        data_ranks = self.engine.data_ranks(world)
        ranks = f"{world} ranks" if data_ranks == world else f"{data_ranks} data ranks (of {world} ranks, {world // data_ranks} each)"
        for name, kind in self.pair_kinds.items():
            size = kind.global_batch
            if size % data_ranks:
                nearest = ", ".join(str(fit) for fit in (size // data_ranks * data_ranks, (size // data_ranks + 1) * data_ranks) if fit)
                mistakes.append(f"pair_kinds.{name}.global_batch {size} is not a multiple of the {ranks}; nearest that fit: {nearest}")
            try:
                check_method(self.contrast, world=data_ranks, objective=kind.objective)
            except ConfigError as error:
                mistakes.append(str(error))
        if self.lanes is not None and self.lanes % data_ranks:
            mistakes.append(f"lanes {self.lanes} is not a multiple of the {ranks}")
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))

    def _optimizer_mistakes(self, world: int) -> list[str]:
        if not self.optimizer.needs_whole_weights or self.engine.whole_weights(world):
            return []
        return [
            f"optimizer '{_name_of(self.optimizer)}' needs whole tensors, and engine '{_name_of(self.engine)}' gives each of the "
            f"{world} ranks parts of them; take an engine that keeps whole weights, or another optimizer"
        ]


def _unmet(kind: str, objective: Objective) -> list[str]:
    """What an objective asks of every pair that a run cannot give."""
    views = [view for view in objective.views if view not in ("x", "y")]
    asked = {"further views": views, "numbers": list(objective.numbers)}
    return [
        f"pair_kinds.{kind}: objective '{_name_of(objective)}' asks for {what} of every pair ({', '.join(names)}); a run's pairs have two "
        "modalities and captions: call clipscale.contrast from a trainer of your own for more"
        for what, names in asked.items()
        if names
    ]


def _without_weight(name: str, kind: PairKind) -> list[str]:
    try:
        check_weights(kind.sources)
    except ConfigError as error:
        return [f"pair_kinds.{name}.sources: {error}"]
    return []


def _name_of(part: Part) -> str:
    return str(part.model_dump()["name"])


def load_run(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Run:
    """Read, merge and check YAML files and `key.path=value` overrides.

    Raises:
        ConfigError: with every mistake found, each with its path.
    """
    return validate(Run, read_layers(files, overrides))


def read_layers(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged mapping of YAML files and overrides, not yet checked."""
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, read_yaml(Path(file)))
    for override in overrides:
        merged = merge(merged, _parse_override(override))
    return merged


def validate(settings: type[AnySettings], data: dict[str, Any]) -> AnySettings:
    """Check a mapping against a Settings class; all mistakes at once, and secrets before anything that could repeat them."""
    refuse_literal_secrets(data)
    try:
        return settings.model_validate(data)
    except ValidationError as error:
        lines = [_describe(line) for line in error.errors(include_url=False)]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(lines)) from None


def _describe(line: Any) -> str:
    path = ".".join(str(step) for step in line["loc"])
    message = line["msg"].removeprefix("Value error, ")
    found = json.dumps(line["input"], default=str)
    shown = (
        f" (found {found})"
        if not isinstance(line["input"], dict) and "no such setting" not in message and "Field required" not in message
        else ""
    )
    return f"  {path}: {message}{shown}" if path else f"  {message}"


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge_nested(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _merge_nested(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    another_part = "name" in above and above["name"] != below.get("name")
    return dict(above) if another_part or not above else merge(below, above)


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"'{text}' is neither a YAML file nor an override like optimizer.lr=1e-3")
    nested: Any = parse_yaml(value, place=f"the override '{text}'")
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return dict(nested)


def read_yaml(file: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its `extends` resolved; paths in `extends` are relative to the file.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, repeats a key or extends itself.
    """
    if file.resolve() in seen:
        raise ConfigError(f"{file}: extends itself by way of {' > '.join(str(path) for path in seen)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    data = parse_yaml(text, place=str(file))
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of settings; found {type(data).__name__}")
    parents = data.pop("extends", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        merged = merge(merged, read_yaml(file.parent / parent, seen=(*seen, file.resolve())))
    return merge(merged, data)


def to_yaml(settings: Settings) -> str:
    """Settings as YAML that reads back to the same settings."""
    return str(yaml.safe_dump(settings.model_dump(mode="json", serialize_as_any=True), sort_keys=False, allow_unicode=True, width=120))
