"""clipscale-shards merge, split and reshard: the commands, their options and what they print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipscale.errors import ConfigError
from data_tools.commands._options import Scratch
from data_tools.terminal import progress_line, say, size

if TYPE_CHECKING:
    from data_tools.reshard import Choice

MERGE_HELP = """
Make one data set of several; media and texts are copied byte for byte.

Keys get the place of their data set in front (0-..., 1-..., in the order given), so that they stay unique.

Example:

    clipscale-shards merge shards/photos shards/drawings --into shards/pictures
"""

SPLIT_HELP = """
Split a data set into parts that share nothing, by fractions or by conditions.

Fractions: a keyed hash of the sample's key decides, or of what --by names: with --by speaker no speaker is in two parts. The same
seed gives the same parts, also of a data set that has grown. Fractions that add up to less than 1 leave the rest out.

Conditions: a sample goes into the first part whose condition it fulfils, or into none.

Examples:

    clipscale-shards split shards/commands --part train=0.9 --part test=0.1 --by speaker --into shards/split

    clipscale-shards split shards/photos --part small='width < 256' --part large='width >= 256' --into shards/by_size
"""

RESHARD_HELP = """
Make a data set of another: with other shard sizes, of some of its samples only, or without those that a list names.

Media and texts are copied byte for byte, keys stay. After any interruption the same command goes on.

Examples:

    clipscale-shards reshard shards/photos --into shards/large_photos --where 'width >= 512 and words(caption) > 3'

    clipscale-shards reshard shards/photos --into shards/clean --without duplicates.txt --samples-per-shard 5000
"""

_INTO = "Folder for the result, or the fsspec address of one: new, empty, or left by an interrupted command."
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another data set that stands there.")]
_Workers = Annotated[int | None, typer.Option(min=1, help="Processes; the result does not depend on it.", show_default="one a core")]
_ShardSize = Annotated[int, typer.Option(min=1, max=100_000, help="Samples in a tar file.")]


def merge(
    datasets: Annotated[list[str], typer.Argument(help="Data sets: folders, or fsspec addresses.", show_default=False)],
    into: Annotated[str, typer.Option(help=_INTO, show_default=False)],
    samples_per_shard: _ShardSize = 2_000,
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    scratch: Scratch = None,
) -> None:
    from data_tools.reshard import Choice

    if len(datasets) < 2:
        raise ConfigError("merge takes two data sets or more; for one there is clipscale-shards reshard")
    _make(datasets, into, Choice(), samples_per_shard, workers, overwrite, scratch)


def split(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set, or its fsspec address.", show_default=False)],
    part: Annotated[list[str], typer.Option(help="NAME=FRACTION, or NAME='condition'; once for each part.", show_default=False)],
    into: Annotated[str, typer.Option(help="Folder or fsspec address for the parts, each in a folder of its name.", show_default=False)],
    by: Annotated[str, typer.Option(help="What must not be in two parts: a field of the record (speaker, ...), or the key.")] = "key",
    seed: Annotated[int, typer.Option(help="Another seed gives other parts.")] = 0,
    samples_per_shard: _ShardSize = 2_000,
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    scratch: Scratch = None,
) -> None:
    from data_tools.split import split_choices

    for name, choice in split_choices(dataset, part, by=by, seed=seed).items():
        _make([dataset], f"{into.rstrip('/')}/{name}", choice, samples_per_shard, workers, overwrite, scratch)


def reshard(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set, or its fsspec address.", show_default=False)],
    into: Annotated[str, typer.Option(help=_INTO, show_default=False)],
    where: Annotated[
        str | None,
        typer.Option(
            help="Only samples for which this holds: fields of the record, key, caption, captions, width, height, seconds, ...",
            show_default="all",
        ),
    ] = None,
    without: Annotated[
        Path | None, typer.Option(help="Leave out the samples whose keys this file lists, a line each.", show_default="none")
    ] = None,
    samples_per_shard: _ShardSize = 2_000,
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    scratch: Scratch = None,
) -> None:
    from data_tools.split import filter_choice

    _make([dataset], into, filter_choice(dataset, where, without), samples_per_shard, workers, overwrite, scratch)


def _make(
    datasets: Sequence[str],
    into: str,
    choice: Choice,
    samples_per_shard: int,
    workers: int | None,
    overwrite: bool,
    scratch: Path | None,
) -> None:
    from data_tools.reshard import reshard as make

    started = time.monotonic()
    with progress_line("copying") as show:
        summary = make(
            datasets,
            into,
            choice=choice,
            samples_per_shard=samples_per_shard,
            workers=workers,
            overwrite=overwrite,
            scratch=scratch,
            show=show,
        )
    kept = f" ({summary.reused_shards} stood already)" if summary.reused_shards else ""
    took = time.monotonic() - started
    say(f"{summary.output}: {summary.samples:,} samples in {summary.shards:,} shards{kept}, {size(summary.bytes)}, {took:.1f} s")
