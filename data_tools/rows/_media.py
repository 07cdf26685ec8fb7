"""Which file names are images and recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"})
SPEECH_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf", ".m4a", ".aac", ".wma", ".amr"}
)
"""Formats that cannot be decoded are among them (.heic, .m4a): such a file is a row that fails, not one that goes unnoticed."""


def is_image(name: Any) -> bool:
    """Whether this is a text that ends as the names of images do."""
    return isinstance(name, str) and _suffix(name) in IMAGE_SUFFIXES


def is_speech(name: Any) -> bool:
    """Whether this is a text that ends as the names of recordings do."""
    return isinstance(name, str) and _suffix(name) in SPEECH_SUFFIXES


def _suffix(name: str) -> str:
    _, dot, end = name.rpartition(".")
    return (dot + end).strip().lower() if dot else ""


def locate(name: str, folder: Path) -> Path:
    """The file that a manifest calls `name`: as it stands when absolute, else below `folder`."""
    return folder / Path(name.strip().replace("\\", "/"))
