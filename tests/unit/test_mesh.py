"""One rank alone needs no process group, and a senseless environment is refused."""

from __future__ import annotations

import pytest
import torch

from clipscale.errors import ConfigError
from clipscale.parallel.mesh import start, stop


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_main_rank_on_the_cpu():
    mesh = start("cpu")
    assert (mesh.rank, mesh.world, mesh.is_main, mesh.device.type) == (0, 1, True, "cpu")
    assert mesh.gather_objects(("a", 1)) == [["a", 1]]
    assert mesh.all_reduce_max(7) == 7
    assert mesh.all_reduce_sum(torch.tensor(2.0)).item() == 2.0
    mesh.barrier()
    stop(mesh)


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2x"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}])
def test_a_senseless_environment_is_refused(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"RANK|WORLD_SIZE"):
        start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="use 'auto' or 'cpu'"):
        start("cuda")
