"""Secrets: filled in where an address is opened, refused in configurations, and found in nothing that a run leaves or says."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import clipscale
from tiny import tiny_run, write_squares
from unreliable_server import UnreliableServer, unreliable_server

from clipscale import checkpoints
from clipscale.checkpoints import CheckpointStore
from clipscale.config import load_run, to_yaml
from clipscale.credentials import filled_in, options_filled_in, redacted, refuse_literal_secrets
from clipscale.data.store import Reading, Store
from clipscale.errors import CheckpointError, ConfigError, DataError, ShardError
from clipscale.run_folder import write_environment

PASSWORD = "gr8-Secret/of+mine"
"""With signs that an address spells otherwise."""
SPELLED = "gr8-Secret%2Fof%2Bmine"
# Put together here, so that no scanner of repositories takes them for real ones.
AWS, HUGGING_FACE, GITHUB = "AK" + "IAIOSFODNN7EXAMPLE", "hf" + "_" + "abcdefghijklmnopqrst", "gh" + "p_" + "a1B2" * 9


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), samples=24)


@pytest.fixture
def server(squares: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableServer]:
    """Serves the squares to who knows the password, which the environment holds as an address spells it."""
    pytest.importorskip("aiohttp", reason="reading over http needs aiohttp: pip install 'clipscale[http]'")
    monkeypatch.setenv("STORE_PASSWORD", SPELLED)
    with unreliable_server(squares) as about:
        about.authorization = "Basic " + base64.b64encode(f"reader:{PASSWORD}".encode()).decode()
        yield about


def address(server: UnreliableServer) -> str:
    return f"http://reader:${{STORE_PASSWORD}}@127.0.0.1:{server.port}"


def write_config(folder: Path, url: str, **source: Any) -> Path:
    settings = tiny_run(folder / "runs", Path("x"), steps=2, evaluations={})
    settings["pair_kinds"]["image_text"]["sources"] = {"squares": {"name": "shards", "url": url, **source}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def holders(folder: Path) -> list[str]:
    """Files that hold the password in any spelling, also inside a page's base64 or an archive's plain bytes."""
    spellings = [PASSWORD, SPELLED, base64.b64encode(f"reader:{PASSWORD}".encode()).decode()]
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and any(spelled.encode() in path.read_bytes() for spelled in spellings)
    ]


def test_a_run_on_a_store_with_a_password_leaves_it_nowhere(server: UnreliableServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, address(server))
    told = [clipscale("train", config), clipscale("report", tmp_path / "runs" / "tiny"), clipscale("config", config)]
    assert [status for status, _ in told] == [0, 0, 0], told
    assert {"000000.tar", "000001.tar"} <= set(server.asked)
    files = [path.name for path in (tmp_path / "runs" / "tiny").rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "events.jsonl", "report.html", "model.safetensors"} <= set(files)
    assert not holders(tmp_path)
    assert not [text for _, text in told if PASSWORD in text or SPELLED in text]
    assert "${STORE_PASSWORD}" in (tmp_path / "runs" / "tiny" / "config.yaml").read_text()


@pytest.mark.parametrize("fault", ["error", "cut", "close"])
def test_a_store_that_fails_is_named_without_its_password(fault: str, server: UnreliableServer, tmp_path: Path) -> None:
    server.faults, server.share = [fault], 1.0
    config = write_config(tmp_path, address(server), reading={"tries": 2, "pause_s": 0.01, "timeout_s": 1.0})
    status, said = clipscale("train", config)
    assert status == 2
    assert f"reader:${{STORE_PASSWORD}}@127.0.0.1:{server.port}" in said
    assert not [spelled for spelled in (PASSWORD, SPELLED) if spelled in said]
    assert not holders(tmp_path)


def test_samples_that_cannot_be_read_are_listed_without_the_password(server: UnreliableServer, tmp_path: Path) -> None:
    server.folder = Path(shutil.copytree(server.folder, tmp_path / "damaged"))
    tar = server.folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"\x89PNG") + 30] ^= 1
    tar.write_bytes(data)
    config = write_config(tmp_path, address(server), reading={"tries": 1})
    status, said = clipscale("train", config, "max_bad_fraction=1.0")
    assert status == 0, said
    (line,) = (tmp_path / "runs" / "tiny" / "bad_samples.jsonl").read_text().splitlines()
    assert "reader:${STORE_PASSWORD}@127.0.0.1" in line
    assert not holders(tmp_path)


def test_the_traceback_of_an_unforeseen_error_does_not_hold_it(
    server: UnreliableServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative").mkdir()
    (tmp_path / "talkative" / "__init__.py").touch()
    (tmp_path / "talkative" / "careless.py").write_text(
        '"""A source of a lab that says too much."""\n'
        "from clipscale.credentials import filled_in\nfrom clipscale.data.sources import Source\n\n\n"
        "class Careless(Source):\n    def open(self):\n        raise RuntimeError(f'cannot open {filled_in(self.url)}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, said = clipscale("train", write_config(tmp_path, address(server), name="talkative.careless"))
    assert status == 1
    assert "Traceback" in said
    assert f"RuntimeError: cannot open http://reader:${{STORE_PASSWORD}}@127.0.0.1:{server.port}" in said
    assert SPELLED not in said


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    status, said = clipscale("train", write_config(tmp_path, "memory://${NOT_SET_ANYWHERE}/squares"))
    assert status == 2
    assert "the environment variable NOT_SET_ANYWHERE is not set" in said
    assert not (tmp_path / "runs").exists()


def test_options_of_a_store_are_filled_in_too(server: UnreliableServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.authorization is not None
    monkeypatch.setenv("STORE_HEADER", server.authorization.removeprefix("Basic "))
    options = {"client_kwargs": {"headers": {"Authorization": "Basic ${STORE_HEADER}"}}}
    config = write_config(tmp_path, server.url, reading={"options": options})
    assert clipscale("train", config)[0] == 0
    assert not holders(tmp_path)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (f"name={AWS}", "name: an access key of AWS"),
        (f"pair_kinds.image_text.sources.squares.url=s3://{AWS}:${{X}}@bucket/a", "url: an access key of AWS"),
        ("pair_kinds.image_text.sources.squares.url=https://me:hunter22@host/a", "url: a password in an address"),
        ("pair_kinds.image_text.sources.squares.url=https://me:hunter22${X}@host/a", "url: a password in an address"),
        ("pair_kinds.image_text.sources.squares.url=https://host/a?X-Amz-Signature=hunter22", "url: a signature or token"),
        (f"towers.text.model={HUGGING_FACE}", "towers.text.model: a token of Hugging Face"),
        (f"evaluations.{GITHUB}=1", "evaluations.(a name): a token of GitHub"),
        ("pair_kinds.image_text.sources.squares.reading.options={secret: hunter22}", "options.secret: a value of its own for 'secret'"),
        ("pair_kinds.image_text.sources.squares.reading.options={key: 'hunter22${X}'}", "options.key: a value of its own for 'key'"),
        (
            "pair_kinds.image_text.sources.squares.reading.options={a: [{Authorization: Bearer hunter22}]}",
            "options.a.0.Authorization: a value of its own",
        ),
        ("logging={notes: '-----BEGIN RSA PRIVATE KEY----- hunter22'}", "logging.notes: a private key"),
    ],
)
def test_a_secret_in_a_configuration_is_refused_and_not_repeated(override: str, what: str, tmp_path: Path) -> None:
    status, said = clipscale("train", write_config(tmp_path, "somewhere"), override)
    assert status == 2
    assert what in said
    assert "write ${VARIABLE} in its place" in said
    assert not [secret for secret in (AWS, HUGGING_FACE, GITHUB, "hunter22") if secret in said]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/a:b@c/d",
        "http://host:8080/a@b",
        "https://me:${PASSWORD}@host/a",
        "https://host/a?token=${TOKEN}&x=1",
        "data/shards/hf_photos",
        "hf_xet",
        "a password in a caption: none",
        "openai/clip-vit-base-patch32",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_is_no_secret_is_let_through(value: str) -> None:
    refuse_literal_secrets({"a": [{"url": value}]})
    assert redacted(value) == value


@pytest.mark.parametrize("option", [{"anon": True}, {"key": "${KEY}"}, {"token": "anon"}, {"token": "keys/service.json"}, {"key": None}])
def test_options_that_hold_no_secret_are_let_through(option: dict[str, Any]) -> None:
    refuse_literal_secrets({"reading": {"options": option}})


def test_a_configuration_keeps_the_variable_and_not_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", SPELLED)
    run = load_run([write_config(tmp_path, "https://me:${STORE_PASSWORD}@host/a")])
    assert "https://me:${STORE_PASSWORD}@host/a" in to_yaml(run)
    assert SPELLED not in repr(run)


def test_filling_in_goes_once_and_into_every_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER_VALUE", "${INNER_VALUE}")
    assert filled_in("a-${OUTER_VALUE}-$OUTER_VALUE") == "a-${INNER_VALUE}-$OUTER_VALUE"
    assert options_filled_in({"a": ["${OUTER_VALUE}", 3, {"b": True}]}) == {"a": ["${INNER_VALUE}", 3, {"b": True}]}
    monkeypatch.setenv("OUTER_VALUE", "")
    with pytest.raises(DataError, match="OUTER_VALUE is not set"):
        filled_in("${OUTER_VALUE}")


def test_all_secrets_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)a\.0: an access.*b: a token") as raised:
        refuse_literal_secrets({"a": [AWS], "b": HUGGING_FACE})
    assert AWS not in str(raised.value)


def test_values_that_stand_in_every_word_are_not_taken_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_VALUE", "a")
    filled_in("${SHORT_VALUE}")
    assert redacted("a cat") == "a cat"


@pytest.mark.parametrize("spelled", ["gr8-Secret/of+mine", "gr8-Secret%2Fof%2Bmine", "gr8-Secret%2Fof%2bmine"])
@pytest.mark.parametrize("value", ["gr8-Secret/of+mine", "gr8-Secret%2Fof%2Bmine"])
def test_a_value_is_redacted_however_it_is_spelled(value: str, spelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPELLED_VALUE", value)
    filled_in("${SPELLED_VALUE}")
    assert redacted(f"cannot reach http://me:{spelled}@host") == "cannot reach http://me:${SPELLED_VALUE}@host"


def test_errors_of_a_store_are_redacted_where_they_are_made(server: UnreliableServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp's hold the address without user and password; here the host stands in the variable."""
    monkeypatch.setenv("STORE_HOST", "127.0.0.1")
    server.faults, server.share, server.authorization = ["error"], 1.0, None
    store = Store(f"http://${{STORE_HOST}}:{server.port}", reading=Reading(tries=1))
    with pytest.raises(ShardError, match=r"ClientResponseError: 500.*http://\$\{STORE_HOST\}:") as raised:
        store.read("index.parquet")
    assert "127.0.0.1" not in str(raised.value)


