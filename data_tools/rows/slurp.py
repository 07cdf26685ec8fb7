"""SLURP: train.jsonl and its kin; a spoken request's intent and entities (Bastianelli et al. 2020, arXiv:2011.13205).

A sentence is one sample for each of its recordings, which lie in `slurp_real` or `slurp_synth`. The caption is the sentence, the
intent `scenario_action`, and `slots` are the entities: their type and the words they span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from clipscale.errors import DataError
from data_tools.rows import Row, Rows
from data_tools.rows._text import json_object, open_text, undecodable

_HEAD = 100
_FOLDERS = (".", "slurp_real", "slurp_synth", "audio", "audio/slurp_real", "audio/slurp_synth")


class Slurp(Rows):
    """A jsonl of SLURP."""

    media_folder: Path | None = None
    """Folder of the recordings; when not given, slurp_real, slurp_synth or audio in the folders around the jsonl."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if not path.is_file() or path.suffix.lower() != ".jsonl":
            return False
        with open_text(path) as file:
            first = json_object(file.readline(1 << 20))
        return isinstance(first, dict) and {"slurp_id", "sentence", "recordings"} <= first.keys()

    def guesses(self) -> list[str]:
        head = [(row, row.speech) for row in islice(self.read(), _HEAD) if isinstance(row.speech, Path)]
        if not head:
            raise DataError(f"input {self.input}: none of its first lines is a SLURP sentence with recordings")
        if not any(path.is_file() for _, path in head):
            raise DataError(
                f"input {self.input}: none of its first {len(head)} recordings is there, for instance {head[0][1]}; "
                f"say where they lie with --media-folder"
            )
        return [
            "recordings: one sample each; captions: their sentence",
            f"intent: scenario and action, for instance {head[0][0].record['intent']}; slots: entities",
            f"files: in {', '.join(str(folder) for folder in self._folders())}",
        ]

    def read(self) -> Iterator[Row]:
        folders = self._folders()
        with open_text(self.input) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from self._rows(f"{self.input.name}:{number}", undecodable(line) or json_object(line), folders)

    def _rows(self, name: str, item: dict[str, Any] | str, folders: list[Path]) -> Iterator[Row]:
        if isinstance(item, str):
            yield Row(name, problem=f"unreadable line: {item}")
            return
        try:
            record, recordings = _record(item), [(str(recording["file"]), recording) for recording in item["recordings"]]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            yield Row(name, problem=f"unreadable line: not a sentence as SLURP writes them ({error!r})")
            return
        for file, recording in recordings:
            path = next((folder / file for folder in folders if (folder / file).is_file()), folders[0] / file)
            about = record | ({"status": recording["status"]} if recording.get("status") else {})
            yield Row(f"{name}:{file}", None, path, (str(item["sentence"]),), about, columns=item)

    def _folders(self) -> list[Path]:
        here = self.input.absolute().parent
        around = [self.media_folder, here / self.media_folder] if self.media_folder else [here, here.parent, here.parent.parent]
        found = [place / name for place in around for name in _FOLDERS if (place / name).is_dir()]
        if not found:
            raise DataError(f"folder {self.media_folder} for the recordings of {self.input.name}: there is no such folder")
        return found


def _record(item: Mapping[str, Any]) -> dict[str, Any]:
    words = [str(token["surface"]) for token in item.get("tokens", [])]
    slots = {str(entity["type"]): " ".join(words[place] for place in entity["span"]) for entity in item.get("entities", [])}
    scenario, action = str(item["scenario"]), str(item["action"])
    return {"slurp_id": item["slurp_id"], "intent": f"{scenario}_{action}", "scenario": scenario, "action": action, "slots": slots}
