"""What the documents say is so: generated pages are fresh, commands exist, configurations are accepted, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import textbook
import tiny
import typer.main
import yaml
from documents import NOT_YET, ROOT, Command, blocks, commands, documents, tracked
from making_data import png
from typer.core import TyperGroup

from clipscale.cli import PART_KINDS
from clipscale.cli import app as clipscale
from clipscale.config import Run, load_run, validate
from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.objectives import Objective
from clipscale.parallel.mesh import Mesh
from clipscale.run_model import build_model
from clipscale.settings import part_names
from data_tools.cli import app as shards
from data_tools.rows import open_rows

LAYERS = [name for name in tracked() if name.startswith("configs/clusters/") and name.endswith(".yaml")]
CONFIGS = [name for name in tracked() if name.startswith("configs/") and name.endswith(".yaml") and name not in LAYERS]
COMMANDS = {
    "clipscale": typer.main.get_command(clipscale).commands,  # type: ignore[attr-defined]
    "clipscale-shards": typer.main.get_command(shards).commands,  # type: ignore[attr-defined]
}
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture
def readme_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The README's YAML files, written into the current folder as it tells people to; name -> the file's first line."""
    monkeypatch.chdir(tmp_path)
    heads = {}
    for block in blocks("README.md", "yaml"):
        head = block.partition("\n")[0]
        named = re.fullmatch(r"# (\w+\.yaml): (a full configuration|a layer over \w+\.yaml)", head)
        assert named, f"a YAML block of the README begins with its name and what it is, not with {head!r}"
        (tmp_path / named[1]).write_text(block)
        heads[named[1]] = named[2]
    return heads


# --- generated pages -------------------------------------------------------------------------------------------------


def test_generated_pages_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [path.name for path, content in generate.pages().items() if path.read_text(encoding="utf-8") != content]
    assert not stale, f"{stale}: run `make docs`"


# --- commands --------------------------------------------------------------------------------------------------------


def told() -> Iterator[tuple[str, Command]]:
    """Every command that a document or a configuration's comments tell, with where."""
    for name in [*documents(), *CONFIGS, *LAYERS]:
        yield from ((name, command) for command in commands(name))


def mistakes(command: Command) -> Iterator[str]:
    """What is wrong with a command: unknown names, options, parts, or files of this repository that do not exist."""
    if command.program == "make":
        yield from (f"no target {word}" for word in command.arguments if "=" not in word and word not in TARGETS)
        return
    if command.program.startswith("launch/") and not (ROOT / command.program).is_file():
        yield f"there is no {command.program}"
    known = COMMANDS.get(command.program, COMMANDS["clipscale"])
    name, *rest = command.arguments
    if name not in known:
        if name not in ("--help", "..."):
            yield f"no command {name}"
        return
    found = known[name]
    if isinstance(found, TyperGroup):  # eval: the command that a checkpoint's address means need not be named
        found = found.commands[rest[0] if rest and rest[0] in found.commands else "checkpoint"]
    options = {option for parameter in found.params for option in parameter.opts} | {"--help"}
    yield from (f"no option {word}" for word in rest if word.startswith("--") and word.partition("=")[0] not in options)
    yield from (f"there is no {word}" for word in rest if word.startswith(("configs/", "launch/")) and not (ROOT / word).is_file())
    if (command.program, name) == ("clipscale", "parts"):
        yield from (f"no kind of part {word}" for word in rest if word.islower() and word not in PART_KINDS)


def test_documents_tell_only_commands_that_exist() -> None:
    found = {f"{where}: {command.text}": list(mistakes(command)) for where, command in told()}
    assert not {text: wrong for text, wrong in found.items() if wrong}


def test_the_readme_tells_the_commands_a_newcomer_needs() -> None:
    told_here = {(command.program, command.arguments[0]) for command in commands("README.md")}
    needed = {("make", "demo"), ("make", "test"), ("clipscale-shards", "build"), ("launch/torchrun.sh", "train"), ("clipscale", "report")}
    assert needed <= told_here


def test_what_the_readme_calls_missing_is_missing() -> None:
    missing = (ROOT / "README.md").read_text(encoding="utf-8").partition(NOT_YET)[2]
    named = set(re.findall(r"`(?:clipscale |clipscale-shards )?([a-z0-9_]+)`", missing))
    assert named
    assert not named & {*COMMANDS["clipscale"], *COMMANDS["clipscale-shards"]}
    here = {*part_names("clipscale.engines"), *part_names("clipscale.objectives")}
    assert named & here == here - {"local"}, "the list names every engine and objective there is"


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_accepted(name: str) -> None:
    load_run([ROOT / name]).check_world(2 if name == "configs/demo.yaml" else 8)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_for_clusters_lie_over_recipes(layer: str) -> None:
    for recipe in ("configs/image_text/vit_l_14_64k.yaml", "configs/image_text/vit_b_16_8_gpus.yaml"):
        load_run([ROOT / recipe, ROOT / layer]).check_world(32)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "configs/demo.yaml"])
