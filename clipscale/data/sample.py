"""Sample and batch: one stored pair, and what a rank trains on.

b samples in a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clipscale.errors import ShardError

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.inputs import Modality

MAX_RECORD_BYTES = 1 << 20
"""Longest caption or JSON member that is read."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as stored: media still encoded."""

    key: str
    image: bytes | None
    """jpg, png or webp."""
    speech: bytes | None
    """flac or wav."""
    captions: list[str]
    """At least one; never empty."""
    record: dict[str, Any]
    """The sample's JSON member: label, intent, slots, speaker, transcript, ...; empty when it has none."""


def parse_sample(key: str, *, image: bytes | None, speech: bytes | None, text: bytes | None, record: bytes | None) -> Sample:
    """A sample from its members; captions are the record's `captions`, else the `.txt` member.

    Raises:
        ShardError: no caption, a member that is not UTF-8 or not JSON, or one that is far too long.
    """
    fields = _parse_record(key, record) if record is not None else {}
    captions = fields.get("captions")
    if captions is None:
        captions = [_parse_text(key, text)] if text is not None else _single_captions(fields)
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ShardError(f"sample '{key}' has no usable caption: neither a .txt nor a list of texts under 'captions' in its .json")
    return Sample(key, image, speech, captions, fields)


def _single_captions(fields: dict[str, Any]) -> object:
    """The caption that a record of others holds under one of the usual names: a text, or a list of texts."""
    found: object = next((fields[name] for name in ("caption", "text", "transcript") if fields.get(name)), [])
    return [found] if isinstance(found, str) else found


def _parse_text(key: str, text: bytes) -> str:
    if len(text) > MAX_RECORD_BYTES:
        raise ShardError(f"sample '{key}': its .txt has {len(text)} bytes; at most {MAX_RECORD_BYTES} are read")
    try:
        return text.decode("utf-8-sig")  # some editors begin texts with a byte order mark
    except UnicodeDecodeError as error:
        raise ShardError(f"sample '{key}': its .txt is not UTF-8 ({error})") from error


def _parse_record(key: str, record: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(_parse_text(key, record))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ShardError(f"sample '{key}': its .json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise ShardError(f"sample '{key}': its .json holds a {type(fields).__name__}, not an object")
    return fields


def caption_id(caption: str) -> int:
    """A caption's identity: 63 bits of its hash, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(caption.encode("utf-8"), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be read or decoded; its slot in the batch has `valid=False`."""

    key: str
    source: str
    reason: str
    where: str = ""
    """Shard, and place in it."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global batch, of one pair kind."""

    kind: str
    inputs: dict[Modality, dict[str, Tensor]]
    """Per modality as in clipscale/inputs.py; rows of bad samples are zeros."""
    captions: list[str]
    caption_ids: Tensor
    """int64 [b]: the same caption has the same number everywhere."""
    keys: list[str]
    seeds: Tensor
    """int64 [b]: keys of the augmentation's random numbers, from (seed, source, epoch, sample)."""
    valid: Tensor
    """bool [b]: False where a sample could not be read."""
    bad: list[BadSample] = field(default_factory=list)
    filled: dict[Modality, tuple[int, int]] = field(default_factory=dict)
    """Of speech and text: places that hold something, and all places, padding included."""
    reading: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each source's rows of this batch took: `rows`, `seconds` of reading and decoding, and the source's own counters."""

    finished: dict[str, list[int]] = field(default_factory=dict)
    """Of un-indexed sources: shards that were gone through with this batch (streamed.py)."""

    def rows(self) -> dict[Modality, dict[str, Tensor]]:
        """The inputs of each modality with the rows' `seeds`: what a micro-batch is cut from."""
        return {modality: {**tensors, "seeds": self.seeds} for modality, tensors in self.inputs.items()}

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where rows go to a GPU while it computes; torch's DataLoader calls this."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {modality: {name: change(tensor) for name, tensor in tensors.items()} for modality, tensors in self.inputs.items()}
        return replace(self, inputs=inputs, caption_ids=change(self.caption_ids), seeds=change(self.seeds), valid=change(self.valid))
