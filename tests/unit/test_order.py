"""The order of samples: exact epochs, exact shares, the same for any number of ranks, nothing kept."""

from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import pytest

from clipscale.data.mix import Mix
from clipscale.data.order import Order, Rows, permutation


def random_case(seed: int) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, int | None]]:
    """Uneven shards (some empty) of two sources, their weights, and an order with tiny lanes and blocks."""
    rng = np.random.default_rng(seed)
    sizes = {name: rng.integers(0, 9, size=rng.integers(1, 8)) for name in ("a", "b")}
    for size in sizes.values():
        size[0] += 1
    weights = {"a": 1.0, "b": float(rng.choice([0.5, 1.0, 2.5]))}
    settings = {
        "seed": seed,
        "global_batch": int(rng.integers(1, 5)) * 12,
        "lanes": [None, 1, 2, 5][seed % 4],
        "block": int(rng.integers(1, 12)),
    }
    return sizes, weights, settings  # type: ignore[return-value]


def make(case: int) -> Order:
    sizes, weights, settings = random_case(case)
    return Order(sizes, weights, **settings)  # type: ignore[arg-type]


def joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("case", range(24))
def test_every_epoch_holds_every_sample_once(case: int) -> None:
    sizes, _, _ = random_case(case)
    order = make(case)
    rows = joined([order.batch(number) for number in range(40)])
    for place, name in enumerate(order.names):
        mine = rows.source == place
        whole = int(rows.epoch[mine].max())  # the last epoch is under way
        assert whole >= 2
        for epoch in range(whole):
            chosen = mine & (rows.epoch == epoch)
            read = Counter(zip(rows.shard[chosen].tolist(), rows.place[chosen].tolist(), strict=True))
            assert read == Counter((shard, place) for shard, size in enumerate(sizes[name]) for place in range(size))
            assert sorted(rows.sample[chosen]) == list(range(sizes[name].sum()))


@pytest.mark.parametrize("case", range(12))
def test_ranks_together_read_the_global_batch_whatever_their_number(case: int) -> None:
    order = make(case)
    for number in (0, 3, 17):
        whole = order.batch(number)
        for world in (2, 3, 4, 12):
            fresh = make(case)
            assert same(joined([fresh.batch(number, rank=rank, world=world) for rank in range(world)]), whole)


@pytest.mark.parametrize("case", range(12))
def test_batches_asked_for_in_any_order_are_the_same(case: int) -> None:
    order, other = make(case), make(case)
    wanted = [order.batch(number) for number in range(20)]
    for number in np.random.default_rng(case).permutation(20).tolist():
        assert same(other.batch(number), wanted[number])


def test_epochs_differ_and_so_do_seeds() -> None:
    def samples(seed: int) -> list[list[int]]:
        order = Order({"a": np.array([50, 50])}, {"a": 1}, seed=seed, global_batch=100)
        return [order.batch(number).sample.tolist() for number in range(3)]

    drawn = [*samples(0), *samples(1)]
    assert all(sorted(batch) == list(range(100)) for batch in drawn)
    assert len({tuple(batch) for batch in drawn}) == 6


def test_shards_come_in_another_order_in_each_epoch() -> None:
    """What stands in the first block of an epoch is drawn anew, not only its order."""
    order = Order({"a": np.full(20, 5)}, {"a": 1}, seed=0, global_batch=100, block=10)
    firsts = [frozenset(order.batch(number).shard[:10].tolist()) for number in range(5)]
    assert all(len(first) == 2 for first in firsts)
    assert len(set(firsts)) == 5


def test_another_source_does_not_change_a_sources_order() -> None:
    alone = Order({"a": np.array([30])}, {"a": 1}, seed=3, global_batch=30).batch(0)
    mixed = Order({"b": np.array([7]), "a": np.array([30])}, {"b": 1, "a": 1}, seed=3, global_batch=60).batch(0)
    assert mixed.sample[mixed.source == 1].tolist() == alone.sample.tolist()


def test_shares_are_exact() -> None:
    """5 : 2 : 1 of 4000 rows."""
    order = Order({name: np.array([3]) for name in "abc"}, {"a": 5, "b": 2, "c": 1}, seed=0, global_batch=4000)
    assert np.bincount(order.batch(0).source).tolist() == [2500, 1000, 500]


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [3, 1, 1, 2], [1e-4, 1], [1 / 3, 2 / 3], [0.123456789, 1]])
def test_shares_never_stray_and_never_shrink(weights: list[float]) -> None:
    mix = Mix.of({str(place): weight for place, weight in enumerate(weights)})
    counts = mix.counts(np.arange(5000))
    wanted = np.arange(5000) * (np.array(weights) / sum(weights))[:, None]
    assert np.array_equal(counts.sum(0), np.arange(5000))
    assert set(np.unique(np.diff(counts, axis=1))) <= {0, 1}
    assert np.abs(counts - wanted).max() <= 1.01


def test_shares_stay_exact_after_a_trillion_rows() -> None:
    counts = Mix.of({"a": 0.999999, "b": 0.000001}).counts(np.array([10**12]))
    assert counts[:, 0].tolist() == [999_999_000_000, 1_000_000]


def test_every_rank_gets_of_every_source() -> None:
    order = Order({"a": np.array([100]), "b": np.array([100])}, {"a": 3, "b": 1}, seed=0, global_batch=64)
    shares = [np.bincount(order.batch(0, rank=rank, world=4).source).tolist() for rank in range(4)]
    assert shares == [[12, 4]] * 4


def test_a_rank_stays_in_few_shards() -> None:
    order = Order({"a": np.full(100_000, 10_000)}, {"a": 1}, seed=0, global_batch=65_536)
    touched = [len(np.unique(order.batch(5, rank=rank, world=8).shard)) for rank in range(8)]
    assert max(touched) <= 18  # 2 of 16 lanes each, 7 to 9 shards of 10,000 in a block of 65,536


def test_a_billion_samples_start_at_once() -> None:
    begin = time.process_time()
    Order({"a": np.full(100_000, 10_000)}, {"a": 1}, seed=0, global_batch=4096).batch(50_000)
    assert time.process_time() - begin < 2  # the design asks for 1 s; 0.3 s measured


def test_one_block_is_shuffled_as_a_whole() -> None:
    """Neighbours in storage land as far apart as random numbers do: a third of the length on average."""
    sample = Order({"a": np.full(10, 1000)}, {"a": 1}, seed=0, global_batch=10_000).batch(0).sample
    place = np.argsort(sample)
    assert np.abs(np.diff(place)).mean() == pytest.approx(10_000 / 3, rel=0.05)


def test_progress_is_told_in_epochs() -> None:
    order = Order({"a": np.array([30]), "b": np.array([10])}, {"a": 1, "b": 1}, seed=0, global_batch=20)
    assert order.epochs(3) == {"a": 1.0, "b": 3.0}


def test_permutation_is_what_it_was() -> None:
    """Runs resume under later versions: neither numpy nor we may change this."""
    digest = hashlib.sha256(permutation("0/a/block/0/0/0", 1000).astype("<i8").tobytes()).hexdigest()
    assert permutation("0/a", 8).tolist() == [3, 0, 2, 6, 5, 4, 1, 7]
    assert digest == "c82bcd7550b057709e8589db95404889a64a3065bfe4e4e5aeb872d8e7cbd280"
