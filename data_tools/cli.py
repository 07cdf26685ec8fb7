"""clipscale-shards: the command line."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import typer

from clipscale.errors import ClipscaleError
from data_tools.commands.build import HELP as BUILD_HELP
from data_tools.commands.build import build
from data_tools.commands.dedupe import HELP as DEDUPE_HELP
from data_tools.commands.dedupe import dedupe
from data_tools.commands.describe import describe
from data_tools.commands.finish import finish
from data_tools.commands.index import HELP as INDEX_HELP
from data_tools.commands.index import index
from data_tools.commands.reshard import MERGE_HELP, RESHARD_HELP, SPLIT_HELP, merge, reshard, split
from data_tools.commands.retry import HELP as RETRY_HELP
from data_tools.commands.retry import retry
from data_tools.commands.verify import HELP as VERIFY_HELP
from data_tools.commands.verify import verify
from data_tools.terminal import errors, say

app = typer.Typer(
    name="clipscale-shards",
    help="Build data sets of webdataset tars with parquet sidecars, and look after them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(help=BUILD_HELP)(build)
app.command()(finish)
app.command(help=INDEX_HELP)(index)
app.command()(describe)
app.command(help=VERIFY_HELP)(verify)
app.command(help=RETRY_HELP)(retry)
app.command(help=DEDUPE_HELP)(dedupe)
app.command(help=MERGE_HELP)(merge)
app.command(help=SPLIT_HELP)(split)
app.command(help=RESHARD_HELP)(reshard)


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
        say(f"error: {error}", console=errors, style="red")
        sys.exit(error.exit_code)
    except _Stopped:
        say("stopped; the same command goes on from here", console=errors)
        sys.exit(130)
