"""Each sample exactly once an epoch, the same global batches on any number of ranks, from any step."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.formats.codes import CodesReader
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.formats.tar_index import read_index, scan_index
from instella_ray.data.loading.image_data import ImageData
from instella_ray.data.loading.loader import CaptionChoice, CodesData, Mixture, Prefetcher
from instella_ray.data.loading.order import BatchPlan, EpochOrder, FileOrder, SampleOrder, sample_uniforms, split_epochs
from instella_ray.errors import UserError

from ...kit.codes import write_codes
from ...kit.shards import image_bytes

ROOT = Path(__file__).parents[3]
RANKS = st.sampled_from([1, 2, 4])


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 9))
@settings(max_examples=60)
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(count, seed, epoch)[np.arange(count)].tolist()) == list(range(count))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60)
def test_an_order_by_files_is_a_permutation_with_few_files_open(sizes: list[int], window: int, epoch: int) -> None:
    starts = np.cumsum([0, *sizes])
    count = int(starts[-1])
    order = FileOrder(starts, 5, epoch, window)
    samples = order[np.arange(count)]
    assert sorted(samples.tolist()) == list(range(count))
    assert np.array_equal(order[np.arange(count)[::-1]], samples[::-1])
    files = np.searchsorted(starts, samples, side="right") - 1
    last = {int(file): place for place, file in enumerate(files)}
    first = {int(file): place for place, file in reversed(list(enumerate(files)))}
    for place in range(count):
        assert sum(first[file] <= place <= last[file] for file in first) <= window


def test_an_order_by_files_mixes_and_differs_by_epoch() -> None:
    starts = np.arange(0, 10_001, 100)
    orders = [FileOrder(starts, 0, epoch, 10)[np.arange(10_000)] for epoch in (0, 1)]
    files = orders[0] // 100
    assert len(set(files[:1000].tolist())) == 10 and len(set(files[:50].tolist())) > 5
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
    assert abs(np.corrcoef(files, np.arange(10_000))[0, 1]) < 0.3


def test_the_order_is_read_anywhere_without_the_rest() -> None:
    order = SampleOrder(600_000_000, seed=1, epoch=2)
    index = np.array([599_999_999, 0, 12345])
    assert np.array_equal(order[index], [order[index[i : i + 1]][0] for i in range(3)])
    assert order[index].max() < 600_000_000


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    orders = [SampleOrder(1000, seed, epoch)[np.arange(1000)] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 15
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.15
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.15


@given(st.integers(1, 80), RANKS, RANKS, st.integers(1, 6), st.integers(0, 30), st.sampled_from([1, 2]))
@settings(max_examples=30)
def test_each_sample_once_an_epoch_whatever_the_ranks_and_the_resume(
    count: int, world: int, world_after: int, micro: int, resume: int, window: int
) -> None:
    batch = 4 * micro

    @cache
    def order(epoch: int) -> EpochOrder:
        return FileOrder(np.array([0, count // 3, count]), 7, epoch, window)

    steps = -(-3 * count // batch) + 1
    used: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        # Before and after the resumed step, the run may have another number of ranks.
        ranks = world if step < resume else world_after
        plans = [BatchPlan(count, batch, order, rank, ranks) for rank in range(ranks)]
        shares = [plan.samples(step) for plan in plans]
        assert {len(share) for share in shares} == {batch // ranks}
        alone = BatchPlan(count, batch, order).samples(step)
        assert sorted(np.concatenate(shares).tolist()) == sorted(alone.tolist())
        used.update(zip(*(a.tolist() for a in split_epochs(count, plans[0].place(step).epoch, alone)), strict=True))
    for epoch in range(3):
        assert [used[epoch, sample] for sample in range(count)] == [1] * count


def test_a_batch_that_no_rank_can_share_evenly_is_a_user_error() -> None:
    with pytest.raises(UserError, match="not a multiple of 4"):
        BatchPlan(100, 6, lambda epoch: SampleOrder(100, 0, epoch), 0, 4)


def test_draws_belong_to_the_sample_not_to_the_batch() -> None:
    epochs, samples = np.array([0, 0, 1]), np.array([5, 2**40, 5])
    together = sample_uniforms(3, epochs, samples)
    alone = [sample_uniforms(3, epochs[i : i + 1], samples[i : i + 1])[0] for i in range(3)]
    assert np.array_equal(together, alone)
    assert len(np.unique(together)) == 12
    many = sample_uniforms(3, np.zeros(20_000, np.int64), np.arange(20_000))
    assert np.abs(many.mean(0) - 0.5).max() < 0.01


def test_draws_never_change() -> None:
    """A run that is resumed with a later version goes on with the samples as they were."""
    assert sample_uniforms(2**63 - 1, np.array([0, 3]), np.array([7, 2**33 + 5])).tolist() == [
        [0.2797385659068823, 0.6410426695365459, 0.7744013925548643, 0.505795287899673],
        [0.4123096351977438, 0.9539809504058212, 0.2822318838443607, 0.4718185483943671],
    ]
    assert sample_uniforms(-1, np.array([1]), np.array([0])).tolist() == [
        [0.879382508341223, 0.22375692846253514, 0.6919095574412495, 0.499925525393337]
    ]
    places = np.array([0, 1, 2, 999])
    assert SampleOrder(1000, 5, 2)[places].tolist() == [648, 115, 192, 149]
    assert FileOrder(np.arange(0, 1001, 100), 5, 2, 3)[places].tolist() == [136, 876, 143, 667]


NO_TORCH = """
import sys
import numpy as np
from instella_ray.data.formats.codes import CodesReader
from instella_ray.data.loading.image_data import ImageData, CaptionedImageData
from instella_ray.data.loading.loader import CodesData, Mixture, Prefetcher
from instella_ray.data.loading.order import BatchPlan

