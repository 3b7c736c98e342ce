"""Each sample exactly once an epoch, the same global batches on any number of ranks, from any step."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.codes import CodesReader
from instella_ray.data.loader import CodesData, ImageData, Mixture, Prefetcher
from instella_ray.data.order import BatchPlan, SampleOrder, sample_uniforms, split_epochs
from instella_ray.data.shards import write_tar
from instella_ray.errors import UserError

from .samples import picture
from .test_codes import write_folder

pytestmark = pytest.mark.unit
RANKS = st.sampled_from([1, 2, 4])


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 9))
@settings(max_examples=60)
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(count, seed, epoch)[np.arange(count)].tolist()) == list(range(count))


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


@given(st.integers(1, 80), RANKS, RANKS, st.integers(1, 6), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_each_sample_once_an_epoch_whatever_the_ranks_and_the_resume(
    count: int, world: int, world_after: int, micro: int, resume: int
) -> None:
    batch = 4 * micro
    steps = -(-3 * count // batch) + 1
    used: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        # Before and after the resumed step, the run may have another number of ranks.
        ranks = world if step < resume else world_after
        plans = [BatchPlan(count, batch, 7, rank, ranks) for rank in range(ranks)]
        shares = [plan.samples(step) for plan in plans]
        assert {len(share) for share in shares} == {batch // ranks}
        alone = BatchPlan(count, batch, 7).samples(step)
        assert sorted(np.concatenate(shares).tolist()) == sorted(alone.tolist())
        used.update(zip(*(a.tolist() for a in split_epochs(count, plans[0].place(step).epoch, alone)), strict=True))
    for epoch in range(3):
        assert [used[epoch, sample] for sample in range(count)] == [1] * count


def test_a_batch_that_no_rank_can_share_evenly_is_a_user_error() -> None:
    with pytest.raises(UserError, match="not a multiple of 4"):
        BatchPlan(100, 6, 0, 0, 4)


def test_draws_belong_to_the_sample_not_to_the_batch() -> None:
    epochs, samples = np.array([0, 0, 1]), np.array([5, 2**40, 5])
    together = sample_uniforms(3, epochs, samples)
    alone = [sample_uniforms(3, epochs[i : i + 1], samples[i : i + 1])[0] for i in range(3)]
    assert np.array_equal(together, alone)
    assert len(np.unique(together)) == 12
    many = sample_uniforms(3, np.zeros(20_000, np.int64), np.arange(20_000))
    assert np.abs(many.mean(0) - 0.5).max() < 0.01


def test_captions_are_long_short_or_dropped_with_the_asked_probabilities(tmp_path: Path) -> None:
    write_folder(tmp_path, [2000])
    data = CodesData(CodesReader(str(tmp_path)), 0, short_probability=0.25, drop_probability=0.1)
    kinds = Counter(caption.partition(" ")[0] for caption in data.batch(0, np.arange(2000)).captions)
    assert abs(kinds[""] / 2000 - 0.1) < 0.03
    assert abs(kinds["short"] / 2000 - 0.9 * 0.25) < 0.04
    assert kinds["long"] + kinds["short"] + kinds[""] == 2000


def test_a_sample_looks_the_same_in_any_batch(tmp_path: Path) -> None:
    codes = write_folder(tmp_path, [30, 30])
    data = CodesData(CodesReader(str(tmp_path)), 5)
    whole = data.batch(1, np.arange(60))
    part = data.batch(0, np.array([60 + 41, 60 + 3]))
    assert part.captions == [whole.captions[41], whole.captions[3]]
    assert part.keys == ["k41", "k3"]
    assert np.array_equal(part.codes, codes[[41, 3]])


def image_folder(folder: Path, count: int) -> str:
    write_tar(str(folder / "a.tar"), ((f"{i}", picture(i, (48, 32)), "caption", {}) for i in range(count)))
    write_tar(str(folder / "b.tar"), [("z", picture(99, (32, 80)), "caption", {})])
    return str(folder)


@pytest.mark.parametrize("cache_bytes", [1, 1 << 20])
def test_pictures_come_at_the_asked_size_in_any_batch_the_same(tmp_path: Path, cache_bytes: int) -> None:
    data = ImageData(image_folder(tmp_path, 6), 16, 0, cache_bytes=cache_bytes)
    whole = data.batch(0, np.arange(7))
    assert whole.pixels.shape == (7, 16, 16, 3)
    assert whole.keys == ["0", "1", "2", "3", "4", "5", "z"]
    assert whole.pixels.dtype == np.uint8 and whole.pixels.min() < whole.pixels.max()
    assert np.array_equal(data.batch(0, np.array([6, 2])).pixels, whole.pixels[[6, 2]])
    assert not np.array_equal(data.batch(2, np.array([6])).pixels, whole.pixels[[6]])


def test_pictures_that_do_not_decode_name_themselves(tmp_path: Path) -> None:
    write_tar(str(tmp_path / "a.tar"), [("bad", b"not a picture", "caption", {})])
    with pytest.raises(UserError, match=r"a\.tar: sample bad: undecodable"):
        ImageData(str(tmp_path), 16, 0).batch(0, np.array([0]))


class Rows(NamedTuple):
    items: list[tuple[str, int, int]]


class Numbers:
    """A source whose samples say which they are."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, samples: np.ndarray) -> Rows:
        return Rows([(self.name, epoch, int(i)) for i in samples])


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_mixture_keeps_its_weights_and_uses_each_source_evenly(n: int, m: int, a: int, b: int, epoch: int) -> None:
    mix = Mixture([Numbers("x", n), Numbers("y", m)], [a, b], seed=1)
    epochs = [mix.batch(e, np.arange(len(mix))).items for e in range(epoch + 1)]
    for start in range(0, len(mix), a + b):
        assert Counter(name for name, *_ in epochs[0][start : start + a + b]) == {"x": a, "y": b}
    used = Counter(item for items in epochs for item in items)
    assert set(used.values()) == {1}
    backwards = mix.batch(epoch, np.arange(len(mix))[::-1]).items
    assert backwards == epochs[epoch][::-1]


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
