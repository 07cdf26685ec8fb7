"""Gpus: what a plan knows of one GPU, from the catalogue of the package or a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clipscale.config import read_yaml, validate
from clipscale.errors import ConfigError
from clipscale.settings import Settings, did_you_mean

CATALOGUE = Path(__file__).with_name("gpus.yaml")
ALIASES = {"a100": "a100-80", "v100": "v100-32"}


class Gpu(Settings):
    """One GPU of a node, or one rank's share of a machine without any."""

    device: Literal["cuda", "cpu"] = "cuda"
    memory_gib: float = Field(gt=0)
    """As the driver tells it, GiB."""
    tflops: dict[Literal["fp32", "bf16", "fp16"], float] = Field(min_length=1)
    """Dense matrix products by precision, 10¹² FLOPs a second. fp8 is told of the bf16 rate."""
    memory_gb_s: float = Field(gt=0)
    """Bandwidth of its memory, 10⁹ bytes a second."""
    node_gb_s: float = Field(gt=0)
    """To GPUs of the same node, one direction, 10⁹ bytes a second."""
    network_gb_s: float = Field(gt=0)
    """To other nodes, one direction, its share of the node's network, 10⁹ bytes a second."""
    dollars_per_hour: float = Field(ge=0)
    """What an hour costs."""
    usable: float = Field(default=0.9, gt=0, le=1)
    """Share of the memory that a run may fill, as `micro_batch: auto` does; the rest is for contexts, libraries and fragments."""
    products: float = Field(default=0.7, gt=0, le=1)
    """Share of `tflops` that large matrix products reach; an assumption."""
    streaming: float = Field(default=0.8, gt=0, le=1)
    """Share of `memory_gb_s` that everything else reaches; an assumption."""
    links: float = Field(default=0.75, gt=0, le=1)
    """Share of `node_gb_s` and `network_gb_s` that collectives reach; an assumption."""
    launch_us: float = Field(default=4.0, ge=0)
    """Least time of an operator, microseconds: what starting it takes; an assumption."""

    @property
    def limit_bytes(self) -> int:
        """Bytes that a rank may hold."""
        return int(self.memory_gib * self.usable * 2**30)

    def flops(self, precision: str) -> float:
        """FLOPs a second of products at most, in a run's precision.

        Raises:
            ConfigError: nobody says.
        """
        name = "bf16" if precision == "fp8" else precision
        rate = {str(known): value for known, value in self.tflops.items()}.get(name)
        if rate is None:
            raise ConfigError(
                f"this GPU has no rate for precision {precision}; it has {', '.join(self.tflops)}: set precision to one of them"
            )
        return rate * 1e12


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalogue by name, or the one that a YAML file describes.

    Raises:
        ConfigError: there is none of that name, or the file does not describe one.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return validate(Gpu, read_yaml(Path(name)))
    known = catalogue()
    entry = known.get(ALIASES.get(name.lower(), name.lower()))
    if entry is None:
        raise ConfigError(
            f"there is no GPU '{name}' in the catalogue{did_you_mean(name.lower(), known)}; known: {', '.join(known)}; or a YAML file"
        )
    return validate(Gpu, entry)


def catalogue() -> dict[str, dict[str, Any]]:
    """Every GPU of the package, by name."""
    return read_yaml(CATALOGUE)
