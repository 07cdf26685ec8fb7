"""Training batches: every sample once an epoch, the same batches for any ranks, workers and restarts; bad samples keep their slot."""

from __future__ import annotations

import gc
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from making_data import encoded, recording, tone, write_dataset
from PIL import Image

from clipscale.data.sample import Batch, caption_id
from clipscale.data.shards import ShardWriter, write_index
from clipscale.data.sources import Source
from clipscale.data.sources.shards import Shards
from clipscale.data.stream import check_sources, evaluation_batches, training_batches
from clipscale.errors import ConfigError, DataError, ShardError
from clipscale.inputs import ImageInput, Input, Modality, SpeechInput, TextInput
from clipscale.settings import find_part

# Python 3.12 warns of forks in processes with threads; torch's loader forks while no other thread holds a lock of ours.
# The loader warns of more workers than cores; the claim holds for any number.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]


def spelled(captions: list[str]) -> dict[str, torch.Tensor]:
    """Captions as their first 12 bytes."""
    tokens = torch.tensor([list(caption.encode()[:12].ljust(12, b"\0")) for caption in captions]).long()
    return {"tokens": tokens, "mask": (tokens > 0).long()}


INPUTS: dict[Modality, Input] = {
    "image": ImageInput(size=8),
    "speech": SpeechInput(max_seconds=1.0),
    "text": TextInput(spelled, 12),
}


def batches(sources: dict[str, Source], count: int, *, start: int = 0, speech: bool = False, **settings: Any) -> list[Batch]:
    modalities: tuple[Modality, Modality] = ("speech" if speech else "image", "text")
    settings = {"kind": "pairs", "modalities": modalities, "inputs": INPUTS, "global_batch": 12, "seed": 1, "start_batch": start} | settings
    return list(itertools.islice(training_batches(sources, **settings), count))


def content(batch: Batch) -> list[tuple[object, ...]]:
    """Everything in a batch, row by row; recordings without their padding."""
    rows: list[tuple[object, ...]] = []
    for row, key in enumerate(batch.keys):
        values: list[object] = [key, batch.captions[row], int(batch.caption_ids[row]), int(batch.seeds[row]), bool(batch.valid[row])]
        for modality, tensors in sorted(batch.inputs.items()):
            for name, tensor in sorted(tensors.items()):
                kept = tensor[row, : int(tensors["length"][row])] if (modality, name) == ("speech", "waveform") else tensor[row]
                values.append(hashlib.sha256(kept.numpy().tobytes()).hexdigest())
        rows.append(tuple(values))
    return rows


