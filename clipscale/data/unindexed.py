"""Tars without an index, streamed by webdataset one after the other: no place in them is known before they are read.

Each tar is given to webdataset alone, as an open file: its own addresses can run programs, and across tars it would pair one's picture
with another's caption. Only members that a sample may have are read; nothing is decoded or unpickled by webdataset.
"""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import fsspec

from clipscale.credentials import filled_in, redacted
from clipscale.data.media import IMAGE_SUFFIXES, SPEECH_SUFFIXES
from clipscale.data.sample import BadSample, Sample, parse_sample
from clipscale.errors import DataError, MissingPackage, ShardError

RETRY_PAUSES_S = (0.1, 0.4, 1.6)
"""Seconds before each further try of a tar that could not be read to its end."""
_TEXTS = ("txt", "json")


class UnindexedTars:
    """The tars of a folder, local or at an fsspec address, in the order of their names. Safe to use in forked workers."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            DataError: the folder or the tars are missing, or the address is none that is read.
            MissingPackage: the address needs an fsspec back-end that is not installed.
        """
        self.url = url
        files = _list_tars(url)
        self.shards = [name.removesuffix(".tar") for name in files]
        sizes = "\n".join(f"{name} {size}" for name, size in files.items())
        self.fingerprint = hashlib.sha256(sizes.encode()).hexdigest()
        """Hash of names and sizes: of their bytes nothing is known before they are read."""
        self.totals: dict[str, float] = {}
        self.counters: dict[str, float] = {}

    def read_shard(self, shard: int) -> Iterator[Sample | BadSample]:
        """The samples of a tar in stored order; what cannot be read is a bad sample, the rest of a damaged tar a single one.

        A tar that a store stops sending is read again from its start, without the samples that were given already.
        """
        name, given = f"{self.shards[shard]}.tar", 0
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                with fsspec.open(f"{filled_in(self.url).rstrip('/')}/{name}", "rb") as file:
                    for number, sample in enumerate(_samples(file, f"{self.url}/{name}")):
                        if number >= given:
                            given += 1
                            yield sample
                return
            except OSError as error:
                if pause_s is None or isinstance(error, FileNotFoundError):
                    yield BadSample(name, self.url, redacted(f"the tar cannot be read to its end: {error}"))
                    return
                self.counters["retries"] = self.counters.get("retries", 0) + 1
                time.sleep(pause_s)


def _list_tars(url: str) -> dict[str, int]:
    """Names and sizes of the tars that lie in the folder itself."""
    if url.startswith("pipe:"):
        raise DataError(f"{url}: pipe: addresses run shell commands and are refused; give a folder of tars or an fsspec address of one")
    if any(part == ".." for part in url.split("/")):
        raise DataError(f"{url}: write the folder's address without '..'")
    try:
        filesystem, root = fsspec.core.url_to_fs(filled_in(url))
        entries = filesystem.ls(root, detail=True)
    except ImportError as error:
        raise MissingPackage(redacted(f"{url}: {error}")) from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"tars {url}: there is no such folder; give the folder that the tars lie in") from None
    except (OSError, ValueError) as error:
        raise DataError(redacted(f"tars {url}: the folder cannot be listed: {error}")) from None
    files = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}
    tars = {name: size for name, size in sorted(files.items()) if name.endswith(".tar")}
    if not tars:
        raise DataError(f"tars {url}: no .tar lies in the folder; it holds {', '.join(sorted(files)[:5]) or 'no files'}")
    return tars


def _samples(file: Any, path: str) -> Iterator[Sample | BadSample]:
    """What webdataset makes of one tar, and what it would have passed over."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    problems: list[BadSample] = []

    def stop(error: Exception) -> bool:
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
            raise error  # the store, not the tar
        problems.append(BadSample(path, path, f"damaged tar, whatever followed in it is lost: {error.args[0] if error.args else error}"))
        return False

    def leave_out(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        problems.append(BadSample(str(error.args[0]).partition(":")[0], path, "the tar has this member more than once"))
        return True

    files = tar_file_expander([{"url": path, "stream": file}], handler=stop, select_files=_is_wanted)
    for members in group_by_keys(files, handler=leave_out):
        yield _parsed(members, path)
        yield from problems
        problems.clear()
    yield from problems


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2].lower() in (*IMAGE_SUFFIXES, *SPEECH_SUFFIXES, *_TEXTS)


def _parsed(members: dict[str, Any], path: str) -> Sample | BadSample:
    key = str(members["__key__"])

    def member(suffixes: tuple[str, ...]) -> bytes | None:
        return next((members[suffix] for suffix in suffixes if suffix in members), None)

    try:
        return parse_sample(
            key,
            image=member(tuple(IMAGE_SUFFIXES)),
            speech=member(tuple(SPEECH_SUFFIXES)),
            text=member(("txt",)),
            record=member(("json",)),
        )
    except ShardError as error:
        return BadSample(key, path, str(error))
