"""COCO: a json file with `images` and `annotations`, several captions an image.

The images lie in the folder named like the file (captions_val2017.json: val2017), beside it or beside its folder, unless said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._media import locate

_HEAD_BYTES = 1 << 20


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
        images, captions = self._load()
        with_captions = sum(image["id"] in captions for image in images)
        return [
            f"images: {with_captions} with captions, of {len(images)}",
            f"captions: {sum(len(captions.get(image['id'], [])) for image in images)}",
            f"files: in {self._media_folder()}",
        ]

    def read(self) -> Iterator[Row]:
        images, captions = self._load()
        folder = self._media_folder()
        for image in images:
            if image["id"] in captions:
                record = {"image_id": image["id"]} | {
                    name: image[name] for name in ("license_name", "coco_url", "flickr_url") if image.get(name)
                }
                yield Row(image["file_name"], locate(image["file_name"], folder), None, tuple(captions[image["id"]]), record)

    def _load(self) -> tuple[list[dict[str, Any]], dict[Any, list[str]]]:
        """Images in the file's order, and captions by image id."""
        try:
            content = json.loads(self.input.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"input {self.input}: it cannot be read as JSON ({error})") from error
        lists = [content.get(name) for name in ("images", "annotations")] if isinstance(content, dict) else [None]
        if not all(isinstance(items, list) for items in lists):
            raise DataError(f"input {self.input}: no COCO file; that has the lists 'images' and 'annotations'")
        try:
            return self._match(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"input {self.input}: its images need 'id' and 'file_name', its annotations 'image_id' and 'caption' ({error!r})"
            ) from error

    def _match(self, content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[Any, list[str]]]:
        licences = {licence.get("id"): licence.get("name") for licence in content.get("licenses", [])}
        images = [{**image, "file_name": str(image["file_name"]), "id": image["id"]} for image in content["images"]]
        for image in images:
            image["license_name"] = licences.get(image.get("license"))
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
        return images, captions

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
