"""Copies: every close pair is found, the largest stays, small differences do not run away in chains."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.curation.dedup import Fingerprints, find_duplicates, fingerprint, near_pairs

from ...kit.curation import copy_of
from ...kit.shards import image_bytes


def prints_of(images: list[bytes]) -> Fingerprints:
    found = [fingerprint(data) for data in images]
    return Fingerprints(
        np.array([f["exact"] for f in found], "S16"),
        np.array([f["near"] for f in found], np.uint64),
        np.array([list(f["colors"]) for f in found], np.uint8),
        np.array([f["pixels"] for f in found], np.int64),
    )


def hashes_about(centres: list[int], flips: list[list[int]]) -> np.ndarray:
    """Distinct hashes, several of them a few bits from another."""
    values = list(centres)
    for centre, bits in zip(centres, flips, strict=False):
        for bit in bits:
            centre ^= 1 << bit
        values.append(centre)
    return np.unique(np.array(values, np.uint64))


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 63), max_size=8), max_size=40),
    st.integers(0, 8),
)
@settings(max_examples=60)
def test_every_pair_within_the_distance_is_found_once(
    centres: list[int], flips: list[list[int]], distance: int
) -> None:
    hashes = hashes_about(centres, flips)
    found = list(near_pairs(hashes, distance))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if apart[i, j] <= distance}
    assert set(found) == expected and len(found) == len(expected)


def test_copies_are_found_whatever_their_format_quality_and_size() -> None:
    original = image_bytes(1, (256, 192), quality=95)
    copies = [copy_of(original, quality=60), copy_of(original, "PNG"), copy_of(original, scale=0.5), original]
    others = [image_bytes(seed, (256, 192)) for seed in range(2, 12)]
    found = find_duplicates(prints_of([*others, *copies, original]), 3, 16)
    of = dict(zip(found.image.tolist(), zip(found.of.tolist(), found.exact.tolist(), strict=True), strict=True))
    # 10 is the first of the largest; 14 is 13 to the byte, which itself is a near copy.
    assert of == {11: (10, False), 12: (10, False), 13: (10, False), 14: (10, True)}


def test_the_largest_copy_stays_wherever_it_stands() -> None:
    large = image_bytes(1, (512, 384))
    small = copy_of(large, scale=0.25)
    found = find_duplicates(prints_of([small, image_bytes(2), large]), 3, 16)
    assert (found.image.tolist(), found.of.tolist()) == ([0], [2])


def test_without_a_distance_only_copies_to_the_byte_go() -> None:
    original = image_bytes(1, (256, 192))
    found = find_duplicates(prints_of([original, copy_of(original, quality=60), original]), None, 16)
    assert (found.image.tolist(), found.exact.tolist()) == ([2], [True])


def test_the_same_shape_in_another_colour_is_another_image() -> None:
    def disc(color: tuple[int, int, int]) -> bytes:
        yy, xx = np.mgrid[:128, :128]
        pixels = np.full((128, 128, 3), 255, np.uint8)
        pixels[(yy - 64) ** 2 + (xx - 64) ** 2 < 1600] = color
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    plain = [copy_of(disc((g, g, g)), scale=s) for g, s in ((90, 1), (90, 0.5))]
    colours = [disc((200, 40, 60)), disc((20, 110, 100))]
    found = find_duplicates(prints_of([*colours, *plain]), 6, 16)
    assert (found.image.tolist(), found.of.tolist()) == ([3], [2])


def test_plain_images_are_told_apart_by_their_colour() -> None:
    def plain(*color: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    found = find_duplicates(prints_of([plain(200, 0, 0), plain(0, 200, 0), plain(205, 2, 3)]), 3, 16)
    assert (found.image.tolist(), found.of.tolist()) == ([2], [0])


def test_chains_do_not_run_away() -> None:
    """B is near A and C near B, but C is not near A: B goes, C stays."""
    hashes = np.array([0, 0b111, 0b111111], np.uint64)
    prints = Fingerprints(
        np.array([b"a", b"b", b"c"], "S16"), hashes, np.zeros((3, 48), np.uint8), np.array([3, 2, 1], np.int64)
    )
    found = find_duplicates(prints, 3, 0)
    assert (found.image.tolist(), found.of.tolist()) == ([1], [0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
@settings(max_examples=25)
def test_what_goes_is_near_what_stays_and_nothing_that_stays_is_near_anything_else(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 20, np.uint64)
    flips = np.array([np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, 2, np.uint64)) for _ in range(count)])
    near = centres[rng.integers(0, 20, count)] ^ np.where(rng.random(count) < 0.5, flips, 0).astype(np.uint64)
    exact = np.array([f"{value:x}".encode() for value in near], "S16")
    colors = rng.integers(0, 2, (count, 48), np.uint8) * 30
    colors[:, 1:] = 0
    prints = Fingerprints(exact, near, colors, rng.integers(1, 5, count))
    found = find_duplicates(prints, 3, 16)
    gone = set(found.image.tolist())
    stays = np.array([i for i in range(count) if i not in gone])
    assert gone.isdisjoint(found.of.tolist())

    def alike(a: int, b: int) -> bool:
        far = np.abs(prints.colors[a].astype(int) - prints.colors[b]).max() > 16
        return bool(exact[a] == exact[b]) or (int(np.bitwise_count(near[a] ^ near[b])) <= 3 and not far)

    for a, b, exactly in zip(found.image.tolist(), found.of.tolist(), found.exact.tolist(), strict=True):
        assert exactly or alike(a, b)
    assert not any(alike(int(a), int(b)) for i, a in enumerate(stays) for b in stays[:i])


def test_large_sets_take_seconds() -> None:
    """A hundred thousand hashes of which a tenth stand in crowds: no quadratic work."""
    rng = np.random.default_rng(0)
    near = rng.integers(0, 2**64, 100_000, np.uint64)
    near[:10_000] = near[0]
    exact = np.arange(100_000).astype("S16")
    prints = Fingerprints(exact, near, np.zeros((100_000, 48), np.uint8), np.ones(100_000, np.int64))
    assert len(find_duplicates(prints, 3, 16).image) == 9_999
