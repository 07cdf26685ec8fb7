"""Files from strangers: whatever a checkpoint, weights or a model folder holds, nothing in it is run."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip
import pytest
import torch
from foreign_models import add_architecture, write_clip_folder
from small_models import write_tokenizer

from clipscale import checkpoints
from clipscale.checkpoints.store import CheckpointStore
from clipscale.errors import CheckpointError, ClipscaleError, RequestError
from clipscale.evaluate import evaluate_checkpoint
from clipscale.foreign import open_foreign
from clipscale.parallel.mesh import Mesh
from clipscale.towers import Tower

ROOT = Path(__file__).parents[2]


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class CallsWithItems(Calls):
    """The same, as the items that an OrderedDict is filled with."""

    def __reduce__(self) -> Any:
        return (OrderedDict, (), None, None, iter([("weight", Calls(*self.call[:1], *self.call[1]))]))


def zipped(content: bytes) -> bytes:
    """A file as torch.save writes it, around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


def saved(item: Any, *, new: bool = True) -> bytes:
    """What torch.save makes of it."""
    stream = io.BytesIO()
    torch.save(item, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle in protocol 4 that calls module.name(argument), written by hand: no import of it needed here."""
    text = [struct.pack("<BB", 0x8C, len(word)) + word.encode() for word in (module, name)]
    return b"\x80\x04" + text[0] + text[1] + b"\x93" + b"X" + struct.pack("<I", len(argument)) + argument.encode() + b"\x85R."


def object_array(item: Any) -> bytes:
    """An .npy file of one object."""
    stream = io.BytesIO()
    np.save(stream, np.array([item], dtype=object), allow_pickle=True)
    return stream.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda mark: saved(Calls(os.system, f"touch {mark}")),
    "os.system, as torch wrote files before 1.6": lambda mark: saved(Calls(os.system, f"touch {mark}"), new=False),
    "os.system, a bare pickle": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")),
    "protocol 0, by hand": lambda mark: zipped(b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."),
    "protocol 4, by hand": lambda mark: zipped(by_name("posix", "system", f"touch {mark}")),
    "eval": lambda mark: saved({"state_dict": {"w": Calls(eval, f"open({str(mark)!r}, 'w').close()")}}),
    "exec": lambda mark: saved(OrderedDict(w=Calls(exec, f"open({str(mark)!r}, 'w').close()"))),
    "os.makedirs, in a list": lambda mark: saved([torch.ones(2), Calls(os.makedirs, str(mark))]),
    "pathlib": lambda mark: saved({"optimizer": {"state": {0: Calls(Path.touch, mark)}}}),
    "a partial": lambda mark: saved(Calls(functools.partial(os.system, f"touch {mark}"))),
    "items of an OrderedDict": lambda mark: saved(CallsWithItems(os.system, f"touch {mark}")),
    "a random state": lambda mark: saved({"rng_state": (3, Calls(os.mkdir, str(mark)), None)}),
    "a pickle in a BytesIO": lambda mark: saved({"extra": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(mark))))}),
    "numpy's object array": lambda mark: object_array(Calls(os.mkdir, str(mark))),
    "a tensor's argument": lambda mark: saved(Calls(torch._utils._rebuild_parameter, Calls(os.mkdir, str(mark)), True, OrderedDict())),
    "torch.load again, without its guard": lambda mark: saved(
        Calls(functools.partial(torch.load, weights_only=False), io.BytesIO(saved(Calls(os.mkdir, str(mark)))))
    ),
}


def unguarded(content: bytes) -> None:
    """As a careless program would read it."""
    if content.startswith(b"\x93NUMPY"):
        np.load(io.BytesIO(content), allow_pickle=True)
    else:
        torch.load(io.BytesIO(content), weights_only=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Hostile files by what they try; one that succeeds leaves tmp_path/run."""
    return {name: make(tmp_path / "run") for name, make in PICKLES.items()}


def test_the_files_would_run_something_where_nobody_takes_care(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert len(files) >= 12
    for name, content in files.items():
        with suppress(Exception):  # that it is no whole file is found too late
            unguarded(content)
        assert (tmp_path / "run").exists(), f"{name} is harmless, and proves nothing"
        shutil.rmtree(tmp_path / "run") if (tmp_path / "run").is_dir() else (tmp_path / "run").unlink()


# --- weights of towers -----------------------------------------------------------------------------------------------


def test_weights_for_open_clip_towers_are_not_run(tmp_path: Path, files: dict[str, bytes]) -> None:
    open_clip.add_model_config(ROOT / "tests" / "architectures")
    for name, content in files.items():
        for suffix in (".pt", ".bin", ".safetensors", ".npz"):
            (tmp_path / f"weights{suffix}").write_bytes(content)
            tower = {"name": "open_clip_image", "architecture": "small-vit", "pretrained": str(tmp_path / f"weights{suffix}")}
            with pytest.raises(RequestError, match="open_clip cannot make"):
                Tower.model_validate(tower).build()
            assert not (tmp_path / "run").exists(), name + suffix


def hugging_face_folder(folder: Path, weights: dict[str, bytes], **config: Any) -> dict[str, Any]:
    """A text tower whose model is this folder."""
    write_tokenizer(folder)
    for name, content in weights.items():
        (folder / name).write_bytes(content)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **sizes, **config}))
    return {"name": "hf_text", "model": str(folder), "context_length": 8}