@pytest.mark.parametrize("argument", ["=https://me:hunter22@host", "https://me:hunter22@host/run.yaml", "a=[https://me:hunter22@host"])
def test_an_argument_with_a_secret_is_not_repeated(argument: str, tmp_path: Path) -> None:
    status, said = clipscale("train", write_config(tmp_path, "somewhere"), argument)
    assert status == 2
    assert "(a password in an address)" in said
    assert "hunter22" not in said


def test_the_recorded_command_holds_no_secret(tmp_path: Path) -> None:
    write_environment(tmp_path, seed=0, device="cpu", world=1, command=["clipscale", "train", AWS])
    command = json.loads((tmp_path / "environment.json").read_text())["command"]
    assert command == ["clipscale", "train", "(an access key of AWS)"]


def test_a_store_of_checkpoints_that_fails_is_named_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden-name").touch()  # no folder can be made below a file
    monkeypatch.setenv("STORE_FOLDER", str(tmp_path / "hidden-name"))
    tensors = {"model": {"w": torch.zeros(1)}, "optimizer": {"w/m": torch.zeros(1)}}
    whole = checkpoints.save(tmp_path / "checkpoints", step=1, tensors=tensors, state={}, config="")
    with pytest.raises(CheckpointError, match="STORE_FOLDER") as raised:
        CheckpointStore("${STORE_FOLDER}/runs").put(whole)
    assert "hidden-name" not in str(raised.value)
