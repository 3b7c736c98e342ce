"""Decoding and filters: what comes out of every kind of file, and where each limit lies."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.curation.filters.base import Sample, ScoreLimits
from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.stats import BINS, edges, histograms, merged
from instella_ray.data.formats.images import UndecodableError, check_pixels, decode_rgb, fit_square, open_image

from ...kit.shards import bomb, image_bytes


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(size: tuple[int, int], caption: str, meta: dict[str, Any], **limits: Any) -> list[str]:
    sample = Sample(size, caption, meta)
    reasons = (each.reason(each.measure(sample)) for each in FilterConfig(**limits).of_samples())
    return [reason for reason in reasons if reason]


@pytest.mark.parametrize(
    ("size", "caption", "meta", "reasons"),
    [
        ((256, 256), "a cat", {}, []),
        ((255, 400), "a cat", {}, ["small"]),
        ((768, 256), "a cat", {}, []),
        ((769, 256), "a cat", {}, ["aspect_ratio"]),
        ((512, 512), "a cat", {"pwatermark": 0.8, "punsafe": 0.5}, []),
        ((512, 512), "a cat", {"pwatermark": 0.81, "punsafe": 0.51}, ["watermark", "unsafe"]),
        ((512, 512), "a cat", {"pwatermark": "high"}, []),
        ((512, 512), "a cat", {"pwatermark": float("nan")}, []),
        ((512, 512), "ab", {}, ["caption_length"]),
        ((512, 512), "a" * 2001, {}, ["caption_length"]),
    ],
)
def test_limits(size: tuple[int, int], caption: str, meta: dict[str, Any], reasons: list[str]) -> None:
    assert refused(size, caption, meta) == reasons


def test_none_switches_a_filter_off() -> None:
    off = dict.fromkeys(FilterConfig.model_fields)
    assert refused((1, 900), "", {"pwatermark": 1, "punsafe": 1}, **off) == []


def test_similarity_is_asked_only_where_it_is_switched_on() -> None:
    assert refused((512, 512), "a cat", {"similarity": 0.1}) == []
    assert refused((512, 512), "a cat", {"similarity": 0.1}, similarity={"minimum": 0.2}) == ["similarity"]
    assert refused((512, 512), "a cat", {}, similarity={"minimum": 0.2}) == []


def test_every_score_has_an_axis_and_every_limit_a_score() -> None:
    for section in FilterConfig(similarity={"minimum": 0.2}).sections().values():
        assert set(section.limits()) <= set(section.scales)


@given(
    st.lists(st.floats(-1, 20_000), max_size=60), st.integers(0, 60), st.sampled_from(["shorter_edge", "aspect_ratio"])
)
def test_histograms_count_every_score_once_and_merge(values: list[float], cut: int, name: str) -> None:
    filters = FilterConfig()
    rows = [{name: value} for value in values] + [{"pwatermark": 1.0}]
    whole = histograms(filters, rows)
    assert np.sum(whole[name]) == len(values) and np.shape(whole[name]) == (2, BINS)
    assert merged([histograms(filters, rows[:cut]), histograms(filters, rows[cut:])]) == whole
    assert sum(counts[-1] for counts in whole[name]) >= sum(value >= filters.scales()[name].high for value in values)


ALL_FILTERS = FilterConfig.model_validate(
    {name: {} for name in FilterConfig.model_fields if name not in ("aesthetic", "duplicates")}
    | {"aesthetic": {"head": "head.safetensors", "minimum": 5.1}, "caption_length": {"minimum": 3, "maximum": 77}}
)


@pytest.mark.parametrize("label", ALL_FILTERS.sections())
@given(data=st.data())
def test_bins_hold_what_the_filter_decided(label: str, data: st.DataObject) -> None:
    section = ALL_FILTERS.sections()[label]
    decided: dict[str | None, list[dict[str, float]]] = defaultdict(list)
    for _ in range(data.draw(st.integers(0, 20))):
        scores = {}
        for name, scale in section.scales.items():
            limits = section.limits()[name][1].sides().values()
            # At a limit and beside it, at the edges of the bins, within and beyond the scale.
            special = [math.nextafter(limit, to) for limit in limits for to in (-math.inf, limit, math.inf)]
            scores[name] = data.draw(st.sampled_from([*special, *edges(scale).tolist()]) | st.floats(-2, 20_000))
        decided[section.reason(scores)].append(scores)
    for reason, rows in decided.items():
        for name, scale in section.scales.items():
            bins = Counter(max(0, sum(row[name] >= edge for edge in edges(scale)[:-1]) - 1) for row in rows)
            expected, none = [bins[number] for number in range(BINS)], [0] * BINS
            found = histograms(ALL_FILTERS, rows)[name]
            if reason is None:
                assert found == [expected, none]
            elif reason == section.limits()[name][0]:
                assert found == [none, expected]
            else:  # dropped for another score
                assert np.sum(found, 0).tolist() == expected
    everything = histograms(ALL_FILTERS, [row for rows in decided.values() for row in rows])
    assert (
        merged([histograms(ALL_FILTERS, []), *(histograms(ALL_FILTERS, rows) for rows in decided.values())])
        == everything
    )


def test_limits_include_their_ends() -> None:
    limits = ScoreLimits(1, 2)
    assert [limits.allow(value) for value in (0.99, 1, 2, 2.01)] == [False, True, True, False]


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode_rgb(saved(image, "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "LA", "RGBA", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.full((32, 32), 128, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.full_like(grey, 255) if mode == "1" else grey).convert(mode)
    pixels = np.asarray(decode_rgb(saved(image, "TIFF" if mode == "CMYK" else "PNG")))
    assert pixels.shape == (32, 32, 3)
    assert abs(int(pixels.mean()) - (255 if mode == "1" else 128)) <= 2


def test_transparency_lies_on_white() -> None:
    assert np.asarray(decode_rgb(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"))).min() == 255


@pytest.mark.parametrize("data", [b"", b"<html>", image_bytes()[:-300], image_bytes(kind="PNG")[:-60]])
def test_broken_files_are_undecodable(data: bytes) -> None:
    for read in (decode_rgb, check_pixels):
        with pytest.raises(UndecodableError, match="undecodable"):
            read(data)


def test_a_decompression_bomb_is_refused_unread() -> None:
    for width in (50_000, 9_000):
        with pytest.raises(UndecodableError, match="too_many_pixels"):
            open_image(bomb(width, width))


def test_a_jpeg_decoded_smaller_shows_the_same_image() -> None:
    data = image_bytes(3, (512, 384), quality=95)
    full, small = fit_square(decode_rgb(data), 64), fit_square(decode_rgb(data, at_least=128), 64)
    assert np.abs(full.astype(int) - small).mean() < 2


def test_crops_reach_both_ends() -> None:
    wide = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    assert [fit_square(wide, 16, (x, 0.5))[0, 0, 0] for x in (0.0, 0.5, 1.0)] == [0, 24, 48]
