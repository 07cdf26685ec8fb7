"""Google Speech Commands: a folder a word, and lists of what to validate and test on (Warden 2018, arXiv:1804.03209).

Caption and `label` are the word, `speaker` is what stands before `_nohash_` in a file's name, `split` follows validation_list.txt
and testing_list.txt. `_background_noise_` says no word and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._arrow import choose_split
from data_tools.rows._media import folders_in

_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
_NOISE = "_background_noise_"


class SpeechCommands(Rows):
    """A folder of Speech Commands, word by word, in the order of names."""

    split: str | None = None
    """train, validation or test; 'all' reads them together."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_dir() and all((path / name).is_file() for name in _LISTS.values())

    def guesses(self) -> list[str]:
        words = self._words()
        if not words:
            raise DataError(f"input {self.input}: it has no folders of words")
        noise = self.input / _NOISE
        return [
            f"recordings: the .wav of {len(words)} words ({', '.join(folder.name for folder in words[:5])}, ...)",
            "captions and label: the word; speaker: the file's name up to _nohash_",
            f"split: {choose_split(self.input, self.split, ('train', *_LISTS)) or 'all'}",
            *([f"left out: {len(list(noise.glob('*.wav')))} recordings in {_NOISE}, which say no word"] if noise.is_dir() else []),
        ]

    def read(self) -> Iterator[Row]:
        chosen = choose_split(self.input, self.split, ("train", *_LISTS))
        listed = {line.strip(): split for split, name in _LISTS.items() for line in (self.input / name).read_text("utf-8").splitlines()}
        for folder in self._words():
            for path in sorted(folder.glob("*.wav")):
                name = f"{folder.name}/{path.name}"
                split = listed.get(name, "train")
                if chosen in (None, split):
                    record = {"label": folder.name, "speaker": path.name.partition("_nohash_")[0].removesuffix(".wav"), "split": split}
                    yield Row(name, None, path, (folder.name.replace("_", " "),), record)

    def _words(self) -> list[Path]:
        return [path for path in folders_in(self.input) if not path.name.startswith("_")]
