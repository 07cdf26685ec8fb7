"""Random numbers by key: the published generator, uniform, and independent of everything but the key."""

from __future__ import annotations

import pytest
import torch

from clipscale.data.random_numbers import between, combined, splitmix64, uniform, white_noise


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs for seed 1234567, from the reference implementation at prng.di.unimi.it."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    step = 0x9E3779B97F4A7C15 - 2**64
    state, found = torch.tensor([1234567]), []
    for _ in wanted:
        found.append(int(splitmix64(state)) % 2**64)
        state = state + step
    assert found == wanted


def test_numbers_depend_on_their_key_and_purpose_alone() -> None:
    seeds = torch.tensor([3, -8, 2**63 - 1])
    together = uniform(seeds, 5, purpose="a")
    assert torch.equal(together, torch.cat([uniform(seeds[row : row + 1], 5, purpose="a") for row in range(3)]))
    assert torch.equal(together[:, :2], uniform(seeds, 2, purpose="a"))
    assert len(set(together.flatten().tolist()) | set(uniform(seeds, 5, purpose="b").flatten().tolist())) == 30


def test_numbers_are_uniform_and_independent() -> None:
    """Over neighbouring keys, as they are used: means, variances and correlations within four standard deviations."""
    numbers = uniform(torch.arange(100_000), 3, purpose="test")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    torch.testing.assert_close(numbers.mean(0), torch.full((3,), 0.5).double(), atol=4 * 0.289 / 316, rtol=0)
    torch.testing.assert_close(numbers.var(0), torch.full((3,), 1 / 12).double(), atol=4 * 0.0745 / 316, rtol=0)
    side_by_side = torch.cat([numbers[:-1], numbers[1:]], dim=1)
    correlations = torch.corrcoef(side_by_side.T) - torch.eye(6)
    assert correlations.abs().max() < 4.5 / 316


def test_between_stays_between() -> None:
    numbers = between(torch.arange(10_000), -2, 6, purpose="test")
    assert numbers.min() >= -2
    assert numbers.max() <= 6
    assert numbers.mean().item() == pytest.approx(2, abs=0.1)


def test_white_noise_is_uniform_and_white() -> None:
    noise = white_noise(torch.arange(40), 20_001, purpose="test")
    assert noise.dtype == torch.float32
    assert torch.equal(noise[3:4], white_noise(torch.tensor([3]), 20_001, purpose="test"))
    assert -1 <= noise.min() < -0.999
    assert 0.999 < noise.max() < 1
    assert noise.mean().item() == pytest.approx(0, abs=4 * 0.577 / 894)
    assert noise.square().mean().item() == pytest.approx(1 / 3, abs=4 * 0.298 / 894)
    for lag in range(1, 9):
        assert (noise[:, lag:] * noise[:, :-lag]).mean().abs() < 4.5 / 3 / 894


def test_combined_keys_are_all_different() -> None:
    epochs, samples = torch.cartesian_prod(torch.arange(50), torch.arange(200)).T
    assert (
        len(set(combined(1, epochs, samples).tolist()) | set(combined(1, samples, epochs).tolist())) == 20_000 - 50 * 50
    )  # pairs that both hold
