"""fp8: the linear layers inside a tower's blocks multiply in float8, forwards (e4m3) and backwards (e5m2); all else stays as in bf16.

Micikevicius et al. 2022, arXiv:2209.05433; by torchao, with one scale a tensor, found anew at each step. Weights are kept in fp32 under the
same names. Layers whose sides are no multiples of 16 stay as they are, and so does attention with packed weights, torch's own, which
open_clip's towers use: there the perceptrons alone are float8.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from clipscale.errors import ConfigError, MissingPackage
from clipscale.towers._module import TowerModule

_LEAST = (8, 9)
"""Compute capability of Ada; Hopper's is (9, 0)."""


def check_float8(towers: Iterable[TowerModule], device: torch.device) -> None:
    """Refuse fp8 where it cannot be computed, or would change nothing.

    Raises:
        ConfigError: the device has no float8, or no tower has a layer for it.
        MissingPackage: torchao is not installed.
    """
    has = "none, it is a CPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has = "" if capability >= _LEAST else f"{'.'.join(map(str, capability))} ({torch.cuda.get_device_name(device)})"
    if has:
        raise ConfigError(f"precision fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or above; this device has {has}; set bf16")
    if importlib.util.find_spec("torchao") is None:
        raise MissingPackage("precision fp8 needs the package: pip install --constraint constraints.txt 'clipscale[lowbit]'")
    if not any(_fits(layer) for tower in towers for block in tower.blocks() for layer in block.modules()):
        raise ConfigError("precision fp8 would change nothing: no block has a linear layer whose sides are multiples of 16; set bf16")


def use_float8(tower: TowerModule, *, emulate: bool = False) -> int:
    """From now on the blocks' linear layers are float8's.

    Args:
        emulate: round as float8 does, and multiply as the device can: for tests on the CPU.

    Returns:
        How many layers were changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers what torch now knows by itself
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear

    config = Float8LinearConfig(emulate=emulate)
    for block in tower.blocks():
        convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: _fits(layer))
    return sum(isinstance(layer, Float8Linear) for block in tower.blocks() for layer in block.modules())


def _fits(layer: nn.Module) -> bool:
    """A linear layer itself: the outputs of torch's attention are of a class of their own, whose weights attention reads."""
    if type(layer) is not nn.Linear:
        return False
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0