def sources_of(folder: Path, *, speech: bool = False, **settings: Any) -> dict[str, Source]:
    """Two sources of uneven shards: 17 and 9 samples, weights 1 and 2."""
    if not (folder / "one").exists():
        write_dataset(folder / "one", [7, 1, 9], speech=speech)
        write_dataset(folder / "two", [4, 5], speech=speech)
    return {"one": Shards(url=str(folder / "one"), **settings), "two": Shards(url=str(folder / "two"), weight=2.0, **settings)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sources_of(folder, speech=True)
    return folder


def test_two_epochs_hold_every_sample_exactly_twice(tmp_path: Path) -> None:
    source: dict[str, Source] = {"uneven": Shards(url=str(write_dataset(tmp_path, [7, 1, 9, 3, 4])))}
    read = batches(source, 4)  # 4 batches of 12 are 2 epochs of 24
    epochs = [Counter(key for batch in half for key in batch.keys) for half in (read[:2], read[2:])]
    assert epochs == [Counter(f"{number:06d}" for number in range(24))] * 2
    assert read[0].keys != read[2].keys


def test_each_sample_comes_with_its_own_picture_and_caption(both: Path) -> None:
    for batch in batches(sources_of(both), 6):
        for row, key in enumerate(batch.keys):
            number = int(key)
            assert batch.captions[row] in (f"{number}", f"number {number}")
            assert batch.inputs["image"]["pixels"][row, :, 4, 4].tolist() == [number, 0, 0]
            assert bytes(batch.inputs["text"]["tokens"][row].tolist()).rstrip(b"\0").decode() == batch.captions[row]
            assert batch.caption_ids[row] == caption_id(batch.captions[row])


@pytest.mark.parametrize("speech", [False, True], ids=["images", "speech"])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_ranks_reads_the_same_global_batches(both: Path, world: int, speech: bool) -> None:
    whole = [content(batch) for batch in batches(sources_of(both), 5, speech=speech)]
    ranks = [[content(batch) for batch in batches(sources_of(both), 5, speech=speech, rank=rank, world=world)] for rank in range(world)]
    assert [[row for rank in ranks for row in rank[number]] for number in range(5)] == whole


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("speech", [False, True], ids=["images", "speech"])
def test_any_number_of_workers_reads_the_same_batches(both: Path, workers: int, speech: bool) -> None:
    alone = [content(batch) for batch in batches(sources_of(both), 8, speech=speech)]
    assert [content(batch) for batch in batches(sources_of(both), 8, speech=speech, workers=workers)] == alone


@pytest.mark.parametrize("start", range(1, 8))
def test_a_run_resumed_at_any_batch_sees_what_the_uninterrupted_one_saw(both: Path, start: int) -> None:
    uninterrupted = [content(batch) for batch in batches(sources_of(both), 8)]
    assert [content(batch) for batch in batches(sources_of(both), 8 - start, start=start)] == uninterrupted[start:]


def test_the_cache_of_decoded_samples_changes_nothing(both: Path) -> None:
    for speech in (False, True):
        plain = [content(batch) for batch in batches(sources_of(both), 8, speech=speech)]
        assert [content(batch) for batch in batches(sources_of(both, cache_decoded=True), 8, speech=speech)] == plain


def test_cached_samples_are_not_read_again(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [12])
    stream = training_batches(
        {"a": Shards(url=str(folder), cache_decoded=True)}, kind="k", modalities=("image", "text"), inputs=INPUTS, global_batch=12, seed=0
    )
    first = next(stream)
    for path in folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert next(stream).valid.all()
    assert first.valid.all()


def test_sources_are_mixed_exactly_by_weight(both: Path) -> None:
    """Weights 1 and 2 over 12 batches of 12: 48 and 96 rows; source two has 9 samples, so 96 rows are 10 epochs and 6 rows."""
    order = training_batches(sources_of(both), kind="k", modalities=("image", "text"), inputs=INPUTS, global_batch=12, seed=1).order
    rows = [order.batch(number) for number in range(12)]
    assert [np.bincount(row.source).tolist() for row in rows] == [[4, 8]] * 12
    times = Counter(int(sample) for row in rows for sample in row.sample[row.source == 1])
    assert set(times.values()) == {10, 11}
    assert sum(times.values()) == 96
    assert order.epochs(12) == {"one": pytest.approx(48 / 17), "two": pytest.approx(96 / 9)}


def test_other_seeds_give_other_orders_and_other_augmentation(both: Path) -> None:
    one, other = batches(sources_of(both), 1), batches(sources_of(both), 1, seed=2)
    assert one[0].keys != other[0].keys
    assert not set(one[0].seeds.tolist()) & set(other[0].seeds.tolist())


def test_augmentation_seeds_differ_by_sample_and_epoch_and_not_by_rank(tmp_path: Path) -> None:
    source: dict[str, Source] = {"a": Shards(url=str(write_dataset(tmp_path, [12])))}
    seeds = [seed for batch in batches(source, 20) for seed in batch.seeds.tolist()]
    assert len(set(seeds)) == 240


def test_every_caption_is_used(tmp_path: Path) -> None:
    source: dict[str, Source] = {"a": Shards(url=str(write_dataset(tmp_path, [12])))}
    used = Counter(caption for batch in batches(source, 20) for caption in batch.captions)
    assert set(used) == {text for number in range(12) for text in (f"{number}", f"number {number}")}
    assert sum(count for caption, count in used.items() if caption.startswith("number")) == pytest.approx(120, abs=31)  # four deviations


def broken(folder: Path, *, speech: bool = False) -> Path:
    """A data set of 12 in which samples 3 (a flipped byte) and 7 (a picture, or recording, that ends early) are bad."""
    good = write_dataset(folder, [12], speech=speech)
    offset = pyarrow.parquet.read_table(good / "000000.parquet").column("image_offset")[3].as_py()
    with ShardWriter(good, "000000") as writer:
        for number in range(12):
            picture = encoded(Image.new("RGB", (8, 8), (number, 0, 0)))
            sound = recording(tone(0.1)) if speech else None
            if number == 7:
                picture, sound = picture[:-30], sound and sound[: len(sound) // 2]
            writer.write(f"{number:06d}", captions=[f"{number}"], image=picture, speech=sound)
    write_index(good, [writer.info])
    offset = pyarrow.parquet.read_table(good / "000000.parquet").column("image_offset")[3].as_py()
    data = bytearray((good / "000000.tar").read_bytes())
    data[offset + 5] ^= 1
    (good / "000000.tar").write_bytes(data)
    return good


@pytest.mark.parametrize("speech", [False, True], ids=["images", "speech"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_keeps_its_slot_and_the_next_ones_do_not_shift(tmp_path: Path, workers: int, speech: bool) -> None:
    whole = batches({"a": Shards(url=str(write_dataset(tmp_path / "whole", [12], speech=speech)))}, 3, speech=speech)
    hurt = batches({"a": Shards(url=str(broken(tmp_path / "hurt", speech=speech)))}, 3, speech=speech, workers=workers)
    for good, bad in zip(whole, hurt, strict=True):
        lost = {row for row, key in enumerate(good.keys) if int(key) in (3, 7)}
        assert {row for row in range(12) if not bad.valid[row]} == lost
        assert [key for row, key in enumerate(bad.keys) if row not in lost] == [key for row, key in enumerate(good.keys) if row not in lost]
        assert torch.equal(bad.seeds, good.seeds)
        for tensors in bad.inputs.values():
            assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
        name, modality = ("waveform", "speech") if speech else ("pixels", "image")
        assert not any(bad.inputs[modality][name][row].any() for row in lost)  # type: ignore[index]


def test_bad_samples_are_named_with_source_and_reason(tmp_path: Path) -> None:
    (batch,) = batches({"photos": Shards(url=str(broken(tmp_path)))}, 1)
    reasons = {bad.key: (bad.source, bad.reason) for bad in batch.bad}
    assert {source for source, _ in reasons.values()} == {"photos"}
    assert "png picture is damaged" in reasons["000007"][1]
    assert sum("sample '000003' is not the one that was written" in reason for _, reason in reasons.values()) == 1


def test_a_shard_lost_during_the_run_loses_only_its_own_samples(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [6, 6])
    stream: Iterator[Batch] = training_batches(
        {"a": Shards(url=str(folder))}, kind="k", modalities=("image", "text"), inputs=INPUTS, global_batch=12, seed=0
    )
    (folder / "000001.parquet").unlink()
    batch = next(stream)
    assert sorted(key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid) == [
        f"{number:06d}" for number in range(6)
    ]
    assert len(batch.bad) == 6
    assert all("000001.parquet is gone" in bad.reason for bad in batch.bad)


def test_reading_draws_nothing_from_the_global_generators(both: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    batches(sources_of(both), 2, workers=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index,union-attr]


def test_workers_outlive_a_signal_to_the_whole_process_group(both: Path) -> None:
    """The rank must be able to finish its step and save; its workers end with it."""
    stream = training_batches(sources_of(both), kind="k", modalities=("image", "text"), inputs=INPUTS, global_batch=12, seed=1, workers=2)
    wanted = [content(batch) for batch in batches(sources_of(both), 12)]
    found = [content(next(stream))]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker, stop in itertools.product(workers, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)):
        assert worker.pid is not None
        os.kill(worker.pid, stop)
    found += [content(next(stream)) for _ in range(11)]
    assert found == wanted
    del stream
    gc.collect()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_global_batch_that_does_not_divide_is_refused(both: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch 12 is not a multiple of 5 ranks; nearest that fit: 10, 15"):
        batches(sources_of(both), 1, world=5)


def test_checking_names_the_source_and_what_it_lacks(tmp_path: Path, both: Path) -> None:
    silent: dict[str, Source] = {"photos": Shards(url=str(write_dataset(tmp_path / "silent", [3])))}
    with pytest.raises(DataError, match="source 'photos' of pair kind 'spoken' must give speech, but it holds none"):
        check_sources(silent, kind="spoken", modalities=("speech", "text"))
    with ShardWriter(tmp_path, "000000") as writer:
        writer.write("a", captions=["a"], image=encoded(Image.new("L", (8, 8))))
        writer.write("b", captions=["b"], speech=recording(tone(0.1)))
    write_index(tmp_path, [writer.info])
    with pytest.raises(DataError, match="must give image, but 1 of its 2 samples have none"):
        check_sources({"mixed": Shards(url=str(tmp_path))}, kind="k", modalities=("image", "text"))
    with pytest.raises(DataError, match="pair kind 'k' has no sources"):
        check_sources({}, kind="k", modalities=("image", "text"))
    with pytest.raises(DataError, match="there is no such folder"):
        check_sources({"gone": Shards(url=str(tmp_path / "gone"))}, kind="k", modalities=("image", "text"))
    assert set(check_sources(sources_of(both), kind="k", modalities=("image", "text"))) == {"one", "two"}


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_reads_each_row_on_exactly_one_rank(both: Path, world: int) -> None:
    source = Shards(url=str(both / "one"))
    seen: dict[int, str] = {}
    for rank in range(world):
        for batch in evaluation_batches(
            source, modalities=("image", "speech", "text"), inputs=INPUTS, batch_size=3, rank=rank, world=world
        ):
            assert len(batch.keys) <= 3
            for row, key, record, captions, pixels in zip(
                batch.rows.tolist(), batch.keys, batch.records, batch.captions, batch.inputs["image"]["pixels"], strict=True
            ):
                assert row not in seen
                assert record["label"] == int(key) == pixels[0, 0, 0]
                assert captions == [f"{int(key)}", f"number {int(key)}"]
                seen[row] = key
    assert seen == {row: f"{row:06d}" for row in range(17)}


def test_evaluation_leaves_nothing_out(tmp_path: Path) -> None:
    source = Shards(url=str(broken(tmp_path)))
    with pytest.raises(ShardError, match=r"evaluation set .*cannot be read: .*sample '000003' is not the one that was written"):
        list(evaluation_batches(source, modalities=("image",), inputs=INPUTS, batch_size=4))


def test_shards_are_found_by_name_and_refuse_nonsense() -> None:
    assert find_part(Source, "shards") is Shards
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Shards(url="x", weight=-1.0)


@pytest.mark.parametrize("caption", ["", " \x00 "])
def test_a_caption_of_nothing_is_no_caption(tmp_path: Path, caption: str) -> None:
    with ShardWriter(tmp_path, "000000") as writer:
        writer.write("a", captions=["\x00" if not caption.strip() else caption], image=encoded(Image.new("L", (8, 8))))
    write_index(tmp_path, [writer.info])
    (batch,) = batches({"a": Shards(url=str(tmp_path))}, 1)
    assert not batch.valid.any()
    assert "every caption is empty" in batch.bad[0].reason


# --- length buckets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speech", [False, True], ids=["images", "speech"])
def test_buckets_hold_the_same_samples_over_every_k_batches_whatever_ranks_and_workers(both: Path, speech: bool) -> None:
    sources = sources_of(both)
    plain = [content(batch) for batch in batches(sources, 8, speech=speech)]
    whole = [content(batch) for batch in batches(sources, 8, speech=speech, bucket_batches=4)]
    assert whole != plain
    for begin in (0, 4):
        assert Counter(row for batch in whole[begin : begin + 4] for row in batch) == Counter(
            row for batch in plain[begin : begin + 4] for row in batch
        )
    ranks = [batches(sources, 8, speech=speech, bucket_batches=4, rank=rank, world=3, workers=rank) for rank in range(3)]
    assert [[row for rank in ranks for row in content(rank[number])] for number in range(8)] == whole
    assert [content(batch) for batch in batches(sources, 3, start=5, speech=speech, bucket_batches=4)] == whole[5:]


def test_buckets_are_formed_by_length_and_all_ranks_take_the_same(both: Path) -> None:
    """Recordings of 0.05 s plus 1 ms for each number: the buckets of four batches split them into four ranges, for every rank."""
    stream = [batches(sources_of(both), 4, speech=True, bucket_batches=4, rank=rank, world=2) for rank in range(2)]
    ranges = []
    for ranks in zip(*stream, strict=True):
        lengths = torch.cat([rank.inputs["speech"]["length"] for rank in ranks])
        assert [len(rank.keys) for rank in ranks] == [6, 6]
        ranges.append((int(lengths.min()), int(lengths.max())))
    ranges.sort()
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(ranges))
    assert ranges[0][1] < ranges[3][0]


def test_padding_is_counted(both: Path) -> None:
    for batch in batches(sources_of(both), 2, speech=True):
        waveform, length = batch.inputs["speech"]["waveform"], batch.inputs["speech"]["length"]
        assert batch.filled["speech"] == (sum(length.tolist()), waveform.shape[0] * waveform.shape[1])
        assert batch.filled["text"] == (sum(len(caption) for caption in batch.captions), 12 * 12)  # tokens are bytes here


def test_a_lost_sidecar_ends_a_run_with_buckets(tmp_path: Path) -> None:
    """Ranks would otherwise form other batches than each other."""
    folder = write_dataset(tmp_path, [6, 6])
    stream = training_batches(
        {"a": Shards(url=str(folder))}, kind="k", modalities=("image", "text"), inputs=INPUTS, global_batch=6, seed=0, bucket_batches=2
    )
    (folder / "000001.parquet").unlink()
    with pytest.raises(ShardError, match=r"length buckets need every sidecar.*000001.parquet is gone"):
        next(stream)


def test_what_each_source_took_is_told(both: Path) -> None:
    (batch,) = batches(sources_of(both), 1)
    assert {name: took["rows"] for name, took in batch.reading.items()} == {"one": 4, "two": 8}
    assert all(took["seconds"] > 0 for took in batch.reading.values())
