"""Karpathy's splits: dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json (Karpathy and Fei-Fei 2015).

A json with `images`, each with `filename`, perhaps `filepath`, `split` and `sentences`; all sentences are captions of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._arrow import choose_split
from data_tools.rows._json_stream import member_items
from data_tools.rows._text import open_text

_HEAD_BYTES = 1 << 16
_HEAD = 100


class Karpathy(Rows):
    """Images with their split and sentences."""

    split: str | None = None
    """train, val, test or restval; 'all' reads them together."""
    media_folder: Path | None = None
    """Folder of the images; when not given, the one that has them, of those around the json."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_file() or path.suffix.lower() != ".json":
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return head.lstrip().startswith(b"{") and b'"sentences"' in head and b'"sentids"' in head

    def guesses(self) -> list[str]:
        folder, head = self._folder(), list(islice(self._chosen(), _HEAD))
        if not any(self._path(image, folder).is_file() for image in head):
            raise DataError(f"input {self.input}: none of its first {len(head)} images is in {folder}; say where with --images-folder")
        images = sentences = 0
        for image in self._chosen():
            images, sentences = images + 1, sentences + len(image["sentences"])
        return [f"images: {images:,}, of split {self.split or 'all'}", f"captions: {sentences:,} sentences", f"files: in {folder}"]

    def read(self) -> Iterator[Row]:
        folder = self._folder()
        for image in self._chosen():
            captions = tuple(str(sentence["raw"]) for sentence in image["sentences"])
            record: dict[str, Any] = {name: image[name] for name in ("split", "imgid", "cocoid") if name in image}
            yield Row(str(image["filename"]), self._path(image, folder), None, captions, record, columns=image)

    def _chosen(self) -> Iterator[dict[str, Any]]:
        chosen = choose_split(self.input, self.split, list(dict.fromkeys(str(image["split"]) for image in self._images())))
        return (image for image in self._images() if chosen in (None, image["split"]))

    def _images(self) -> Iterator[dict[str, Any]]:
        """The images, one at a time."""
        try:
            with open_text(self.input) as file:
                for _, image in member_items(file, {"images"}):
                    _ = image["filename"], image["split"], [sentence["raw"] for sentence in image["sentences"]]
                    yield image
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"input {self.input}: it is not of Karpathy's format: images with filename, split, sentences ({error!r})"
            ) from error

    def _folder(self) -> Path:
        here = self.input.absolute().parent
        if self.media_folder is not None:
            return self.media_folder if self.media_folder.is_dir() else here / self.media_folder
        around = [
            place for parent in (here, here.parent) for place in (parent, *sorted(path for path in parent.iterdir() if path.is_dir()))
        ]
        head = list(islice(self._images(), _HEAD))
        return next((place for place in around if any(self._path(image, place).is_file() for image in head)), here)

    def _path(self, image: dict[str, Any], folder: Path) -> Path:
        return folder / str(image.get("filepath") or "") / str(image["filename"])
