"""Plans: time, exchanges, failures and what would fit, against figures worked out by hand or published."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import yaml

from clipscale import cli
from clipscale.config import Run, validate
from clipscale.engines._footprint import Collective
from clipscale.errors import ConfigError
from clipscale.planning.command import Made, make
from clipscale.planning.goodput import goodput
from clipscale.planning.gpus import Gpu, catalogue, find_gpu
from clipscale.planning.ledger import Work
from clipscale.planning.memory import Layout, fullest, state_of
from clipscale.planning.passes import Passes
from clipscale.planning.plan import Plan, Planner
from clipscale.planning.timing import Exchange, _by_link, seconds_of

ARCHITECTURES = Path(__file__).parents[1] / "architectures"
GPU = {
    "memory_gib": 1.0,
    "tflops": {"fp32": 1.0, "bf16": 2.0},
    "memory_gb_s": 100.0,
    "node_gb_s": 10.0,
    "network_gb_s": 1.0,
    "dollars_per_hour": 2.0,
}


def settings(**changes: Any) -> dict[str, Any]:
    """Settings of a run of pictures and captions whose data are never read."""
    kind = {
        "modalities": ["image", "text"],
        "sources": {"none": {"name": "shards", "url": "none"}},
        "objective": "clip",
        "global_batch": 512,
    }
    towers = {
        "image": {"name": "open_clip_image", "architecture": "small-vit"},
        "text": {"name": "open_clip_text", "architecture": "small-vit"},
    }
    given = {"name": "planned", "steps": 1000, "embed_dim": 16, "towers": towers, "pair_kinds": {"pairs": kind}}
    return {**given, "engine": "ddp", "optimizer": {"lr": 1e-3}, "checkpoints": {"every_steps": 100}, **changes}


@pytest.fixture(autouse=True, scope="module")
def _small_architectures() -> None:
    open_clip.add_model_config(ARCHITECTURES)


def made(tmp_path: Path, *, nodes: int = 1, gpus_per_node: int = 2, gpu: dict[str, Any] | None = None, **changes: Any) -> Made:
    """A plan on a GPU of this file."""
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump({**GPU, **(gpu or {})}))
    return make(validate(Run, settings(**changes)), nodes=nodes, gpu=str(file), gpus_per_node=gpus_per_node)


# --- towers on shapes ------------------------------------------------------------------------------------------------


def test_a_published_architecture_has_its_published_size_and_flops() -> None:
    """open_clip's docs/model_profile.csv: ViT-B-32 151.28 M parameters, 14.78 GFLOPs forwards for a pair."""
    towers = {name: {"name": f"open_clip_{name}", "architecture": "ViT-B-32"} for name in ("image", "text")}
    passes = Passes(validate(Run, settings(towers=towers, embed_dim=512)), device="cuda", rounding="autocast")
    projections, own = 2 * 512 * 512, 1  # ours: a projection a tower; the scale is open_clip's too
    assert sum(parameter.numel() for parameter in passes.model.parameters()) - projections == pytest.approx(151.28e6, rel=1e-4, abs=own)
    one = passes.train({"pairs": 2}, held=True)
    assert sum(one.forward.flops) / 2 == pytest.approx(14.78e9, rel=2e-3)
    assert sum(one.backward.flops) / sum(one.forward.flops) == pytest.approx(2, rel=0.03), "but for the first layer's input"


def test_an_estimate_is_the_line_through_what_was_counted() -> None:
    passes = Passes(validate(Run, settings()), device="cpu", rounding="autocast")
    counted, estimated = passes.train({"pairs": 96}, held=True), passes.estimate({"pairs": 96}, held=True, again=False, anchor=32)
    assert (estimated.kept, estimated.peak) == (counted.kept, pytest.approx(counted.peak, rel=0.01))


def test_gradients_made_in_the_backward_pass_are_told_apart_from_activations() -> None:
    passes = Passes(validate(Run, settings()), device="cpu", rounding="autocast")
    weights = 4 * sum(parameter.numel() for parameter in passes.model.parameters())
    held, fresh = (passes.train({"pairs": 2}, held=held) for held in (True, False))
    assert held.gradients_at_peak == 0
    assert 0 < fresh.gradients_at_peak <= weights
    assert fresh.peak - fresh.gradients_at_peak <= held.peak <= fresh.peak


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 2.0), ("lamb", 2.0), ("adafactor", 0.5)])
def test_an_optimizer_keeps_what_its_paper_says(optimizer: str, numbers: float) -> None:
    run = validate(Run, settings(optimizer={"name": optimizer, "lr": 1e-3}))
    weights = 4 * sum(parameter.numel() for parameter in Passes(run, device="cpu", rounding="autocast").model.parameters())
    kept = state_of(run).bytes / weights
    assert kept == pytest.approx(numbers, rel=0.01) if optimizer != "adafactor" else kept < numbers


