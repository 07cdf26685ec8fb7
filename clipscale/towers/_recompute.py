"""Activation recomputation: a block keeps its input and runs again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. Trades a third more arithmetic for the memory of everything inside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """From now on these blocks keep no activations for the backward pass.

    Only `forward` is replaced: parameter names stay. Dropout draws the same numbers again.
    """
    for block in blocks:
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return recomputed
