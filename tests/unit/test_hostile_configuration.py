"""Configurations that somebody else wrote: they are plain data, bounded, and can name nothing outside their place."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from commands import clipscale
from making_data import png, write_dataset
from tiny import tiny_run

from clipscale import checkpoints
from clipscale.config import Run, validate
from clipscale.data.opening import open_dataset
from clipscale.data.shards import ShardWriter
from clipscale.errors import ConfigError, DataError
from clipscale.yaml_reading import parse_yaml

OUTSIDE = [
    "..",
    ".",
    "",
    "../x",
    "../../x",
    "x/../../y",
    "/x",
    "/etc/passwd",
    "//host/x",
    "x/y",
    "./x",
    "~/x",
    "~",
    ".hidden",
    "x\0y",
    "x\ny",
    "..\\x",
    "C:\\x",
    "file:x",
    "s3:x/y",
    "$HOME",
    "x;y",
    "x y/",
    "%2e%2e%2fx",
    "\u2024\u2024/x",
    "x\u202ey",
    "a" * 300 + "/../b",
]
"""Names that lead, or might lead, out of the folder they belong to. 27 of them at four places."""


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_no_run_name_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name: "):
        validate(Run, tiny_run(tmp_path, tmp_path, name=name))


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_no_sample_key_or_shard_name_leads_out_of_its_tar(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(DataError), ShardWriter(inside, "000000") as writer:
        writer.write(name, captions=["a"], image=png(1))
    with pytest.raises(DataError), ShardWriter(inside, name) as writer:
        writer.write("a", captions=["a"], image=png(1))
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", [2])


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_no_index_names_a_shard_outside_its_data_set(name: str, dataset: Path, tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(dataset / "index.parquet")
    table = table.set_column(table.column_names.index("shard"), table.schema.field("shard"), pyarrow.array([name]))
    folder = tmp_path / "below" / "set"
    folder.mkdir(parents=True)
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for suffix in (".tar", ".parquet"):  # what it would reach if the name were followed
        (tmp_path / f"x{suffix}").write_bytes((dataset / f"000000{suffix}").read_bytes())
    pyarrow.parquet.write_table(table, folder / "index.parquet")
    with pytest.raises(DataError, match="no plain file name; refused"):
        open_dataset(folder)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if "\0" not in name], ids=ascii)
def test_no_manifest_makes_a_checkpoint_of_files_elsewhere(name: str, tmp_path: Path) -> None:
    """The checkpoint is whole, and its manifest lists one file more, with the right sum: it lies outside."""
    tensors = {"model": {"w": torch.zeros(1)}, "optimizer": {"w/m": torch.zeros(1)}}
    folder = checkpoints.save(tmp_path / "checkpoints", step=1, tensors=tensors, state={}, config="")
    assert checkpoints.find_newest(tmp_path / "checkpoints") == (folder, [])
    for outside in (tmp_path / "checkpoints" / "x", tmp_path / "x"):
        outside.write_bytes(b"secret")
    listed = {"bytes": 6, "sha256": sha256(b"secret").hexdigest()}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: listed}, indent=1))
    newest, damaged = checkpoints.find_newest(tmp_path / "checkpoints")
    assert newest is None
    assert len(damaged) == 1


def test_names_that_stay_inside_are_fine(tmp_path: Path) -> None:
    for name in ("demo", "ViT-B_16.v2", "0"):
        assert validate(Run, tiny_run(tmp_path, tmp_path, name=name)).run_folder.parent == tmp_path


# --- YAML ------------------------------------------------------------------------------------------------------------

TAGS = [
    "!!python/object/apply:os.system ['touch PLACE']",
    "!!python/object/new:subprocess.Popen [['touch', 'PLACE']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:clipscale.config.Run {}",
    "!!python/tuple [1, 2]",
    "!!binary {}",
    "!include /etc/passwd",
    "!ENV ${HOME}",
]


@pytest.mark.parametrize("text", TAGS)
def test_tags_are_refused_and_run_nothing(text: str, tmp_path: Path) -> None:
    place = tmp_path / "made"
    config = tmp_path / "run.yaml"
    config.write_text(f"name: {text.replace('PLACE', str(place))}\n")
    status, said = clipscale("config", config)
    assert status == 2
    assert str(config) in said
    assert "Traceback" not in said
    assert not place.exists()
    with pytest.raises(ConfigError, match="the override"):
        parse_yaml(text, place="the override 'x'")


def bomb(levels: int) -> str:
    """A text of ten lines that holds 10^levels words with its aliases written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (bomb(5), "more than 100,000 values"),
        (bomb(40), "more than 100,000 values"),
        ("a: &a [*a]", "an alias that holds itself"),
        ("a: &a {b: {c: *a}}", "an alias that holds itself"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 5_000 + "1" + "}" * 5_000, "nested too deeply"),
        ("a: 2026-02-30", "not readable"),
        ("a: 1\n--- \nb: 2", "not readable"),
    ],
    ids=["bomb", "large bomb", "itself", "itself below", "brackets", "braces", "no date", "two documents"],
)
def test_texts_that_unfold_are_refused_before_they_do(text: str, what: str) -> None:
    """Unfolded, the large bomb would outlive any test."""
    with pytest.raises(ConfigError, match=what):
        parse_yaml(text, place="x.yaml")


def test_aliases_within_reason_are_read() -> None:
    assert parse_yaml("a: &a [1, 3e-4]\nb: *a\nc: {d: 1, e: *a}", place="x") == {
        "a": [1, 3e-4],
        "b": [1, 3e-4],
        "c": {"d": 1, "e": [1, 3e-4]},
    }
    assert len(parse_yaml(bomb(4), place="x")["a3"]) == 10
