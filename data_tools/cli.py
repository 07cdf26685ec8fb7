"""clipscale-shards: the command line."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from clipscale.errors import ClipscaleError, ConfigError

if TYPE_CHECKING:
    from data_tools.build import BuildSummary
    from data_tools.pool import Progress
    from data_tools.rows import Row, Rows

_BUILD_EXAMPLES = """
Make a data set for training and evaluation out of images or recordings with captions.

INPUT is one of

- a folder: a .txt beside each image or recording, or folders named after what they show

- a .csv or .tsv file with column names, or a .jsonl file; a row each

- a captions .json in COCO format, several captions an image

- webdataset tars, as img2dataset, open_clip or CLAP make them: a folder of them, one, or a pattern in quotes

Nothing is guessed silently: what is taken for what is printed first, and --dry-run stops there. Run the same command again after
any interruption: finished shards are kept and the result is the same, byte for byte.

Examples:

    clipscale-shards build photos/ shards/

    clipscale-shards build captions.csv shards/ --image-column file --caption-column caption

    clipscale-shards build captions_val2017.json shards/ --images-folder val2017 --max-side 256

    clipscale-shards build 'tars/{00000..00009}.tar' shards/

    clipscale-shards build commands.csv shards/ --speech-column path --caption-column transcription --slot-column action
"""

_COLUMNS = "Tables and JSONL: which column holds what"
_FOLDERS = "Folders: where captions come from"
_TARS = "Tars"

app = typer.Typer(
    name="clipscale-shards",
    help="Build and describe data sets: webdataset tars with parquet sidecars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class CaptionsFrom(Enum):
    """Where a folder's captions come from."""

    auto = "auto"
    files = "files"
    folders = "folders"


class DamagedTars(Enum):
    """What is done about tars that are not whole."""

    refuse = "refuse"
    keep = "keep"


class CheckImages(Enum):
    """How closely images are looked at."""

    decode = "decode"
    header = "header"


@app.command(help=_BUILD_EXAMPLES, rich_help_panel=None)
def build(
    input: Annotated[Path, typer.Argument(help="Folder, .csv, .tsv, .jsonl, COCO .json, or webdataset tars.", show_default=False)],
    output: Annotated[
        Path, typer.Argument(help="Folder for the data set; new, empty, or one that an interrupted build left.", show_default=False)
    ],
    image_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with image file names.", show_default="guessed")
    ] = None,
    speech_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with sound file names.", show_default="guessed")
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_COLUMNS, help="Column with captions or transcripts; may be given several times.", show_default="guessed"
        ),
    ] = None,
    media_folder: Annotated[
        Path | None,
        typer.Option(
            "--media-folder",
            "--images-folder",
            help="Folder that file names in INPUT are relative to.",
            show_default="found",
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(rich_help_panel=_COLUMNS, help="Column with the class, for zero-shot classification.", show_default="guessed"),
    ] = None,
    intent_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with a spoken command's intent.", show_default="guessed")
    ] = None,
    slot_column: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_COLUMNS, help="Column with one slot of a spoken command (action, object, ...); may be given several times."
        ),
    ] = None,
    speaker_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with who speaks.", show_default="guessed")
    ] = None,
    captions_from: Annotated[
        CaptionsFrom | None,
        typer.Option(
            rich_help_panel=_FOLDERS,
            help="Captions are in 'files' (.txt or .json beside each) or are the names of the 'folders'.",
            show_default="auto",
        ),
    ] = None,
    caption_template: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_FOLDERS, help="Folders with classes: how a caption is made of a folder's name.", show_default="{label}"
        ),
    ] = None,
    damaged_tars: Annotated[
        DamagedTars | None,
        typer.Option(
            rich_help_panel=_TARS,
            help="A tar that is cut off or damaged: 'refuse' it, or 'keep' the samples before the damage; what is lost is one failed row.",
            show_default="refuse",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="What INPUT is: folder, table, jsonl, coco, tars, or a Python module with a kind of your own.", show_default="guessed"
        ),
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option(help="Shrink images whose longer side has more pixels; others are kept byte for byte.", show_default="keep all"),
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="Longer recordings are left out, and counted as failures.")] = 300.0,
    check_images: Annotated[
        CheckImages, typer.Option(help="'decode' finds every unreadable image; 'header' is several times faster and finds those cut off.")
    ] = CheckImages.decode,
    samples_per_shard: Annotated[int, typer.Option(help="Rows in a tar file.")] = 2_000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the result does not depend on it.", show_default="one a core")
    ] = None,
    max_bad: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Largest share of rows that may fail (unreadable, missing, no caption); beyond it the build fails."
        ),
    ] = 0.01,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what is taken for what and the first ten rows; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set that OUTPUT holds.")] = False,
) -> None:
    from data_tools.build import build as build_dataset
    from data_tools.rows import open_rows

    options = {
        "image_column": image_column,
        "speech_column": speech_column,
        "caption_columns": tuple(caption_column or ()),
        "media_folder": media_folder,
        "label_column": label_column,
        "intent_column": intent_column,
        "slot_columns": tuple(slot_column or ()),
        "speaker_column": speaker_column,
        "captions_from": captions_from and captions_from.value,
        "caption_template": caption_template,
        "damaged_tars": damaged_tars and damaged_tars.value,
    }
    rows = open_rows(input, kind=kind, **options)
    packing = _packing(max_side=max_side, max_seconds=max_seconds, check_images=check_images.value, samples_per_shard=samples_per_shard)
    _show_guesses(rows)
    if dry_run:
        _show_rows(rows)
        return
    started = time.monotonic()
    with _progress() as show:
        summary = build_dataset(rows, output, packing=packing, workers=workers, max_bad=max_bad, overwrite=overwrite, show=show)
    _show_summary(summary, time.monotonic() - started)


