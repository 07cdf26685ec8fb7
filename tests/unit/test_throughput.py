"""FLOPs of towers against counts written out by hand; phases and peaks cut where they begin and end; what all ranks' numbers become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny import BERT, TEXT_TOWER, tiny_run, write_squares
from torch.nn import functional

from clipscale import train
from clipscale.config import Run, validate
from clipscale.metrics import read_json_lines
from clipscale.model import Encoders, PreparedKinds, build_encoders
from clipscale.parallel.mesh import Mesh
from clipscale.phases import PHASES, PhaseTimer, StepPhases, phase, timing
from clipscale.progress import Progress
from clipscale.run_model import build_model
from clipscale.throughput import StepTimes
from clipscale.throughput.devices import peak_flops, published
from clipscale.throughput.flops import count_sample
from clipscale.throughput.step import over_ranks, own_numbers
from clipscale.throughput.work import count_work
from clipscale.towers import Tower

ARCHITECTURE = Path(__file__).parents[1] / "contracts" / "towers" / "architectures" / "tiny-vit.json"


def block(tokens: int, width: int, *, hidden: int) -> int:
    """A transformer block, two FLOPs a multiplication: four projections and two of the perceptron, scores and mixing for all heads."""
    projections = 2 * tokens * width * (4 * width + 2 * hidden)
    return projections + 2 * (2 * tokens * tokens * width)


VIT_PATCHES = 2 * 16 * (3 * 8 * 8) * 32  # 32 pixels in patches of 8: 16 of them, 192 numbers to 32
VIT_BLOCK = block(17, 32, hidden=128)  # the patches and the class token
VIT_HEAD = 2 * 32 * 24
VIT = VIT_PATCHES + 3 * VIT_BLOCK + VIT_HEAD


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        ({}, 3 * VIT),
        ({"locked": True}, VIT),
        ({"locked": True, "unlocked_blocks": 1}, VIT + 2 * (VIT_BLOCK + VIT_HEAD)),
        ({"recompute": True}, 3 * VIT),
    ],
)
def test_a_vit_takes_what_its_products_take_and_a_locked_part_no_backward_pass(lock: dict[str, Any], expected: int) -> None:
    open_clip.add_model_config(ARCHITECTURE)
    tower = Tower.model_validate({"name": "open_clip_image", "architecture": "tiny-vit", **lock})
    module = build_encoders({"image": tower}, embed_dim=8, pair_kinds={}, seed=0).tower("image")
    assert count_sample("image", module).counted == {32: expected}


def test_convolutions_take_what_their_kernels_take_at_every_place() -> None:
    tower = Tower.model_validate({"name": "conv_image", "image_size": 16, "channels": [8, 16], "width": 12, "layers": 0})
    first, second, third = 2 * 8 * 8 * 8 * (3 * 9), 2 * 4 * 4 * 16 * (8 * 9), 2 * 4 * 4 * 12 * 16
    assert count_sample("image", tower.build()).counted == {16: 3 * (first + second + third)}


def test_grouped_convolutions_and_running_means_of_a_convnet() -> None:
    """Depthwise kernels see one channel; and counting leaves batch statistics and random numbers as they were."""
    module = Tower.model_validate({"name": "conv_image", "image_size": 8, "channels": [4], "width": 8, "layers": 0}).build()
    module.stem.append(torch.nn.Conv2d(8, 8, 3, padding=1, groups=8))
    module.stem.append(torch.nn.BatchNorm2d(8))
    before, random = {name: tensor.clone() for name, tensor in module.state_dict().items()}, torch.get_rng_state()
    stem = 2 * 16 * 4 * 27 + 2 * 16 * 8 * 4
    assert count_sample("image", module).counted == {8: 3 * (stem + 2 * 16 * 8 * 9)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("frames", [128, 96, 64, 24])
def test_recordings_of_any_length_take_what_their_tokens_take(frames: int) -> None:
    tower = Tower.model_validate({"name": "log_mel_transformer", "num_mels": 20, "width": 32, "layers": 2, "heads": 2, "max_seconds": 1.28})
    stem = 2 * (frames // 2) * 32 * (20 * 3) + 2 * (frames // 4) * 32 * (32 * 3)
    assert count_sample("speech", tower.build()).at(160 * frames) == 3 * (stem + 2 * block(frames // 4, 32, hidden=128))


@pytest.mark.parametrize("tokens", [64, 11])
def test_captions_of_any_length_take_what_their_tokens_take(tokens: int) -> None:
    module = Tower.model_validate({"name": "hf_text", "config": BERT, "tokenizer": TEXT_TOWER["tokenizer"]}).build()
    assert count_sample("text", module).at(tokens) == 3 * block(tokens, 32, hidden=32)


# --- a step of a run ---------------------------------------------------------------------------------------------------


def image_text_run(folder: Path, **changes: Any) -> Run:
    """An image tower of two convolutions, a trained text tower of one block; no data."""
    made = tiny_run(folder, folder / "none", **changes)
    made["towers"] = {
        "image": {"name": "conv_image", "image_size": 16, "channels": [8], "width": 16, "layers": 0},
        "text": {"name": "hf_text", "config": BERT, "tokenizer": TEXT_TOWER["tokenizer"]},
    }
    return validate(Run, made)


IMAGE = 2 * 64 * 8 * 27 + 2 * 64 * 16 * 8 + 2 * 16 * 16  # two convolutions and the projection of 16 numbers to 16
TEXT = block(7, 32, hidden=32) + 2 * 32 * 16
CONTRAST = 3 * 2 * 12 * 12 * 16  # logits of 12 pairs, and a gradient for either side


def rows(count: int) -> PreparedKinds:
    """Prepared rows of the one pair kind: captions of 7 tokens."""
    tokens = torch.zeros(count, 7, dtype=torch.int64)
    return {"image_text": {"image": {"pixels": torch.zeros(count, 3, 16, 16)}, "text": {"tokens": tokens, "mask": tokens}}}


def model_and_work(run: Run) -> tuple[Encoders, Any]:
    model = build_model(run)
    return model, count_work(run, model, Mesh.single(), data_ranks=1)


def test_a_step_takes_its_rows_and_the_products_of_the_loss(tmp_path: Path) -> None:
    _, work = model_and_work(image_text_run(tmp_path))
    assert work.of(rows(12)) == 12 * 3 * (IMAGE + TEXT) + CONTRAST


def test_a_tower_that_cannot_be_counted_is_told_and_nothing_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = image_text_run(tmp_path)
    model = build_model(run)
    model.tower("image").stem = torch.nn.ModuleList([torch.nn.Linear(5, 5)])  # type: ignore[assignment]
    assert count_work(run, model, Mesh.single(), data_ranks=1) is None
    assert "FLOPs are not counted, and MFU is left out: RuntimeError: mat1 and mat2" in capsys.readouterr().err


def test_a_runs_timings_add_up_and_say_what_it_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text tower is locked and its captions cached: it is not counted."""
    made = tiny_run(tmp_path, write_squares(tmp_path, samples=24), steps=3, micro_batch=5, logging={"peak_tflops": 0.5})
    made["towers"]["image"] = {"name": "conv_image", "image_size": 16, "channels": [8], "width": 16, "layers": 0}
    run = validate(Run, made)
    train.train(run, Mesh.single())
    lines = read_json_lines(run.run_folder / "timings.jsonl")
    assert len(lines) == 3
    for line in lines:
        assert set(line["phases"]) == set(PHASES)
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=1e-12)
        assert all(line["phases"][name] > 0 for name in ("data", "prepare", "encode", "contrast", "backward", "optimizer"))
        assert line["phases"]["communication"] == 0
        assert line["flops"] == 12 * 3 * IMAGE + CONTRAST
        assert line["tflops_per_second"] == pytest.approx(line["flops"] / line["seconds"] / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)
    assert [line["phases"]["checkpoint"] > 0 for line in lines] == [False, False, True], "it was written after step 2"
    assert "MFU 0.0%" in capsys.readouterr().err


