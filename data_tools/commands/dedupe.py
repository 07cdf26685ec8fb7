"""clipscale-shards dedupe: the command, its options and what it prints."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.terminal import lines_file, progress_line, say, text_file

HELP = """
Find samples that hold the same as an earlier one, or nearly: within a data set, across several, or as an evaluation set (--against).

The same: media of the same bytes. Nearly: pictures whose 64-bit perceptual hashes differ in at most --distance bits (all such pairs are
found), and recordings with the same decoded samples. The first of each kind is kept, in the order given. With --against only what repeats a
sample of these data sets is told: what an evaluation must not find in its training data.

Nothing is changed. --keys writes the keys to leave out, for clipscale-shards reshard --without; of several data sets, as merge calls them.

Examples:

    clipscale-shards dedupe shards/photos --keys repeats.txt

    clipscale-shards dedupe shards/train --against shards/test --keys leaked.txt

    clipscale-shards reshard shards/train --without leaked.txt --into shards/clean_train
"""


def dedupe(
    datasets: Annotated[list[str], typer.Argument(help="Data sets: folders, or fsspec addresses.", show_default=False)],
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation set; may be given several times.", show_default="look for repeats among themselves")
    ] = None,
    distance: Annotated[int, typer.Option(min=0, max=16, help="Most bits of 64 in which near pictures differ.")] = 4,
    exact: Annotated[bool, typer.Option("--exact", help="Compare bytes alone; nothing is decoded.")] = False,
    keys: Annotated[Path | None, typer.Option(help="Write the keys to leave out here, a line each.", show_default="no file")] = None,
    repeats: Annotated[
        Path | None, typer.Option(help="Write every repeat and what it repeats here, a JSON object a line.", show_default="no file")
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Repeats printed; the others are counted.")] = 20,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
) -> None:
    from data_tools.dedupe import Repeat
    from data_tools.dedupe import dedupe as find_repeats

    started, printed = time.monotonic(), 0
    with ExitStack() as stack:
        write = stack.enter_context(lines_file(repeats))
        leave_out = stack.enter_context(text_file(keys))
        show: Any = stack.enter_context(progress_line("comparing"))

        def found(repeat: Repeat) -> None:
            nonlocal printed
            write(vars(repeat))
            leave_out(f"{repeat.place}-{repeat.key}" if len(datasets) > 1 else repeat.key)
            printed += 1
            if printed <= most:
                say(f"{repeat.dataset} {repeat.key} = {repeat.of_dataset} {repeat.of_key}: {repeat.how}")

        result = find_repeats(datasets, found=found, against=against or (), distance=-1 if exact else distance, workers=workers, show=show)
    if printed > most:
        say(f"... and {printed - most:,} more{'' if repeats else ' (--repeats FILE lists all)'}")
    what = f"repeat samples of {', '.join(against)}" if against else "repeat earlier ones"
    total = result.same + result.near
    say(
        f"{total:,} of {result.samples:,} samples {what}: {result.same:,} with the same bytes, {result.near:,} nearly; "
        f"{time.monotonic() - started:.1f} s"
    )
    if result.unreadable:
        say(
            f"{result.unreadable:,} samples could not be decoded and were compared by their bytes alone; clipscale-shards verify names them"
        )
    if keys:
        say(f"keys to leave out: {keys}")