codes, images = sys.argv[1:]
data = Mixture([CodesData(CodesReader(codes), 0), CodesData(CodesReader(codes), 1)], [2, 1], 0)
for data in (data, ImageData(images, (16, 8), 0), CaptionedImageData(images, 16, 0)):
    plan = BatchPlan(len(data), 4, data.order, 1, 2)
    batches = list(Prefetcher(lambda step: data.batch(plan.place(step).epoch, plan.samples(step)), 0, 3))
    assert [len(batch.keys) for batch in batches] == [2, 2, 2]
sys.exit("torch is loaded" if "torch" in sys.modules else 0)
"""


@pytest.mark.process
def test_batches_are_made_without_torch(tmp_path: Path) -> None:
    """Of every kind, in a process that has nothing else to do: whatever runs torch there loads it."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "images").mkdir()
    write_codes(tmp_path / "codes", [20, 10])
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "codes"), image_folder(tmp_path / "images", 6)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_captions_are_long_short_or_dropped_with_the_asked_probabilities(tmp_path: Path) -> None:
    write_codes(tmp_path, [2000])
    data = CodesData(CodesReader(str(tmp_path)), 0, CaptionChoice(short=0.25, dropped=0.1))
    kinds = Counter(caption.partition(" ")[0] for caption in data.batch(0, np.arange(2000)).captions)
    assert abs(kinds[""] / 2000 - 0.1) < 0.03
    assert abs(kinds["short"] / 2000 - 0.9 * 0.25) < 0.04
    assert kinds["long"] + kinds["short"] + kinds[""] == 2000


def test_a_sample_looks_the_same_in_any_batch(tmp_path: Path) -> None:
    codes = write_codes(tmp_path, [30, 30])
    data = CodesData(CodesReader(str(tmp_path)), 5)
    whole = data.batch(1, np.arange(60))
    part = data.batch(0, np.array([60 + 41, 60 + 3]))
    assert part.captions == [whole.captions[41], whole.captions[3]]
    assert part.keys == ["k41", "k3"]
    assert np.array_equal(part.codes, codes[[41, 3]])


def image_folder(folder: Path, count: int) -> str:
    write_tar(str(folder / "a.tar"), ((f"{i}", image_bytes(i, (48, 32)), "caption", {}) for i in range(count)))
    write_tar(str(folder / "b.tar"), [("z", image_bytes(99, (32, 80)), "caption", {})])
    return str(folder)


@pytest.mark.parametrize("cache_bytes", [1, 1 << 20])
def test_images_come_at_the_asked_size_in_any_batch_the_same(tmp_path: Path, cache_bytes: int) -> None:
    data = ImageData(image_folder(tmp_path, 6), (16,), 0, cache_bytes=cache_bytes)
    whole = data.batch(0, np.arange(7))
    pixels = whole.pixels[16]
    assert pixels.shape == (7, 16, 16, 3)
    assert whole.keys == ["0", "1", "2", "3", "4", "5", "z"]
    assert pixels.dtype == np.uint8 and pixels.min() < pixels.max()
    assert np.array_equal(data.batch(0, np.array([6, 2])).pixels[16], pixels[[6, 2]])
    assert not np.array_equal(data.batch(2, np.array([6])).pixels[16], pixels[[6]])