# --- phases ------------------------------------------------------------------------------------------------------------


class Script:
    """A clock and an account of memory that say what they are told to."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers: Iterator[int] = iter(numbers)

    def now(self) -> int:
        return next(self.numbers)

    def take(self) -> int:
        return next(self.numbers)

    def offsets(self, moments: Sequence[int]) -> list[int]:
        return [moment - moments[0] for moment in moments]

    def close(self) -> None:
        """Nothing."""


def test_time_belongs_to_the_innermost_phase_and_peaks_to_the_outermost() -> None:
    timer = PhaseTimer(Script([100, 103, 110, 130, 131, 140, 145, 160, 161]), Script([7, 20, 9, 30, 8, 6, 5]))
    timer.enter("contrast")  # 3 of other before; peak 7
    timer.enter("communication")  # 7 of contrast
    timer.leave()  # 20 of communication
    timer.leave()  # 1 of contrast; peak 20
    timer.enter("communication")  # 9 of other; peak 9
    timer.leave()  # 5 of communication; peak 30
    step = timer.end_step()  # 15 of other; peak 8
    assert {name: time for name, time in step.nanoseconds.items() if time} == {"contrast": 8, "communication": 25, "other": 27}
    assert step.peak_bytes == {"other": 9, "contrast": 20, "communication": 30}
    timer.enter("data")  # the next step begins where this one ended: 1 of other
    assert timer._before == ["other"]


def test_a_phase_that_fails_is_over_and_without_a_timer_costs_nothing() -> None:
    with timing(torch.device("cpu")) as timer:
        with pytest.raises(KeyError), phase("encode"), phase("communication"):
            raise KeyError
        step = timer.end_step()
    assert step.nanoseconds["encode"] > 0 < step.nanoseconds["communication"]
    with phase("encode"):
        assert timer._before == []


def test_what_a_phase_held_is_its_peak_and_not_the_next_ones() -> None:
    """Linux' account: 64 MiB that are written in one phase and gone before the next; other tests' garbage may move it by a few."""
    with timing(torch.device("cpu")) as timer:
        with phase("encode"):
            torch.ones(2**24).sum()
        with phase("backward"):
            functional.relu(torch.ones(8))
        peaks = timer.end_step().peak_bytes
    if not peaks:
        pytest.skip("this system lets no process reset its peak")
    assert peaks["encode"] - peaks["backward"] == pytest.approx(2**26, rel=0.2)


# --- all ranks ---------------------------------------------------------------------------------------------------------


def told(*, flops: int | None = 10**12, **seconds: int) -> list[int]:
    """What a rank tells after phases of whole seconds."""
    times = {name: seconds.get(name, 0) * 10**9 for name in PHASES}
    return own_numbers(StepPhases(times, {"encode": 100 * seconds["encode"]}), flops)


def test_ranks_numbers_become_means_the_longest_and_who_was_slowest() -> None:
    times = over_ranks([told(data=1, encode=2, communication=3), told(data=1, encode=5), told(encode=3, communication=3)], peak_flops=1e12)
    assert times.seconds == 6
    assert (times.phases["encode"], times.longest["encode"], times.slowest_rank) == (10 / 3, 5, 1)
    assert times.peak_bytes == {"encode": 500}
    assert times.mfu == pytest.approx(3 / 6 / 3)  # 3·10¹² FLOPs in 6 seconds on 3 devices of 10¹² each
    record = times.record()
    assert record["phases_longest"]["communication"] == 3
    assert record["slowest_rank"] == 1


def test_what_is_not_known_is_absent() -> None:
    unknown = over_ranks([told(encode=2, flops=None), told(encode=2)], peak_flops=1e12).record()
    assert not {"flops", "tflops_per_second", "mfu"} & set(unknown)
    without_peak = over_ranks([told(encode=2)], peak_flops=None)
    assert without_peak.record()["tflops_per_second"] == 0.5
    assert "mfu" not in without_peak.record()
    assert "phases_longest" not in without_peak.record(), "one rank is its own mean"


def test_rates_of_cards_are_those_of_their_data_sheets() -> None:
    assert published("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert published("NVIDIA H100 PCIe", "bf16") == 756e12
    assert published("NVIDIA H200", "fp16") == 989e12
    assert published("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert published("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12, "torch does not use tf32 unless it is told to"
    assert published("NVIDIA L40S", "bf16") == 362e12
    assert published("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert published("Tesla V100-SXM2-32GB", "bf16") is None, "it has none"
    assert published("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None, "a slice of a card"
    assert published("Radeon", "fp32") is None
    assert peak_flops(torch.device("cpu"), precision="fp32", told=None) is None
    assert peak_flops(torch.device("cpu"), precision="fp32", told=2.0) == 2e12


def test_the_progress_line_tells_mfu_where_there_is_one_and_else_what_was_achieved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = image_text_run(tmp_path, logging={"print_every_steps": 1})
    record = {"step": 1, "kinds": {"image_text": {"loss": 1.0, "scale": 14.0}}}
    with Progress(run, first_step=0, shown=True) as progress:
        for peak in (2e12, None):
            times: StepTimes = over_ranks([told(encode=1, data=1)], peak_flops=peak)
            progress.show(record, times)
    first, second = capsys.readouterr().err.splitlines()
    assert "6 samples/s  MFU 25.0%  image_text loss 1.000" in first
    assert "data wait 50%" in first
    assert "6 samples/s  0.5 TFLOP/s  image_text" in second
