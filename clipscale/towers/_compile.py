"""Compilation: torch.compile makes one piece of each block's operators, forwards and backwards.

Blocks of one kind share what is compiled. Shapes are compiled as they are met first; a side that changes (recordings, captions of several
lengths, an uneven last micro-batch) is compiled once more, for any size. Dropout draws the numbers that it draws without compilation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from clipscale.errors import RequestError


def compile_blocks(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """From now on these blocks run compiled; only `forward` is replaced.

    Raises:
        RequestError: there is no C++ compiler, which torch's own needs.
    """
    check_compiler()
    for block in blocks:
        block.forward = torch.compile(block.forward, options={"fallback_random": True})
    return list(blocks)


def check_compiler() -> None:
    """Refuse to compile where nothing can.

    Raises:
        RequestError: there is no C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RequestError(f"`compile: true` needs a C++ compiler, and there is none ({error}); install g++ or leave compile out") from None
