"""LibriSpeech and its kin: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside the recordings it transcribes.

The caption is the transcript as it stands, in capitals. `speaker`, `chapter` and, in a release with several, `split` are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._arrow import choose_split
from data_tools.rows._media import SPEECH_SUFFIXES, folders_in, walk_visible

_SPLIT_NAMES = ("train", "dev", "test")
_LOOKED_AT = 50  # folders


class Librispeech(Rows):
    """A folder of transcribed recordings, in the order of names."""

    split: str | None = None
    """The split to read (train-clean-100), where the folder holds several; 'all' reads them together."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.is_dir() and any(_transcripts(names) for _, names in islice(walk_visible(path), _LOOKED_AT))

    def guesses(self) -> list[str]:
        first = next((row for row in self.read() if not row.problem), None)
        if first is None:
            raise DataError(f"input {self.input}: no transcript of a recording in it")
        splits = self._splits()
        return [
            *([f"splits: {', '.join(splits)}; read: {self.split}"] if len(splits) > 1 else []),
            f"recordings: transcribed in .trans.txt files, for instance {first.name}: {first.captions[0]}",
            f"speaker, chapter: from the file names, for instance {first.record['speaker']}, {first.record['chapter']}",
        ]

    def read(self) -> Iterator[Row]:
        chosen = choose_split(self.input, self.split, self._splits())
        for folder, names in walk_visible(self.input / chosen if chosen else self.input):
            files = {Path(name).stem: name for name in names if Path(name).suffix.lower() in SPEECH_SUFFIXES}
            for transcript in _transcripts(names):
                yield from self._rows(folder / transcript, files)

    def _splits(self) -> list[str]:
        return [path.name for path in folders_in(self.input) if path.name.startswith(_SPLIT_NAMES)]

    def _rows(self, transcript: Path, files: dict[str, str]) -> Iterator[Row]:
        place = transcript.relative_to(self.input).parts
        split = next((part for part in place[:-1] if part.startswith(_SPLIT_NAMES)), None)
        try:
            lines = transcript.read_text("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            yield Row("/".join(place), problem=f"unreadable caption file: {error}")
            return
        for line in filter(str.strip, lines):
            key, _, text = line.strip().partition(" ")
            speaker, _, rest = key.partition("-")
            record = {"speaker": speaker, "chapter": rest.partition("-")[0], **({"split": split} if split else {})}
            yield Row("/".join((*place[:-1], key)), None, transcript.parent / files.get(key, f"{key}.flac"), (text,), record)


def _transcripts(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".trans.txt")]