# --- time and exchanges ----------------------------------------------------------------------------------------------


def test_an_operator_takes_the_longest_of_its_products_its_bytes_and_its_start() -> None:
    gpu = validate(Gpu, {**GPU, "products": 0.5, "streaming": 0.5, "launch_us": 10.0})
    work = Work()
    work.add(10**12, 10**9)  # 10^12 at half of 10^12 a second: 2 s
    work.add(10**9, 10**11)  # 10^11 at half of 10^11 a second: 2 s
    work.add(1, 1)
    assert seconds_of(work, gpu, 1e12) == pytest.approx(4 + 1e-5)


def test_a_ring_over_nodes_brings_each_node_its_bytes_once() -> None:
    layout = Layout(world=16, data_ranks=16, ranks_per_node=8, micro_batch=1, share=1)
    crossed = _by_link(Collective("gradients", "all_reduce", 1600, 16), layout)
    assert (crossed.bytes, crossed.network_bytes) == (2 * 1500, 2 * 800 // 8)
    inside = _by_link(Collective("weights", "all_gather", 1600, 8), layout)
    assert (inside.node_bytes, inside.network_bytes) == (1400, 0)
    copies = _by_link(Collective("copies", "all_reduce", 800, 2, stride=8), layout)
    assert (copies.node_bytes, copies.network_bytes) == (0, 800)
    assert Exchange("", "", 3 * 10**9, 10**9, hidden=True).seconds(validate(Gpu, {**GPU, "links": 0.5})) == pytest.approx(2 * (0.3 + 1))


@pytest.mark.parametrize(
    ("rate", "gpus", "share"), [("Llama 3", 64, 0.9971), ("OPT", 64, 0.9944), ("Llama 3", 1024, 0.9861), ("OPT", 1024, 0.9692)]
)
def test_goodput_is_that_of_young_and_daly(rate: str, gpus: int, share: float) -> None:
    """By hand: C = 10 s, R = 600 s; one Llama 3 failure in 50,677 GPU-hours, one of OPT's in 14,814."""
    told = goodput(rate, gpus=gpus, save_s=10.0, interval_s=3600.0)
    assert told.share == pytest.approx(share, abs=6e-5)
    assert told.best_interval_s == pytest.approx(math.sqrt(2 * 10 * told.hours_between * 3600))
    assert told.share_as_set < told.share


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_adds_up() -> None:
    planner = Planner(validate(Run, settings(micro_batch=32)), gpu_name="own", gpu=validate(Gpu, GPU), gpus_per_node=2)
    plan = planner.plan(2)
    assert plan.gpus == 4
    assert plan.samples_per_second == pytest.approx(512 / plan.step.total)
    assert plan.hours == pytest.approx(1000 * plan.step.total / 3600)
    assert plan.dollars == pytest.approx(plan.expected_hours * 4 * 2.0)
    assert plan.expected_hours > plan.hours
    phases = plan.step.by_phase
    assert sum(phases.values()) == plan.step.total
    one = planner.sizes.pass_by("autocast").train({"pairs": 32}, held=True)
    assert phases["encode"] == pytest.approx(2 * 4 * seconds_of(one.forward, plan.gpu, 1e12)), "cached gradients encode twice"
    assert plan.mfu == pytest.approx(plan.step.flops / plan.step.total / 1e12)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    gpu = validate(Gpu, {**GPU, "memory_gib": 0.012})
    planner = Planner(validate(Run, settings(micro_batch=16)), gpu_name="small", gpu=gpu, gpus_per_node=2)
    largest = planner.plan(1).largest_micro_batch
    share = 256
    parts = math.ceil(share / largest)

    def needs(count: int) -> int:
        return fullest(planner.sizes, Layout(2, 2, 2, math.ceil(share / count), share)).total

    assert 1 < parts < share
    assert needs(parts) <= gpu.limit_bytes * 1.01
    assert needs(parts - 1) > gpu.limit_bytes * 0.99


def test_what_does_not_fit_is_told_what_to_change_and_the_change_fits(tmp_path: Path) -> None:
    told = made(tmp_path, gpus_per_node=1, gpu={"memory_gib": 0.02}, engine="local", precision="bf16")
    assert not told.asked.fits
    assert told.advice
    assert all(one.plan.fits for one in told.advice)
    assert [one.plan.step.total for one in told.advice] == sorted(one.plan.step.total for one in told.advice)
    assert [one.change for one in told.advice if one.change.startswith("micro_batch=")]


def test_no_change_is_told_that_does_not_help(tmp_path: Path) -> None:
    hopeless = made(tmp_path, gpus_per_node=1, gpu={"memory_gib": 0.0001}, engine="local", precision="bf16")
    assert (hopeless.asked.largest_micro_batch, hopeless.advice) == (0, [])


def test_more_parts_of_weights_take_less_memory_and_more_bytes() -> None:
    engines = ("ddp", {"name": "fsdp2", "gathered": "block"})
    runs = (validate(Run, settings(engine=engine, micro_batch=32)) for engine in engines)
    whole, cut = (Planner(run, gpu_name="own", gpu=validate(Gpu, GPU), gpus_per_node=2).plan(2) for run in runs)
    for what in ("weights", "optimizer state", "gradients"):
        held = [plan.moments[-1].bytes[what] for plan in (whole, cut)]
        assert held[0] / held[1] == pytest.approx(4, rel=0.05)
    assert sum(each.bytes for each in cut.exchanges) > sum(each.bytes for each in whole.exchanges)


def test_every_gpu_of_the_catalogue_is_one() -> None:
    assert len(catalogue()) >= 8
    for name in catalogue():
        gpu = find_gpu(name)
        assert gpu.memory_gib > 4
        assert gpu.flops("fp32") <= max(gpu.tflops.values()) * 1e12
    assert find_gpu("A100") == find_gpu("a100-80")


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({}, {"gpu": "h10"}, "there is no GPU 'h10' in the catalogue, did you mean 'h100'"),
        ({}, {"gpu": "none.yaml"}, "none.yaml: cannot be read"),
        ({}, {"nodes": 0}, "--nodes 0: a run needs at least 1"),
        ({}, {"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({}, {"nodes": 3}, "global_batch 512 is not a multiple of the 24 ranks; nearest that fit: 504, 528"),
        ({"engine": "local"}, {}, "engine 'local' is for one process"),
        ({"precision": "bf16"}, {"gpu": "v100"}, "no rate for precision bf16"),
        ({"engine": {"name": "fsdp2", "tensor_ranks": 2}}, {}, "tensor ranks"),
        ({"contrast": {"method": "dense"}}, {}, "dense"),
    ],
)
def test_wrong_requests_are_refused_with_what_to_do(changes: dict[str, Any], options: dict[str, Any], told: str) -> None:
    asked = {"nodes": 1, "gpu": "h100", "gpus_per_node": None, **options}
    with pytest.raises(ConfigError, match=told):
        make(validate(Run, settings(**changes)), **asked)


def test_the_command_writes_json_and_a_page_and_ends_with_2_for_wrong_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, page, figures = tmp_path / "run.yaml", tmp_path / "plan.html", tmp_path / "plan.json"
    config.write_text(yaml.safe_dump(settings(name="a-run")))
    arguments = ["clipscale", "plan", str(config), "--nodes", "2", "--gpus-per-node", "2", "--page", str(page), "--json", str(figures)]
    assert ended(monkeypatch, arguments) == 0
    assert "a-run on 4 h100 in 2 nodes fits" in " ".join(capsys.readouterr().out.split())
    written = json.loads(figures.read_text())
    assert [row["nodes"] for row in written["sweep"]] == [1, 2]
    assert written["plan"]["memory_bytes"] == max(sum(moment.values()) for moment in written["plan"]["moments_bytes"].values())
    text = page.read_text()
    assert text.count("data-chart") == 4
    assert not [word for word in ("http://", "https://", '<link rel="stylesheet') if word in text]
    assert ended(monkeypatch, [*arguments[:3], "--gpu", "abacus"]) == 2
    assert "there is no GPU 'abacus'" in capsys.readouterr().err


def ended(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_pair_kinds_that_are_rarer_count_by_their_share_of_steps() -> None:
    plans: list[Plan] = []
    for every in (1, 4):
        kind = settings()["pair_kinds"]["pairs"]
        run = validate(Run, settings(pair_kinds={"often": kind, "seldom": {**kind, "every": every}}, micro_batch=64))
        plans.append(Planner(run, gpu_name="own", gpu=validate(Gpu, GPU), gpus_per_node=2).plan(1))
    assert [plan.samples_per_step for plan in plans] == [1024, 640]
    ratio = np.divide(*[plan.step.by_phase["backward"] for plan in plans])
    assert ratio == pytest.approx(1024 / 640, rel=0.01)