def test_recipes_name_no_data_of_anybodys(name: str) -> None:
    run = load_run([ROOT / name])
    urls = [source.url for kind in run.pair_kinds.values() for source in kind.sources.values()]
    assert all(url.startswith("data/shards/") for url in urls)


def test_the_64k_recipe_gives_each_of_64_gpus_1024_pairs() -> None:
    run = load_run([ROOT / "configs/image_text/vit_l_14_64k.yaml"])
    run.check_world(64)
    assert [kind.global_batch for kind in run.pair_kinds.values()] == [64 * 1024]
    assert run.towers["image"].recompute


def test_every_configuration_in_the_readme_is_accepted(readme_files: dict[str, str]) -> None:
    full = [name for name, what in readme_files.items() if what == "a full configuration"]
    kinds = {kind for name in full for kind in load_run([name]).pair_kinds}
    assert kinds == {"image_text", "speech_text"}


def test_every_layer_in_the_readme_fits_over_its_file(readme_files: dict[str, str]) -> None:
    layers = {name: what.removeprefix("a layer over ") for name, what in readme_files.items() if what.startswith("a layer")}
    assert layers
    for name, below in layers.items():
        assert load_run([below, name]) != load_run([below])


def test_files_that_the_readme_trains_are_in_it(readme_files: dict[str, str]) -> None:
    named = {word for command in commands("README.md") for word in command.arguments if re.fullmatch(r"\w+\.yaml", word)}
    assert named == set(readme_files)


# --- adding.md -------------------------------------------------------------------------------------------------------


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parts of docs/adding.md as a package outside the repository."""
    folder = tmp_path / "my_lab"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for block in blocks("docs/adding.md", "python"):
        title = re.match(r'"""([\w ]+):', block)
        assert title
        (folder / f"{title[1].lower().replace(' ', '_')}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_documented_objective_is_reached_by_its_dotted_name_and_is_what_it_says(my_lab: Path) -> None:  # noqa: ARG001

    (block,) = blocks("docs/adding.md", "yaml")
    objective = Objective.model_validate(yaml.safe_load(block)["objective"])
    batch = textbook.make_batch(7)
    tiled = ContrastSettings(method="tiled", tile_rows=3, tile_columns=2)
    loss = contrastive_loss(objective, Pairs(batch.x, batch.y), batch.scale, settings=tiled, mesh=Mesh.single()).loss
    logits = (batch.scale * batch.x @ batch.y.T).tolist()
    rows = [max(0.0, 2.0 + max(row[:i] + row[i + 1 :]) - row[i]) for i, row in enumerate(logits)]
    columns = [max(0.0, 2.0 + max(row[j] for i, row in enumerate(logits) if i != j) - logits[j][j]) for j in range(7)]
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 7, rel=1e-12)


def test_the_documented_parts_make_a_run(my_lab: Path) -> None:

    settings: dict[str, Any] = tiny.tiny_run(my_lab, my_lab / "squares")
    settings["towers"]["image"] = {"name": "my_lab.pooled_pixels", "side": 2, "width": 6}
    settings["pair_kinds"]["image_text"]["objective"] = "my_lab.hardest"
    model = build_model(validate(Run, settings))
    assert model.tower("image").embed_dim == 6


def test_the_documented_rows_are_packed(my_lab: Path, tmp_path: Path) -> None:  # noqa: ARG001

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("two_dogs", "a_cat"):
        (pictures / f"{name}.png").write_bytes(png(1))
    rows = open_rows(pictures, kind="my_lab.file_names")
    assert [(row.name, row.captions) for row in rows.read()] == [("a_cat.png", ("a cat",)), ("two_dogs.png", ("two dogs",))]


# --- links -----------------------------------------------------------------------------------------------------------


def test_relative_links_lead_somewhere() -> None:
    found = [(name, link) for name in documents() for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8"))]
    assert ("README.md", "docs/adding.md") in found
    relative = [(name, link.partition("#")[0]) for name, link in found if not link.startswith(("https://", "http://", "#"))]
    assert not [(name, link) for name, link in relative if not (ROOT / name).parent.joinpath(link).exists()]


def test_files_that_documents_name_exist() -> None:
    """Paths in code spans and prose such as clipscale/data/shards.py or configs/demo.yaml."""
    folders = "clipscale|data_tools|configs|launch|tests|docs|examples|docker"
    path = re.compile(rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:py|yaml|md|sh|sbatch))\b")
    named = {(name, found) for name in documents() for found in path.findall((ROOT / name).read_text(encoding="utf-8"))}
    wrong = {(name, found) for name, found in named if not (ROOT / found).exists() and not (ROOT / name).parent.joinpath(found).exists()}
    assert not {(name, found) for name, found in wrong if "NAME" not in found}
