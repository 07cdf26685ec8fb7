"""Which file names are images, recordings and tars."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from clipscale.errors import DataError

_HEAD = 2_000  # files looked at before guessing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"})
SPEECH_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf", ".m4a", ".aac", ".wma", ".amr"}
)
"""Formats that cannot be decoded are among them (.heic, .m4a): such a file is a row that fails, not one that goes unnoticed."""


def file_suffix(name: str) -> str:
    """How the name of a file, or the path of an address, ends: `.jpg`; in small letters."""
    _, dot, end = re.split(r"[?#]", name, maxsplit=1)[0].rpartition(".") if "://" in name[:8] else name.rpartition(".")
    return (dot + end).strip().lower() if dot else ""


def is_image(name: Any) -> bool:
    """Whether this is a text that ends as the names of images do."""
    return isinstance(name, str) and file_suffix(name) in IMAGE_SUFFIXES


def is_speech(name: Any) -> bool:
    """Whether this is a text that ends as the names of recordings do."""
    return isinstance(name, str) and file_suffix(name) in SPEECH_SUFFIXES


def is_tar(name: str) -> bool:
    """Whether this is the name of a tar that is not compressed."""
    return file_suffix(name) == ".tar"


def holds_tars(folder: Path) -> bool:
    """Whether there are tars in the folder, or in folders in there, and no loose images or recordings; from its first files."""
    head = list(islice((name for _, names in walk_visible(folder) for name in names), _HEAD))
    return any(map(is_tar, head)) and not any(is_image(name) or is_speech(name) for name in head)


def visible_files(root: Path) -> Iterator[Path]:
    """Every file in the folder and in folders in there, as `walk_visible`."""
    return (folder / name for folder, names in walk_visible(root) for name in names)


def walk_visible(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder and those in there, each with its files, in the order of names; hidden ones are left out.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"input {root}: cannot be listed: {error}")

    for place, folders, names in os.walk(root, onerror=refuse, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(name for name in names if not name.startswith("."))


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, without hidden ones, in the order of names.

    Raises:
        DataError: it is no folder, or cannot be listed.
    """
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"input {root}: cannot be listed: {error}") from error


def locate(name: str, folder: Path) -> Path:
    """The file that a manifest calls `name`: as it stands when absolute, else below `folder`."""
    return Path(os.path.join(folder, name.strip().replace("\\", "/")))  # noqa: PTH118 (half the time of folder / name, for millions of names)