@app.command()
def describe(
    dataset: Annotated[str, typer.Argument(help="Folder of a data set, or its fsspec address.", show_default=False)],
    page: Annotated[
        Path | None,
        typer.Option(help="Also write a page to look at and listen to: an .html file that needs nothing else.", show_default="no page"),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=2_000, help="Samples shown on the page, spread evenly over the data set.")] = 60,
) -> None:
    """Say what is in a data set: counts, sizes, durations, captions, labels and duplicates."""
    from data_tools.describe import describe as describe_dataset
    from data_tools.page import write_page

    description = describe_dataset(dataset)
    _say("\n".join(description.lines()))
    if page:
        write_page(description, page, num_samples=samples)
        _say(f"page: {page}")


_out = Console()
_err = Console(stderr=True)


def _say(text: str, *, console: Console = _out, style: str = "") -> None:
    """Print text as it stands: no markup, no wrapping, and no half characters from odd file names."""
    console.print(escape(text.encode("utf-8", "replace").decode()), style=style, highlight=False, soft_wrap=True)


def _packing(**settings: Any) -> Any:
    from pydantic import ValidationError

    from data_tools.packing import Packing

    try:
        return Packing(**settings)
    except ValidationError as error:
        line = error.errors()[0]
        option = "--" + str(line["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option} {line['input']}: {line['msg']}") from None


def _show_guesses(rows: Rows) -> None:
    from clipscale.settings import part_name

    lines = [f"input: {rows.input}, read as {part_name(type(rows))}", *rows.guesses()]
    _say("\n".join(lines), console=_err)


def _show_rows(rows: Rows) -> None:
    for row in islice(rows.read(), 10):
        _say("\n".join(_row_lines(row)))


def _row_lines(row: Row) -> list[str]:
    from data_tools.shard_job import clean_captions

    if row.problem:
        return [f"{row.name}: cannot be packed: {row.problem}"]
    media = [
        f"  {what}: {medium}{'  (missing)' if isinstance(medium, Path) and not medium.is_file() else ''}"
        for what, medium in (("image", row.image), ("speech", row.speech))
        if medium is not None and not isinstance(medium, bytes)
    ]
    captions = [f"  caption: {caption}" for caption in clean_captions(row.captions)] or ["  caption: none; it cannot be packed"]
    return [row.name, *media, *captions, *(f"  {name}: {value}" for name, value in row.record.items())]


@contextmanager
def _progress() -> Iterator[Callable[[Progress, int], None]]:
    """A progress line on stderr: rows, rate, failures, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeRemainingColumn())
    with Bar(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task, started = bar.add_task("build", total=None, more="planning"), time.monotonic()

        def show(progress: Progress, total: int) -> None:
            rate = progress.rows / max(time.monotonic() - started, 1e-3)
            more = f"{progress.failed} failed · {_size(progress.bytes)} · {rate:,.0f} rows/s"
            bar.update(task, total=total, completed=progress.rows, more=more)

        yield show


def _show_summary(summary: BuildSummary, seconds: float) -> None:
    kept = f" ({summary.reused_shards} stood already)" if summary.reused_shards else ""
    _say(f"{summary.output}: {summary.samples:,} samples in {summary.shards} shards{kept}, {_size(summary.bytes)}, {seconds:.1f} s")
    if summary.failures:
        counts = ", ".join(f"{reason} {number}" for reason, number in sorted(summary.failures.items()))
        _say(f"left out: {counts}; see {summary.output / 'failures.jsonl'}")


def _size(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1_000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:.1f} TB"


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; not KeyboardInterrupt, which typer would answer in its own way."""


def _stop(*_: object) -> NoReturn:
    raise _Stopped


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except ClipscaleError as error:
        _say(f"error: {error}", console=_err, style="red")
        sys.exit(error.exit_code)
    except _Stopped:
        _say("stopped; the same command goes on from here", console=_err)
        sys.exit(130)
