"""COCO: a json file with `images` and `annotations`, several captions an image.

The images lie in the folder named like the file (captions_val2017.json: val2017), beside it or beside its folder, unless said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._json_stream import member_items
from data_tools.rows._media import locate
from data_tools.rows._text import open_text
from data_tools.rows._texts_by_id import TextsById

_HEAD_BYTES = 1 << 20
_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "caption"), "licenses": ()}


class Coco(Rows):
    """Captions in COCO's format; an image without captions is left out."""

    media_folder: Path | None = None
    """Folder of the images."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_file() or path.suffix.lower() != ".json":
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return head.lstrip().startswith(b"{") and (b'"images"' in head or b'"annotations"' in head) and b'"sentids"' not in head

    def guesses(self) -> list[str]:
        images = described = captions = 0
        with self._captions({}) as of:
            for _, image in self._items("images"):
                number = of.count(_identity(image["id"]))
                images, described, captions = images + 1, described + bool(number), captions + number
        if not described:
            raise DataError(f"input {self.input}: no COCO file with captions; of its {images} 'images' none has a caption in 'annotations'")
        return [f"images: {described:,} with captions, of {images:,}", f"captions: {captions:,}", f"files: in {self._media_folder()}"]

    def read(self) -> Iterator[Row]:
        folder, licences = self._media_folder(), dict[str | int, Any]()
        with self._captions(licences) as of:
            for _, image in self._items("images"):
                captions, name = of.texts(_identity(image["id"])), str(image["file_name"])
                if captions:
                    image = {**image, "file_name": name, "license_name": licences.get(_identity(image.get("license")))}
                    kept = {field: image[field] for field in ("license_name", "coco_url", "flickr_url") if image.get(field)}
                    yield Row(name, locate(name, folder), None, captions, {"image_id": image["id"], **kept})

    @contextmanager
    def _captions(self, licences: dict[str | int, Any]) -> Iterator[TextsById]:
        """The captions, by image id; they lie on the disk, as annotations may come in any order. Names of licences are noted by the way."""
        with TextsById() as of:
            of.add(self._described(licences))
            yield of

    def _described(self, licences: dict[str | int, Any]) -> Iterator[tuple[str | int, str]]:
        for name, item in self._items("annotations", "licenses"):
            if name == "annotations":
                yield _identity(item["image_id"]), _utf8(item["caption"])
            else:
                licences[_identity(item.get("id"))] = item.get("name")

    def _items(self, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of some of the file's lists."""
        with self._reading() as file:
            for name, item in member_items(file, names):
                _ = [item[field] for field in _NEEDED[name]]
                yield name, item

    @contextmanager
    def _reading(self) -> Iterator[TextIO]:
        try:
            with open_text(self.input) as file:
                yield file
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"input {self.input}: its images need 'id' and 'file_name', its annotations 'image_id' and 'caption' ({error!r})"
            ) from error
        except ValueError as error:
            raise DataError(f"input {self.input}: it cannot be read as JSON ({error})") from error

    def _media_folder(self) -> Path:
        if self.media_folder is not None:
            candidates = [self.media_folder, self.input.parent / self.media_folder]
        else:
            name = self.input.stem.removeprefix("captions_")
            above = self.input.parent.parent
            candidates = [self.input.parent / name, above / name, above / "images" / name, self.input.parent / "images", above / "images"]
        for folder in candidates:
            if folder.is_dir():
                return folder
        raise DataError(f"input {self.input}: no folder of images at {', '.join(map(str, candidates))}; say where with --images-folder")


def _identity(value: Any) -> str | int:
    """An id as a database can hold it: numbers and texts that look alike stay different."""
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return value
    return f"\0{json.dumps(value)}"


def _utf8(value: Any) -> str:
    """A text without half characters, which JSON can spell and no database holds."""
    return str(value).encode("utf-8", "replace").decode()
