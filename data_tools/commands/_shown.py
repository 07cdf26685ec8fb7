"""What build and finish show: what is taken for what, rows as they would be packed, and what a build came to."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from data_tools.terminal import errors, say, size

if TYPE_CHECKING:
    from data_tools.finish import BuildSummary
    from data_tools.packing import Packing
    from data_tools.rows import Row, Rows


def show_guesses(rows: Rows) -> None:
    """Say what is taken for what."""
    from clipscale.settings import part_name

    lines = [f"input: {rows.input}, read as {part_name(type(rows))}", *rows.guesses()]
    say("\n".join(lines), console=errors)


def show_rows(rows: Rows, packing: Packing) -> None:
    """Say what the first ten rows would become."""
    from data_tools.claim import chosen_rows

    for row in islice(chosen_rows(rows, packing), 10):
        say("\n".join(_row_lines(row, packing)))


def _row_lines(row: Row, packing: Packing) -> list[str]:
    """A row as it would be packed."""
    from data_tools.media import Address
    from data_tools.packing import BadRow
    from data_tools.shard_job import pack_row

    url = next((medium.url for medium in (row.image, row.speech) if isinstance(medium, Address)), None)
    if url is not None:
        return [row.name, f"  to be fetched: {url}", *(f"  caption: {caption}" for caption in row.captions)]
    try:
        packed = pack_row(row, packing)
    except BadRow as error:
        return [f"{row.name}: would be left out: {error}"]
    media = [
        (what, medium, data) for what, medium, data in (("image", row.image, packed.image), ("speech", row.speech, packed.speech)) if data
    ]
    return [
        row.name,
        *(
            f"  {what}: {'' if isinstance(medium, bytes) else medium} as {_kind(what, data)}, {size(len(data))}"
            for what, medium, data in media
        ),
        *(f"  caption: {caption}" for caption in packed.captions),
        *(f"  {name}: {value}" for name, value in row.record.items()),
    ]


def _kind(what: str, data: bytes) -> str:
    from clipscale.data.shards import image_size, image_suffix, speech_length, speech_suffix

    if what == "image":
        return f"{image_suffix(data)} of {'×'.join(map(str, image_size(data)))} pixels"
    frames, rate = speech_length(data)
    return f"{speech_suffix(data)} of {frames / rate:.2f} s at {rate} Hz"


def show_summary(summary: BuildSummary, seconds: float) -> None:
    """Say what a build came to."""
    kept = f" ({summary.reused_shards} stood already)" if summary.reused_shards else ""
    say(f"{summary.output}: {summary.samples:,} samples in {summary.shards:,} shards{kept}, {size(summary.bytes)}, {seconds:.1f} s")
    if summary.failures:
        counts = ", ".join(f"{reason} {number}" for reason, number in sorted(summary.failures.items()))
        say(f"left out: {counts}; see {summary.output.rstrip('/')}/failures.jsonl")
    if summary.unfinished:
        say(
            f"{summary.unfinished:,} shards are still to be built, by other nodes or by this command again; the node that ends last writes "
            f"the index, or: clipscale-shards finish {summary.output}"
        )
