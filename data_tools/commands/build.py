"""clipscale-shards build: the command, its options and what it prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipscale.errors import ConfigError
from data_tools.commands._options import (
    AllowLoopback,
    ConnectTimeout,
    Deadline,
    HostRate,
    IgnoreOptOut,
    IgnoreRobots,
    MaxBytes,
    PerHost,
    ReadTimeout,
    Scratch,
    Threads,
    Tries,
    UserAgent,
    checked,
    fetching_of,
)
from data_tools.commands._shown import show_guesses, show_rows, show_summary
from data_tools.terminal import progress_line

if TYPE_CHECKING:
    from data_tools.packing import Packing

HELP = """
Make a data set for training and evaluation out of images or recordings with captions.

INPUT is one of

- a folder: a .txt beside each image or recording, or folders named after what they show

- a .csv or .tsv file with column names, or a .jsonl file; a row each

- parquet: a file, a folder of them, or a pattern in quotes; media in its cells ({bytes, path} too) or files that it names

- a data set that Hugging Face's save_to_disk wrote: its folder

- captions of images: COCO's .json, Karpathy's dataset_*.json, Flickr's token file

- speech corpora: a .tsv of Common Voice, a folder of LibriSpeech, a .csv of Fluent Speech Commands, a .jsonl of SLURP, the folder
of Google Speech Commands

- addresses of the web (http, https): a .txt with one a line and its caption behind a tab, or a column of a table, JSONL or parquet

- webdataset tars, as img2dataset, open_clip or CLAP make them: a folder of them, one, or a pattern in quotes

Nothing is guessed silently: what is taken for what is printed first, and --dry-run stops there. Run the same command again after
any interruption: finished shards are kept and the result is the same, byte for byte.

Examples:

    clipscale-shards build photos/ shards/

    clipscale-shards build captions.csv shards/ --image-column file --caption-column caption

    clipscale-shards build captions_val2017.json shards/ --images-folder val2017 --max-side 256

    clipscale-shards build 'tars/{00000..00009}.tar' shards/

    clipscale-shards build 'data/train-*.parquet' shards/ --caption-column text

    clipscale-shards build laion.parquet shards/ --image-column URL --caption-column TEXT --resize shorter:256

    clipscale-shards build speech_commands_v0.02/ shards/ --split test

    clipscale-shards build commands.csv shards/ --speech-column path --caption-column transcription --slot-column action
