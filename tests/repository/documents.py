"""What the repository's documents hold: blocks of code, commands and links."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("clipscale", "clipscale-shards", "launch/torchrun.sh", "launch/slurm.sbatch", "launch/slurm_eval.sbatch", "make")
NOT_YET = "## What is not there yet"


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the repository that is not ignored, also those not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def documents() -> list[str]:
    """The repository's markdown files."""
    return [name for name in tracked() if name.endswith(".md")]


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command that a document tells people to type."""

    text: str
    program: str
    arguments: tuple[str, ...]


def commands(name: str) -> list[Command]:
    """Commands in a document: lines of its bash blocks and pieces of code in its text; in a YAML file those in its comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        text = text.partition(NOT_YET)[0]
        lines = [line for block in blocks(name, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    else:
        lines = re.findall(r"#\s+((?:sbatch |[A-Z_]+=\S+ )*(?:clipscale|launch/)\S* .*)", text)
    return [command for line in lines if (command := _command(line))]


def _command(line: str) -> Command | None:
    words = shlex.split(re.sub(r"(^|\s)#.*", "", line)) if "'" not in line.partition("#")[0] else line.partition("#")[0].split()
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words[:1] == ["sbatch"]:
        del words[0]
        while words and words[0].startswith("--"):
            del words[0]
    if len(words) < 2 or words[0] not in PROGRAMS:
        return None
    return Command(line, words[0], tuple(words[1:]))
