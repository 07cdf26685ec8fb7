"""The image's files: pinned, linted, run as nobody special, without a compiler; what they name is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line.strip()
]
COMPILERS = r"\b(?:gcc|g\+\+|cc|clang|build-essential|nvcc|make|rustc|cargo)\b"


def last_stage() -> list[tuple[str, str]]:
    start = max(number for number, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM")
    return [(word, rest) for word, rest in INSTRUCTIONS[start:]]


def of(word: str) -> list[str]:
    return [rest for found, rest in INSTRUCTIONS if found == word]


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--no-color", ROOT / "docker" / "Dockerfile"], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_stage_starts_from_the_one_base_which_is_pinned_by_digest() -> None:
    assert re.fullmatch(r"BASE_IMAGE=[\w./:-]+@sha256:[0-9a-f]{64}", of("ARG")[0])
    assert [rest.split()[0] for rest in of("FROM")] == ["${BASE_IMAGE}"] * 2


def test_packages_come_with_the_versions_of_constraints_txt_alone() -> None:
    installs = list(re.findall(r"pip install [^&\n]*", DOCKERFILE))
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)


def test_the_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    words = [word for word, _ in last_stage()]
    user = dict(last_stage())["USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert words.count("USER") == 1
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :]), "what is made after USER could be changed by that user"


def test_the_image_holds_no_compiler_and_no_package_manager_runs_in_it() -> None:
    commands = [rest for word, rest in last_stage() if word == "RUN"]
    assert not [command for command in commands if re.search(COMPILERS + r"|\bapt|\bpip\b", command)]
    assert re.search(COMPILERS, " ".join(of("RUN"))), "the first stage has one, or this test looks for nothing"


def test_the_health_check_is_the_doctor() -> None:
    (check,) = of("HEALTHCHECK")
    assert check.endswith('CMD ["clipscale", "doctor", "--quick"]')


def test_all_that_is_copied_exists_and_is_let_through_by_dockerignore() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for rest in of("COPY") if not rest.startswith("--from") for word in rest.split()[:-1]]
    assert {"pyproject.toml", "launch", "docker/entrypoint.sh"} <= set(sources)
    assert not [source for source in sources if not (ROOT / source).exists()]
    assert not [source for source in sources if not any(source == name or source.startswith(f"{name}/") for name in let_through)]


def test_no_secret_is_an_argument_or_variable_of_the_build() -> None:
    assert not re.search(r"(?i)token|secret|password|api_?key", " ".join(of("ARG") + of("ENV")))


def test_the_entry_point_shows_its_words_and_runs_nothing(tmp_path: Path) -> None:
    for arguments in ([], ["--help"]):
        done = subprocess.run([ROOT / "docker" / "entrypoint.sh", *arguments], text=True, capture_output=True, check=False, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines()[2:6]] == ["train", "eval", "shards", "doctor"]


# --- triton without a compiler ---------------------------------------------------------------------------------------


def test_triton_compiles_its_driver_module_and_nothing_else() -> None:
    """Earlier versions compiled a launcher for every kernel; another call of the compiler must be met in docker/triton_driver.py."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton is not installed")
    folder = Path(spec.origin).parent
    calls = {
        (str(path.relative_to(folder)), name)
        for path in [*(folder / "runtime").rglob("*.py"), *(folder / "backends" / "nvidia").rglob("*.py")]
        for name in re.findall(r"(?<!def )\bcompile_module_from_src\(\s*src=(\S+)", path.read_text())
    }
    assert calls == {("backends/nvidia/driver.py", "Path(os.path.join(dirname,")}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here; the image's first stage has one")
def test_the_driver_module_is_made_without_a_gpu_and_asks_for_the_hosts_driver(tmp_path: Path) -> None:
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists() or importlib.util.find_spec("triton") is None:
        pytest.skip("Python's headers or triton are missing here")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, ROOT / "docker" / "triton_driver.py"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (module,) = [Path(line) for line in done.stdout.splitlines()]
    assert tmp_path in module.parents
    assert b"libcuda.so.1\0" in module.read_bytes()
    driver = importlib.util.spec_from_file_location("triton_driver", ROOT / "docker" / "triton_driver.py")
    assert driver is not None
    assert driver.loader is not None
    program = importlib.util.module_from_spec(driver)
    driver.loader.exec_module(program)
    (tmp_path / "host").mkdir()
    program._write_stand_in(tmp_path / "host" / "libcuda.so.1")  # in the place of a host's driver
    if tell := shutil.which("file"):  # the module's hash holds what this program says of the interpreter, where it is installed
        (tmp_path / "host" / "file").symlink_to(tell)
    host = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "PATH"), str(tmp_path / "host"))
    ask = "from triton.backends.nvidia.driver import CudaUtils; print(callable(CudaUtils().launch))"
    loaded = subprocess.run([sys.executable, "-c", ask], env={**environment, **host}, text=True, capture_output=True, check=False)
    assert (loaded.stdout.strip(), loaded.returncode) == ("True", 0), loaded.stderr


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def manifest() -> dict[str, Any]:
    service, job = yaml.safe_load_all((ROOT / "docker" / "kubernetes.yaml").read_text())
    assert (service["kind"], service["spec"]["clusterIP"], job["kind"]) == ("Service", "None", "Job")
    return dict(job["spec"])


def test_pods_run_as_the_images_user_with_nothing_to_gain() -> None:
    pod = manifest()["template"]["spec"]
    user = dict(last_stage())["USER"].split(":")[0]
    assert (pod["securityContext"]["runAsNonRoot"], str(pod["securityContext"]["runAsUser"])) == (True, user)
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])


def test_pods_can_write_where_the_image_writes_and_meet_at_the_first_of_them() -> None:
    spec = manifest()
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["initContainers"], *pod["containers"]]:
        places = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in places.values()} == volumes
        assert {"/workspace", "/dev/shm", "/var/cache/clipscale", "/tmp"} == {path for path in places if not places[path].get("readOnly")}
    (train,) = pod["containers"]
    settings = {entry["name"]: entry.get("value") for entry in train["env"]}
    assert settings["NNODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert settings["RDZV_ENDPOINT"] == f"clipscale-0.{pod['subdomain']}:29500"
    assert train["args"][0] == "train"
