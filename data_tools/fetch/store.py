"""What has been fetched, beside the plan: a killed build goes on with the same bytes, and does not ask again for what failed.

```text
.build/fetched/000003.data    bodies, one after the other
.build/fetched/000003.jsonl   a line an address: what came of it, and where in the .data its body lies
```

A line is written after the body it tells of. A line that was cut off by a kill is no line, and its address is asked for again. A shard's
two files go when its job is done: the bytes are in the shard then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from data_tools.fetch.outcome import Outcome
from data_tools.media import Address, Medium, MediumState, StoredMedium
from data_tools.packing import BadRow
from data_tools.rows import Row


@dataclass(frozen=True)
class _Body(StoredMedium):
    """A medium that was fetched."""

    data: Path
    offset: int
    size: int
    sha256: str

    def state(self) -> MediumState:
        return MediumState(self.sha256, self.size, 0)

    def read(self) -> bytes:
        with self.data.open("rb") as file:
            file.seek(self.offset)
            body = file.read(self.size)
        if hashlib.sha256(body).hexdigest() != self.sha256:
            raise BadRow("changed file", f"{self.data} does not hold what was fetched; remove it, and run the same command again")
        return body


class Fetched:
    """What has been fetched for one shard; open in one process at a time."""

    def __init__(self, work: Path, shard: int) -> None:
        self.folder = folder = work / "fetched"
        folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._lines, self._end = _recorded(work, shard)
        self._data = (folder / f"{shard:06d}.data").open("r+b" if (folder / f"{shard:06d}.data").exists() else "w+b")
        self._data.truncate(self._end)
        _drop_torn_line(folder / f"{shard:06d}.jsonl")
        self._log = (folder / f"{shard:06d}.jsonl").open("a", encoding="utf-8")

    def __contains__(self, url: str) -> bool:
        return url in self._lines

    def add(self, outcome: Outcome, body: IO[bytes]) -> None:
        """Remember what came of an address."""
        with self._lock:
            line: dict[str, Any] = {"url": outcome.url, "reason": outcome.reason, "detail": outcome.detail}
            if not outcome.reason:
                body.seek(0)
                self._data.seek(self._end)
                shutil.copyfileobj(body, self._data, 1 << 20)
                self._data.flush()
                line |= {"offset": self._end, "size": outcome.size, "sha256": outcome.sha256}
                self._end += outcome.size
            self._lines[outcome.url] = line
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()

    def close(self) -> None:
        self._data.close()
        self._log.close()


def with_bodies(rows: Iterable[Row], work: Path, shard: int) -> Iterator[Row]:
    """The rows of a shard, with the addresses in them replaced by what was fetched."""
    lines: dict[str, dict[str, Any]] | None = None
    for row in rows:
        if isinstance(row.image, Address) or isinstance(row.speech, Address):
            lines = _recorded(work, shard)[0] if lines is None else lines
            yield _with_bodies(row, lines, work / "fetched" / f"{shard:06d}.data")
        else:
            yield row


def _with_bodies(row: Row, lines: dict[str, dict[str, Any]], data: Path) -> Row:
    found: list[Medium | None] = []
    for medium in (row.image, row.speech):
        if isinstance(medium, Address):
            line = lines.get(medium.url, {"reason": "not fetched", "detail": medium.url})
            if line["reason"]:
                return replace(row, problem=row.problem or f"{line['reason']}: {line['detail']}")
            medium = _Body(data, line["offset"], line["size"], line["sha256"])
        found.append(medium)
    return replace(row, image=found[0], speech=found[1])


def forget(work: Path, shard: int) -> None:
    """Remove what was fetched for a shard that stands."""
    for suffix in ("jsonl", "data"):
        (work / "fetched" / f"{shard:06d}.{suffix}").unlink(missing_ok=True)


def _recorded(work: Path, shard: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Whole lines whose bodies are whole, by address, and where the bodies end."""
    log, data = (work / "fetched" / f"{shard:06d}.{suffix}" for suffix in ("jsonl", "data"))
    size = data.stat().st_size if data.exists() else 0
    lines: dict[str, dict[str, Any]] = {}
    end = 0
    for text in log.read_text("utf-8").splitlines(keepends=True) if log.exists() else ():
        if not text.endswith("\n"):
            break
        line = json.loads(text)
        if line["reason"] or line["offset"] + line["size"] <= size:
            lines[line["url"]] = line
            end = max(end, line.get("offset", 0) + line.get("size", 0))
    return lines, end


def _drop_torn_line(log: Path) -> None:
    if log.exists():
        text = log.read_bytes()
        os.truncate(log, text.rfind(b"\n") + 1)