def test_weights_in_hugging_face_folders_are_not_run(tmp_path: Path, files: dict[str, bytes]) -> None:
    for number, (name, content) in enumerate(files.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        tower = hugging_face_folder(folder, {"pytorch_model.bin": content, "training_args.bin": content, "optimizer.pt": content})
        with pytest.raises(RequestError, match="cannot be loaded"):
            Tower.model_validate(tower).build()
        assert not (tmp_path / "run").exists(), name


def test_code_in_hugging_face_folders_is_not_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a person in a hurry
    folder = tmp_path / "model"
    folder.mkdir()
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    tower = hugging_face_folder(folder, {"own.py": f"open({str(tmp_path / 'run')!r}, 'w')\n".encode()}, model_type="own", auto_map=own)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Own", "auto_map": own}))
    for wanted in (tower, {**tower, "model": None, "config": {"model_type": "bert"}, "tokenizer": str(folder)}):
        with pytest.raises(RequestError, match="cannot be loaded"):
            Tower.model_validate(wanted).build()
        assert not (tmp_path / "run").exists()
    assert "y/N" not in capsys.readouterr().out


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """A small whole one."""
    tensors = {"model": {"w": torch.ones(2)}, "optimizer": {"w/m": torch.ones(2)}}
    return checkpoints.save(folder / "checkpoints", step=1, tensors=tensors, state={}, config="name: x\n")


STRANGE = ["model.pt", ".metadata", "__0_0.distcp", "optimizer.pkl", "latest", "rng_state.pth", "mp_rank_00_model_states.pt", "x.npy"]


def test_files_beside_a_checkpoints_own_are_not_looked_at(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = checkpoint(tmp_path)
    for content in files.values():
        for name in STRANGE:
            (path / name).write_bytes(content)
            (path.parent / name).write_bytes(content)
        with checkpoints.Opening() as opening:
            assert opening.load(opening.find(tmp_path)).tensors["model"]["w"].tolist() == [1, 1]
    assert not (tmp_path / "run").exists()


def test_pickles_under_a_checkpoints_own_names_with_right_sums_are_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = checkpoint(tmp_path)
    whole = json.loads((path / "manifest.json").read_text())
    for name, content in files.items():
        for file in ("model.safetensors", "optimizer.safetensors"):
            before = (path / file).read_bytes()
            (path / file).write_bytes(content)
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (path / "manifest.json").write_text(json.dumps({**whole, file: entry}))
            with pytest.raises(CheckpointError, match=f"{file}: not a file of safetensors"):
                checkpoints.load(path)
            with pytest.raises(ClipscaleError):
                evaluate_checkpoint(tmp_path, Mesh.single(), files=[], overrides=[], output=tmp_path / "out")
            assert not (tmp_path / "run").exists(), name
            (path / file).write_bytes(before)


def test_folders_of_other_programs_are_refused_unread(tmp_path: Path, files: dict[str, bytes]) -> None:
    for number, content in enumerate(files.values()):
        folder = tmp_path / str(number)
        for name in ("latest", "global_step1/mp_rank_00_model_states.pt", "step-1/.metadata", "step-00000001/__0_0.distcp", "epoch_1.pt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for place in (folder, folder / "global_step1", folder / "step-00000001"):
            with pytest.raises(RequestError, match="neither a run folder with a whole checkpoint nor a checkpoint"):
                evaluate_checkpoint(place, Mesh.single(), files=[], overrides=[], output=tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_models_of_other_libraries_are_not_run(tmp_path: Path, files: dict[str, bytes]) -> None:
    architecture = add_architecture(tmp_path / "architectures", "untrusted-clip")
    write_clip_folder(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    for name, content in files.items():
        for place, asked in ((tmp_path / "epoch_1.pt", architecture), (tmp_path / "clip" / "pytorch_model.bin", None)):
            place.write_bytes(content)
            with pytest.raises(RequestError, match=r"epoch_1\.pt|clip"):
                open_foreign(place if asked else place.parent, architecture=asked)
            assert not (tmp_path / "run").exists(), name


def test_only_what_a_stores_manifest_lists_is_fetched(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = checkpoint(tmp_path)
    store = CheckpointStore("memory://untrusted")
    store.put(path)
    for name, content in zip(STRANGE, files.values(), strict=False):
        fsspec.filesystem("memory").pipe_file(f"/untrusted/{path.name}/{name}", content)
    fetched = store.fetch(path.name, tmp_path / "fetched")
    assert {file.name for file in fetched.iterdir()} == {file.name for file in path.iterdir()}
    fsspec.filesystem("memory").rm("/untrusted", recursive=True)


# --- the code itself -------------------------------------------------------------------------------------------------

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "dcp.load", "pandas.read_pickle"}
NAMES = {"load_checkpoint", "read_pickle", "unsafe_load", "FileSystemReader"}
OPTIONS = {("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True)}


def offences(source: str) -> list[str]:
    """What in a module could unpickle, or run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [item.name for item in node.names if item.name.partition(".")[0] in MODULES or "distributed.checkpoint" in item.name]
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.partition(".")[0] in MODULES or "distributed.checkpoint" in node.module else []
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in CALLS or called.rpartition(".")[2] in NAMES else []
            options = {(word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)}
            found += [f"{called}({name}={value})" for name, value in options & OPTIONS]
    return found


def test_no_module_can_unpickle_or_run_what_a_file_says() -> None:
    modules = [path for package in ("clipscale", "data_tools") for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 150
    assert {str(path): offences(path.read_text()) for path in modules if offences(path.read_text())} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint import load",
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "x.y(f, weights_only=False)",
        "np.load(f)",
        "engine.load_checkpoint(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "yaml.load(f)",
    ],
)
def test_what_could_would_be_seen(source: str) -> None:
    assert offences(source)
