"""The demo, told as the commands a person would type: data, shards, half a training, the other half, evaluation, report."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clipscale.config import load_run
from clipscale.errors import ConfigError, RunError

_CHECKOUT = Path(__file__).parents[2]
_DATA = Path("runs") / "demo-data"
_RANKS = 2
DATA_SETS = {
    "digits_train": "raw/digits/train.jsonl",
    "digits_test": "raw/digits/test.jsonl",
    "speech_train": "raw/speech/train.jsonl",
    "speech_test_voices": "raw/speech/test_voices.jsonl",
    "speech_test_phrasings": "raw/speech/test_phrasings.jsonl",
    "speech_test_digits": "raw/speech/test_digits.jsonl",
}
"""Data set -> the raw manifest it is built from, both below runs/demo-data."""


def tell(overrides: Sequence[str] = ()) -> Path:
    """Run the whole demo in the current folder; what is there already is used again. Returns the report's path.

    Args:
        overrides: settings over configs/demo.yaml, as in `name=again seed=1`.

    Raises:
        ConfigError: this installation has no configs/ and launch/ beside it.
        RunError: a command failed; its own message is above.
    """
    config = _CHECKOUT / "configs" / "demo.yaml"
    if not config.exists():
        raise ConfigError(f"the demo needs a checkout of the repository: there is no {config}")
    settings = [os.path.relpath(config), *overrides]
    run = load_run(settings[:1], settings[1:])
    _say("1/5  Data: scanned digits, and spoken digits and home commands")
    _make_raw_data()
    for data_set, manifest in DATA_SETS.items():
        _run([sys.executable, "-m", "data_tools", "build", str(_DATA / manifest), str(_DATA / data_set)])
    _say(f"2/5  Training on {_RANKS} ranks, stopped half way, behind a checkpoint")
    _launch("train", *settings, "--stop-after", str(run.steps // 2))
    _say("3/5  Training goes on from the checkpoint, with the same command")
    _launch("train", *settings)
    _say("4/5  Evaluation on what was held out")
    _launch("eval", str(run.run_folder))
    _say("5/5  Report")
    _run([sys.executable, "-m", "clipscale", "report", str(run.run_folder)])
    return run.run_folder / "report.html"


def _make_raw_data() -> None:
    from clipscale.demo.digits import write_digits
    from clipscale.demo.speech import write_speech

    makers: dict[str, Callable[[Path], None]] = {"digits": write_digits, "speech": write_speech}
    for name, write in makers.items():
        final = _DATA / "raw" / name
        if final.exists():
            continue
        print(f"making {final}", file=sys.stderr, flush=True)
        aside = final.with_name(f".{name}.partial")
        write(aside)
        aside.rename(final)  # a folder under its final name is whole


def _launch(*arguments: str) -> None:
    script = os.path.relpath(_CHECKOUT / "launch" / "torchrun.sh")
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": os.environ.get("NPROC_PER_NODE", str(_RANKS))}
    _run([script, *arguments], environment=environment)


def _run(command: list[str], *, environment: dict[str, str] | None = None) -> None:
    print(f"$ {shlex.join(_readable(command))}", file=sys.stderr, flush=True)
    handler = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command too: let it write its checkpoint
    try:
        status = subprocess.run(command, env=environment, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, handler)
    if status:
        raise RunError(f"the command above ended with exit code {status}; `clipscale demo` goes on from what is finished")


def _readable(command: list[str]) -> list[str]:
    """The command as a person types it: `clipscale-shards ...` for `python -m data_tools ...`."""
    names = {"data_tools": "clipscale-shards", "clipscale": "clipscale"}
    return [names[command[2]], *command[3:]] if command[1:2] == ["-m"] else command


def _say(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)