"""

_COLUMNS = "Tables, JSONL, parquet, corpora: which column holds what"
_FOLDERS = "Folders: where captions come from"
_TARS = "Tars"
_NODES = "Several nodes: each runs the same command with its own --node"
_CHOICE = "Which rows are packed"
_CAPTIONS = "What captions become"
_IMAGES = "What images become"


def build(
    input: Annotated[Path, typer.Argument(help="A file, a folder, or a pattern in quotes: see above.", show_default=False)],
    output: Annotated[
        str,
        typer.Argument(
            help="Folder for the data set, or the fsspec address of one (s3://bucket/photos): new, empty, or left by an interrupted build.",
            show_default=False,
        ),
    ],
    image_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with images, or their file names.", show_default="guessed")
    ] = None,
    speech_column: Annotated[
        str | None, typer.Option(rich_help_panel=_COLUMNS, help="Column with recordings, or their file names.", show_default="guessed")
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
    split: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_COLUMNS,
            help="Corpora and data sets with splits: which one to read (train, test, ...), or 'all'; needed when there are several.",
            show_default="the only one",
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_COLUMNS, help="Tables and JSONL: latin-1, cp1252, utf-16, ...", show_default="by its first bytes, else UTF-8"
        ),
    ] = None,
    captions_from: Annotated[
        Literal["auto", "files", "folders"] | None,
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
        Literal["refuse", "keep"] | None,
        typer.Option(
            rich_help_panel=_TARS,
            help="A tar that is cut off or damaged: 'refuse' it, or 'keep' the samples before the damage; what is lost is one failed row.",
            show_default="refuse",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="What INPUT is: folder, table, jsonl, parquet, tars, ... (a file of data_tools/rows), or a Python module of yours.",
            show_default="guessed",
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_CHOICE,
            help="Only rows for which this holds: 'width >= 256 and lang == \"en\" and words(caption) > 2'; any column may be named.",
            show_default="all rows",
        ),
    ] = None,
    clean_captions: Annotated[
        bool,
        typer.Option(
            "--clean-captions",
            rich_help_panel=_CAPTIONS,
            help="Repair captions of the web: HTML characters and tags, invisible characters, Unicode NFC; docs/shards.md has the rules.",
        ),
    ] = False,
    min_words: Annotated[
        int, typer.Option(rich_help_panel=_CAPTIONS, help="Drop captions of fewer words, and rows that have no other.")
    ] = 1,
    max_words: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_CAPTIONS, help="Drop captions of more words, and rows that have no other.", show_default="any length"
        ),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(rich_help_panel=_CHOICE, help="Leave out images whose shorter side has fewer pixels.", show_default="none")
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(rich_help_panel=_CHOICE, help="Leave out images with more pixels.", show_default="64 million"),
    ] = None,
    max_aspect: Annotated[
        float | None,
        typer.Option(rich_help_panel=_CHOICE, help="Leave out images more than so many times as long as wide.", show_default="any shape"),
    ] = None,
    min_seconds: Annotated[float, typer.Option(rich_help_panel=_CHOICE, help="Leave out shorter recordings.")] = 0.0,
    max_seconds: Annotated[float, typer.Option(rich_help_panel=_CHOICE, help="Leave out longer recordings.")] = 300.0,
    max_side: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_IMAGES,
            help="Shrink images whose longer side has more pixels: --resize longer:N.",
            show_default="keep all",
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_IMAGES,
            help="longer:N or shorter:N shrinks that side to N pixels; exact:WxH stretches; crop:WxH covers and cuts out the middle; "
            "border:WxH fits inside, white around it.",
            show_default="keep all",
        ),
    ] = None,
    image_format: Annotated[
        Literal["keep", "jpg", "png", "webp"],
        typer.Option(rich_help_panel=_IMAGES, help="Store all images as jpg, png or webp; 'keep' leaves each what it is."),
    ] = "keep",
    quality: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_IMAGES,
            help="Encode every JPEG and WebP anew with this quality (1 to 100).",
            show_default="only those that change, with 95",
        ),
    ] = None,
    check_images: Annotated[
        Literal["decode", "header"],
        typer.Option(
            rich_help_panel=_IMAGES, help="'decode' finds every unreadable image; 'header' is several times faster and finds those cut off."
        ),
    ] = "decode",
    samples_per_shard: Annotated[int, typer.Option(help="Rows in a tar file.")] = 2_000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the result does not depend on it.", show_default="one a core")
    ] = None,
    node: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_NODES,
            min=0,
            help="This is node N of several, counted from 0; node 0 writes the plan.",
            show_default="the only one",
        ),
    ] = None,
    of: Annotated[
        int | None, typer.Option(rich_help_panel=_NODES, min=1, help="How many nodes build OUTPUT together.", show_default="1")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", rich_help_panel=_NODES, help="Write the plan into OUTPUT, and no shard.")
    ] = False,
    scratch: Scratch = None,
    max_bad: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Largest share of rows that may fail (unreadable, missing, no caption); beyond it the build fails.",
            show_default="0.01; 1 where media are fetched",
        ),
    ] = None,
    deadline: Deadline = 60.0,
    connect_timeout: ConnectTimeout = 10.0,
    read_timeout: ReadTimeout = 15.0,
    max_bytes: MaxBytes = 32_000_000,
    threads: Threads = 32,
    per_host: PerHost = 4,
    host_rate: HostRate = 10.0,
    tries: Tries = 3,
    user_agent: UserAgent = None,
    ignore_robots: IgnoreRobots = False,
    ignore_opt_out: IgnoreOptOut = False,
    allow_loopback: AllowLoopback = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what is taken for what and the first ten rows; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set that OUTPUT holds.")] = False,
) -> None:
    from data_tools.build import Node
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
        "split": split,
        "encoding": encoding,
        "captions_from": captions_from,
        "caption_template": caption_template,
        "damaged_tars": damaged_tars,
    }
    rows = open_rows(input, kind=kind, **options)
    packing = _packing(
        samples_per_shard=samples_per_shard,
        where=where,
        clean_captions=clean_captions,
        min_words=min_words,
        max_words=max_words,
        max_side=max_side,
        resize=resize,
        image_format=image_format,
        quality=quality,
        min_side=min_side,
        max_pixels=max_pixels,
        max_aspect=max_aspect,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        check_images=check_images,
    )
    fetching = fetching_of(
        deadline=deadline,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        max_bytes=max_bytes,
        threads=threads,
        per_host=per_host,
        host_rate=host_rate,
        tries=tries,
        user_agent=user_agent,
        ignore_robots=ignore_robots,
        ignore_opt_out=ignore_opt_out,
        allow_loopback=allow_loopback,
    )
    show_guesses(rows)
    if dry_run:
        show_rows(rows, packing)
        return
    if (node is None) != (of is None):
        raise ConfigError("--node and --of go together: --node 0 --of 4 is the first of four")
    started = time.monotonic()
    with progress_line() as show:
        summary = build_dataset(
            rows,
            output,
            packing=packing,
            workers=workers,
            max_bad=max_bad,
            fetching=fetching,
            overwrite=overwrite,
            node=None if node is None else Node(node, of or 1),
            plan_only=plan_only,
            scratch=scratch,
            show=show,
        )
    show_summary(summary, time.monotonic() - started)


def _packing(**settings: Any) -> Packing:
    from data_tools.packing import Packing

    return checked(Packing, settings)
