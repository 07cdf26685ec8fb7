"""Files of a checkpoint: written once from start to end, and summed from memory while they are.

A safetensors file is its header's length in 8 bytes, a JSON header, and the tensors' bytes. The order of tensors and the header's form are
those of the safetensors library, so that both write the same bytes (tests/unit/test_checkpoints.py). Files are 0644 and folders
0755, less the umask: nobody else may write them, whatever the umask is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipscale.errors import CheckpointError

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls torch's types, in the order in which it lays tensors down: larger items first keep all of them aligned."""
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
_PIECE = 64 << 20
"""Bytes that are handed to the system at a time."""


@dataclass(frozen=True)
class Written:
    """A file that is on disk."""

    bytes: int
    sha256: str


def make_folder(path: Path) -> None:
    """A new folder; those above it must be there.

    Raises:
        OSError: it cannot be made.
    """
    os.mkdir(path, mode=0o755)  # noqa: PTH102  (Path.mkdir's default would be open to all under umask 0)


def write_file(path: Path, pieces: Sequence[bytes | memoryview]) -> Written:
    """Write a new file of these pieces, synchronise it with the disk, and sum it at the same time in a thread of its own.

    Raises:
        OSError: it cannot be written, or was there before.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as beside:
        summed = beside.submit(_sha256_of, pieces)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for piece in pieces:
                _write_all(descriptor, memoryview(piece))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return Written(sum(len(piece) for piece in pieces), summed.result())


def _write_all(descriptor: int, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        done += os.write(descriptor, piece[done : done + _PIECE])


def _sha256_of(pieces: Sequence[bytes | memoryview]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def sha256(path: Path) -> str:
    """Of a file on disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synchronise_folder(path: Path) -> None:
    """Make what was created and renamed in a folder last.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, in order; the tensors' own memory where they lie on the CPU in one piece.

    Raises:
        CheckpointError: a tensor is of a type that the format does not hold.
    """
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if strange:
        raise CheckpointError(f"a checkpoint cannot hold tensors of these types: {', '.join(strange[:4])}")
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0].encode()))
    header, offset = {}, 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(_bytes_of(tensor) for _, tensor in ordered if tensor.numel())]


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return view