def test_one_crop_comes_in_every_asked_size(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 4)
    several, largest = ImageData(folder, (8, 16, 32), 0), ImageData(folder, (32,), 0)
    batch = several.batch(1, np.arange(5))
    assert {size: pixels.shape for size, pixels in batch.pixels.items()} == {s: (5, s, s, 3) for s in (8, 16, 32)}
    assert np.array_equal(batch.pixels[32], largest.batch(1, np.arange(5)).pixels[32])
    blocks = batch.pixels[32].reshape(5, 8, 4, 8, 4, 3).mean((2, 4))
    assert np.abs(blocks - batch.pixels[8]).mean() < 3


def test_an_index_beside_a_tar_saves_reading_it(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 5)
    (tmp_path / "index").rename(tmp_path / "elsewhere")
    scanned = ImageData(folder, (16,), 0).batch(0, np.arange(6))
    (tmp_path / "elsewhere").rename(tmp_path / "index")
    for name in ("a", "b"):
        assert read_index(str(tmp_path / f"{name}.tar"), captions=True).equals(
            scan_index(str(tmp_path / f"{name}.tar"))
        )
    by_index = ImageData(folder, (16,), 0)
    # Only the images' own bytes are there any more.
    for name in ("a", "b"):
        rows = read_index(str(tmp_path / f"{name}.tar")).to_pylist()
        data = (tmp_path / f"{name}.tar").read_bytes()
        bare = bytearray(len(data))
        for row in rows:
            bare[row["offset"] : row["offset"] + row["bytes"]] = data[row["offset"] : row["offset"] + row["bytes"]]
        (tmp_path / f"{name}.tar").write_bytes(bare)
    read = by_index.batch(0, np.arange(6))
    assert read.keys == scanned.keys and np.array_equal(read.pixels[16], scanned.pixels[16])


def test_images_that_do_not_decode_name_themselves(tmp_path: Path) -> None:
    write_tar(str(tmp_path / "a.tar"), [("bad", b"not an image", "caption", {})])
    with pytest.raises(UserError, match=r"a\.tar: sample bad: undecodable"):
        ImageData(str(tmp_path), (16,), 0).batch(0, np.array([0]))


class Rows(NamedTuple):
    items: list[tuple[str, int, int]]


class Numbers:
    """A source whose samples say which they are."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    @cache  # noqa: B019
    def order(self, epoch: int) -> EpochOrder:
        return SampleOrder(self.count, 3, epoch)

    def batch(self, epoch: int, samples: np.ndarray) -> Rows:
        return Rows([(self.name, epoch, int(i)) for i in samples])


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=30)
def test_a_mixture_keeps_its_weights_and_uses_each_source_evenly(n: int, m: int, a: int, b: int, epoch: int) -> None:
    mix = Mixture([Numbers("x", n), Numbers("y", m)], [a, b], seed=1)
    epochs = [mix.batch(e, np.arange(len(mix))).items for e in range(epoch + 1)]
    for start in range(0, len(mix), a + b):
        assert Counter(name for name, *_ in epochs[0][start : start + a + b]) == {"x": a, "y": b}
    used = Counter(item for items in epochs for item in items)
    assert set(used.values()) == {1}
    backwards = mix.batch(epoch, np.arange(len(mix))[::-1]).items
    assert backwards == epochs[epoch][::-1]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), RANKS, st.integers(0, 40))
@settings(max_examples=30)
def test_ranks_see_all_sources_of_a_mixture_alike(weights: list[int], world: int, step: int) -> None:
    mix = Mixture([Numbers(f"{n}", 500) for n in range(len(weights))], weights, seed=2)
    total = sum(weights)
    seen = [Counter[str]() for _ in range(world)]
    for rank in range(world):
        plan = BatchPlan(len(mix), total * world, mix.order, rank, world)
        for s in range(step, step + 60):
            seen[rank].update(name for name, *_ in mix.batch(plan.place(s).epoch, plan.samples(s)).items)
    together = sum(seen, Counter[str]())
    assert together == {f"{n}": 60 * world * weight for n, weight in enumerate(weights)}
    for mine in seen:
        assert all(0.5 * 60 * weight < mine[f"{n}"] < 1.7 * 60 * weight for n, weight in enumerate(weights))


def test_prefetching_keeps_the_order_and_ends_its_thread() -> None:
    before = threading.active_count()
    assert list(Prefetcher(lambda step: step * step, 3, 9)) == [9, 16, 25, 36, 49, 64]
    for step in Prefetcher(lambda step: step, 0, 10**9, depth=2):
        if step == 5:
            break
    assert threading.active_count() == before


def test_an_error_while_prefetching_reaches_the_loop() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise UserError("shard vanished")
        return step

    seen = []
    with pytest.raises(UserError, match="shard vanished"):
        for step in Prefetcher(make, 0, 5):
            seen.append(step)
    assert seen == [0, 1]
