"""Checkpoints: folders that are whole or not there.

```text
checkpoints/step-00000300/
  model.safetensors       weights, by parameter name
  optimizer.safetensors   optimizer state, as `parameter name/field`
  average.safetensors     the weights' moving average, when one is kept
  state.json              step, seed, ranks, loss, bad samples so far, and where each pair kind stands in its data (data/position.py)
  config.yaml             the run's resolved settings
  manifest.json           bytes and sha256 of every file above
```
A checkpoint is written beside its final name, fsynced, and renamed when whole; the newest one is found by looking and
checking sums, not by a pointer that can lie. Nothing is unpickled. The random state needs no file: every step seeds its
generators from (seed, step, rank).
"""

from __future__ import annotations

from clipscale.checkpoints.fit import check_fit, load_weights
from clipscale.checkpoints.keeper import Keeper
from clipscale.checkpoints.opening import Opening, is_remote
from clipscale.checkpoints.reading import Checkpoint, find_newest, list_checkpoints, load, verify
from clipscale.checkpoints.retention import bytes_of
from clipscale.checkpoints.settings import Checkpoints
from clipscale.checkpoints.snapshot import expected_bytes
from clipscale.checkpoints.store import CheckpointStore, check_store
from clipscale.checkpoints.writing import save

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Checkpoints",
    "Keeper",
    "Opening",
    "bytes_of",
    "check_fit",
    "check_store",
    "expected_bytes",
    "find_newest",
    "is_remote",
    "list_checkpoints",
    "load",
    "load_weights",
    "save",
    "verify",
]
