"""Manifests: JSON lines that `clipscale-shards build` reads, and numbers drawn from names rather than by chance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One sample: media paths relative to the manifest, `captions`, and whatever else its record should keep."""


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """One line a row, keys in the order given."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
