"""The image, really built with buildah and run on the CPU: `make test-image`, a quarter of an hour and 20 GB of temporary disk.

The base is IMAGE_BASE, an image that buildah can find, or else a Debian made by mmdebstrap. This machine's own way to its package mirrors
(configuration of pip and apt, certificates) is mounted while building, and is no part of the image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from small_models import write_tokenizer
from tiny import BERT, tiny_run, write_squares

ROOT = Path(__file__).parents[2]
NAME = "clipscale-under-test"
USER = 1000
MOST_BYTES = 12e9
PACKAGES = "python3,python3-venv,python3-dev,ca-certificates"

if "IMAGE_TESTS" not in os.environ:
    pytest.skip("builds an image, which takes a quarter of an hour: make test-image", allow_module_level=True)
if shutil.which("buildah") is None:
    pytest.skip("buildah is not installed: apt-get install buildah mmdebstrap", allow_module_level=True)
if "IMAGE_BASE" not in os.environ and shutil.which("mmdebstrap") is None:
    pytest.skip("mmdebstrap is not installed, and IMAGE_BASE names no base", allow_module_level=True)

Buildah = Callable[..., str]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Runs buildah on a store of its own, which goes when the tests are over; gives what it printed."""
    place = tmp_path_factory.mktemp("store")
    store = ["--root", place / "root", "--runroot", place / "runroot", "--storage-driver", "vfs"]

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["buildah", *store, *arguments], text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"buildah {' '.join(map(str, arguments))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    yield run
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def base(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base's name."""
    if given := os.environ.get("IMAGE_BASE"):
        return given
    tar = tmp_path_factory.mktemp("base") / "base.tar"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", tar], check=True)
    container = buildah("from", "scratch").strip()
    buildah("add", container, tar, "/")
    buildah("commit", "--rm", container, "local-base")
    tar.unlink()
    return "localhost/local-base"


def ways_to_mirrors() -> list[str]:
    """How this machine reaches packages, as volumes for the build."""
    places = {"/etc/pip.conf": "/etc/pip.conf", str(Path.home() / ".config" / "pip"): "/etc/xdg/pip"}
    places |= {place: place for place in ("/etc/ssl/certs", "/etc/apt/apt.conf.d")}
    return [f"--volume={here}:{there}:ro" for here, there in places.items() if Path(here).exists()]


@pytest.fixture(scope="module")
def image(buildah: Buildah, base: str) -> str:
    """The built image's name."""
    arguments = ["--isolation=chroot", "--format=docker", "--layers=false", *ways_to_mirrors(), f"--build-arg=BASE_IMAGE={base}"]
    buildah("bud", *arguments, "--file", ROOT / "docker" / "Dockerfile", "--tag", NAME, ROOT)
    return NAME


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is mounted as /workspace: raw pictures, shards, a tokenizer and a run's configuration."""
    folder = tmp_path_factory.mktemp("workspace")
    write_squares(folder, samples=48)
    write_tokenizer(folder / "words")
    settings = tiny_run(Path("runs"), Path("squares"), engine="ddp", workers=1)
    settings["towers"]["text"] = {"name": "hf_text", "config": BERT, "tokenizer": "words", "context_length": 16}
    settings["evaluations"] = {
        "captions": {
            "name": "retrieval",
            "queries": {"modality": "image", "source": {"name": "shards", "url": "squares"}},
            "gallery": {"modality": "text"},
        }
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, USER, USER)
    return folder


@pytest.fixture(scope="module")
def inside(buildah: Buildah, image: str, workspace: Path) -> Buildah:
    """Runs a command in a container of the image, as the image's user, in /workspace."""
    container = buildah("from", image).strip()

    def run(*command: str) -> str:
        return buildah("run", "--isolation=chroot", f"--volume={workspace}:/workspace", container, "--", *command)

    return run


def words(*arguments: str) -> list[str]:
    return ["/opt/clipscale/entrypoint.sh", *arguments]


def test_it_is_small_enough_and_says_how_it_is_run(buildah: Buildah, image: str) -> None:
    about = json.loads(buildah("inspect", "--type", "image", image))
    sizes = [layer["size"] for layer in json.loads(about["Manifest"])["layers"]]
    print(f"{sum(sizes) / 1e9:.2f} GB")
    assert 1e9 < sum(sizes) < MOST_BYTES
    config = about["Docker"]["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == words()
    assert config["Healthcheck"]["Test"] == ["CMD", "clipscale", "doctor", "--quick"]


def test_it_runs_as_a_user_that_can_change_nothing_of_the_program(inside: Buildah) -> None:
    assert inside("id", "--user").strip() == str(USER)
    writable = inside("sh", "-c", "find /opt /usr /etc -writable -not -type l 2>/dev/null | head; true")
    assert writable.strip() == ""


def test_it_holds_no_compiler(inside: Buildah) -> None:
    names = ["gcc", "g++", "cc", "c++", "clang", "tcc", "nvcc", "rustc", "make", "cc1"]
    found = inside("find", "/usr", "/opt", "-type", "f", "(", *" -o ".join(f"-name {name}" for name in names).split(), ")", "-perm", "/111")
    assert found.strip() == ""


def test_its_health_check_passes(inside: Buildah) -> None:
    said = inside("clipscale", "doctor", "--quick")
    assert re.search(r"^ok +packages ", said, re.MULTILINE)


def test_its_python_packages_are_those_of_constraints_txt(inside: Buildah) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower().replace("_", "-"), re.MULTILINE))
    code = "from importlib.metadata import distributions\nfor d in distributions(): print(d.name, d.version)"
    installed = dict(line.lower().replace("_", "-").split() for line in inside("/opt/venv/bin/python", "-c", code).splitlines())
    shared = pins.keys() & installed.keys()
    assert len(shared) > 25
    assert {name: installed[name] for name in shared} == {name: pins[name] for name in shared}


def test_its_words_build_shards_examine_train_and_evaluate(inside: Buildah, workspace: Path) -> None:
    assert "train CONFIG.yaml" in inside(*words("--help"))
    inside(*words("shards", "build", "raw/rows.jsonl", "built"))
    assert (workspace / "built" / "index.parquet").stat().st_uid == USER
    assert "losses image_text" in inside(*words("doctor", "run.yaml"))
    inside(*words("train", "run.yaml"))
    inside(*words("eval", "runs/tiny"))
    environment = json.loads((workspace / "runs" / "tiny" / "environment.json").read_text())
    assert environment["world"] == 2
    assert "captions" in (workspace / "runs" / "tiny" / "evaluation.json").read_text()


def test_the_triton_driver_lies_in_the_cache_that_kernels_use(inside: Buildah) -> None:
    """It asks for the driver, which no machine without a GPU has: triton finds it in its cache, and cannot load it here."""
    inside(*words("parts", "engines"))
    (module,) = inside("find", "/var/cache/clipscale/triton", "-name", "cuda_utils*.so").split()
    load = f"import ctypes; ctypes.CDLL('{module}')"
    assert "libcuda.so.1: cannot open shared object file" in inside("sh", "-c", f'python3 -c "{load}" 2>&1; true')
    ask = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
    assert "compiled module cuda_utils.so could not be loaded" in inside(
        "sh", "-c", f'mkdir -p none; touch none/libcuda.so.1; TRITON_LIBCUDA_PATH=none python3 -c "{ask}" 2>&1; true'
    )
