"""The tables beside the tars: columns of a shard's sidecar and of a data set's index.parquet."""

from __future__ import annotations

import re

import pyarrow
import pyarrow.parquet

SIDECAR = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("offset", pyarrow.int64()),  # of the sample's first tar header
        ("bytes", pyarrow.int64()),  # of all its members, headers and padding included
        ("crc32", pyarrow.uint32()),  # of those bytes
        *[
            (f"{member}_{what}", kind)  # 0 bytes: the sample has no such member
            for member in ("image", "speech", "text", "record")
            for what, kind in (("offset", pyarrow.int64()), ("bytes", pyarrow.int64()))
        ],
        ("image_suffix", pyarrow.string()),
        ("speech_suffix", pyarrow.string()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("frames", pyarrow.int64()),
        ("sample_rate", pyarrow.int32()),
        ("captions", pyarrow.int32()),
        ("sha256", pyarrow.binary(32)),  # of the media: image, then speech
        ("status", pyarrow.string()),  # "ok", or why the sample is left out
    ]
)

INDEX = pyarrow.schema(
    [
        ("shard", pyarrow.string()),  # "000000": the name without .tar
        ("samples", pyarrow.int64()),
        ("tar_bytes", pyarrow.int64()),
        ("sha256", pyarrow.binary(32)),  # of the tar
        ("sidecar_sha256", pyarrow.binary(32)),
        ("images", pyarrow.int64()),
        ("recordings", pyarrow.int64()),
        ("captions", pyarrow.int64()),
        ("seconds", pyarrow.float64()),  # of all recordings
    ]
)

KEY = re.compile(r"[0-9A-Za-z_-]{1,80}")
"""What keys and shard names of ours may be: no dot (webdataset cuts keys at the first) and no slash."""

SHARD_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._=+-]{0,199}")
"""What a tar of others may be called, without .tar: nothing that leads out of its folder, or that addresses give a meaning."""


def read_parquet(data: bytes, columns: list[str] | None = None) -> pyarrow.Table:
    """A parquet file's table, read on this thread alone.

    Arrow's own threads may still hold the bytes when the interpreter ends; where torch is loaded too, half of all processes then
    died with "terminate called without an active exception" after their work was done.
    """
    with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), pre_buffer=False) as file:
        return file.read(columns=columns, use_threads=False)
