"""Who imports whom: the contracts in pyproject.toml, and what they cannot say."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from clipscale.cli import PART_KINDS
from clipscale.settings import part_names

ROOT = Path(__file__).parents[2]
PARTS = {f"{folder}.{name}" for folder in PART_KINDS.values() for name in part_names(folder)}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file may import, absolutely named; `from a import b` may import a or a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def modules() -> dict[str, Path]:
    """Every module of both packages."""
    files = (path for package in ("clipscale", "data_tools") for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_every_module_imports_only_from_below() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 kept, 0 broken" in done.stdout


def test_there_are_parts_to_look_for() -> None:
    expected = {"clipscale.objectives.clip", "clipscale.towers.hf_text", "clipscale.engines.ddp", "data_tools.rows.folder"}
    assert expected <= PARTS


def test_no_module_names_a_part() -> None:
    """Parts are found by name, so that adding one touches no line that is there already."""
    named = {module: sorted(PARTS & set(imports(path))) for module, path in modules().items()}
    assert not {module: parts for module, parts in named.items() if parts}


def test_objectives_do_not_know_torch_distributed() -> None:
    found = {module for module, path in modules().items() if module.startswith("clipscale.objectives") for module in imports(path)}
    assert "torch" in found
    assert not {module for module in found if module.startswith("torch.distributed")}


def test_only_data_knows_webdataset() -> None:
    users = {module for module, path in modules().items() if any(name.split(".")[0] == "webdataset" for name in imports(path))}
    assert not {module for module in users if not module.startswith("clipscale.data")}
