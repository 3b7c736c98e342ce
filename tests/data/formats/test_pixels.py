"""Pixels of image files: each kind shows what a reference decode shows, in every job, at a bounded cost."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.filters.samples import Resolution
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.curation.prefilter import Prefilter
from instella_ray.data.formats.containers import MAX_PNG_TEXT, file_extension, jxl_size, without_large_text
from instella_ray.data.formats.images import (
    IMAGE_ENDINGS,
    UndecodableError,
    check_pixels,
    decode_rgb,
    fit_square,
    open_image,
)
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.data.loading.image_data import ImageData
from instella_ray.data.views import ViewDecoder

from ...kit.image_bytes import ADOBE_RGB, cut_jpeg, with_chunk
from ...kit.image_files import KINDS, base, jpeg_xl, saved
from ...kit.project import ROOT
from ...kit.shards import bomb, image_bytes, tar_bytes

pytest.importorskip("pillow_jxl")
EVERY_KIND = KINDS | jpeg_xl()


def row(data: bytes) -> dict[str, Any]:
    return {"key": "a", "image": data, "caption": "an image", "meta": "{}", "problem": None}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_shows_the_pixels_of_the_reference(kind: str) -> None:
    data, expected = EVERY_KIND[kind]()
    assert Prefilter(FilterConfig(resolution=None)).verdict(row(data))[0] == "kept"
    found = np.asarray(decode_rgb(data))
    assert found.shape == expected.shape
    difference = np.abs(found - expected.astype(np.float64))
    assert difference.mean() < 1
    assert difference.max() <= 10


@pytest.mark.parametrize("kind", [name for name in KINDS if name.startswith("jpeg")])
def test_a_jpeg_decoded_smaller_shows_the_same_colors(kind: str) -> None:
    data, _ = KINDS[kind]()
    full, small = fit_square(decode_rgb(data), 16), fit_square(decode_rgb(data, at_least=16), 16)
    assert np.abs(full.astype(int) - small).mean() < 2


@given(st.sampled_from(sorted(EVERY_KIND)), st.integers(0, 2**32))
@settings(max_examples=300)
def test_what_curation_keeps_no_job_fails_to_decode(kind: str, seed: int) -> None:
    """Whatever bytes are damaged."""
    chance = random.Random(seed)
    data = bytearray(EVERY_KIND[kind]()[0])
    for _ in range(chance.choice((1, 3, 10))):
        data[int(len(data) * chance.random() ** 3)] = chance.randrange(256)
    damaged = bytes(data[: chance.choice((None, None, chance.randrange(len(data))))])
    try:
        check_pixels(damaged)
    except UndecodableError:
        return
    assert decode_rgb(damaged).mode == decode_rgb(damaged, at_least=16).mode == "RGB"


# --- formats


def test_formats_are_told_by_content_and_go_out_under_their_names(tmp_path: Path) -> None:
    """A member of any ending may hold any format."""
    kinds = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "TIFF", "PNG", "JXL", "PNG", "WEBP")
    files = {f"{i:x}": image_bytes(i, kind=kind) for i, kind in enumerate(kinds)}
    names = [f"{key}.{ending}" for key, ending in zip(files, IMAGE_ENDINGS[::-1], strict=True)]
    members = [
        each
        for name, data in zip(names, files.values(), strict=True)
        for each in ((name, data), (f"{name[0]}.txt", b"an image"))
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_bytes(members))
    filters = FilterConfig(resolution=Resolution(target_size=64))
    output = tmp_path / "out"
    ledger = run_curate(CurateConfig(input=str(tmp_path / "in"), output=str(output), filters=filters, local=True))
    assert ledger.kept == len(kinds)
    (url,) = find_shards(str(output))
    rows = list(read_samples(io.BytesIO(Path(url).read_bytes()), "0"))
    assert {each["key"]: each["image"] for each in rows} == files
    assert [file_extension(data) for data in files.values()] == [
        *("jpg", "png", "webp", "avif", "gif", "bmp", "tiff", "tiff", "png", "jxl", "png", "webp")
    ]
    assert len(ImageData(str(output), (32,), 0).batch(0, np.arange(len(kinds))).keys) == len(kinds)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "DDS", "SGI", "ICNS", "IM"])
def test_other_formats_are_refused_unread(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\nexit 1\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = saved(base().resize((64, 64)), kind)
    for read in (open_image, check_pixels, decode_rgb):
        with pytest.raises(UndecodableError, match="undecodable"):
            read(data)
    assert not (tmp_path / "started").exists()


# --- cost


@pytest.mark.parametrize("size", [(1, 101), (1, 3000), (60_000_000, 1)])
@pytest.mark.parametrize("read", [open_image, check_pixels, decode_rgb])
def test_strips_are_refused_by_their_header(size: tuple[int, int], read: Callable[[bytes], object]) -> None:
    with pytest.raises(UndecodableError, match="too_narrow"):
        read(bomb(*size))


@pytest.mark.process
def test_a_long_image_is_resized_in_bounded_memory() -> None:
    """Enlarged as a whole, it would take 3 GB."""
    code = f"""
import resource
from instella_ray.data.views import ViewDecoder
from instella_ray.data.loading import image_data
data = {saved(Image.new("RGB", (2, 200), "red"), "PNG")!r}
row = dict(key="s", shard="x", row=0, last=True, caption="c", meta="{{}}", image=data, problem=None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = ViewDecoder(3200, 1, False).decoded(row)
assert made["verdict"] == "kept" and len(made["views"]) == 3200 * 3200 * 3
assert image_data._square(image_data.np.zeros((200, 2, 3), "uint8"), 3200, (0.5, 0.5)).shape == (3200, 3200, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.tuples(*[st.floats(0, 1)] * 2))
def test_a_crop_is_resized_as_the_whole_image_would_be(
    width: int, height: int, size: int, offset: tuple[float, float]
) -> None:
    image = base().resize((width, height))
    scale = size / min(image.size)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = round((wide - size) * offset[0]), round((high - size) * offset[1])
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC)).astype(int)[
        top : top + size, left : left + size
    ]
    cropped = fit_square(image, size, offset)
    assert cropped.shape == (size, size, 3)
    if min(image.size) < 3 * size:  # else it is first reduced by whole numbers of pixels
        assert np.abs(cropped - whole).max() <= 3


def test_images_smaller_than_the_crop_are_loaded_as_the_views_that_encoding_makes(tmp_path: Path) -> None:
    data = image_bytes(3, (24, 16), "PNG")
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.png", data), ("a.txt", b"an image")]))
    loaded = ImageData(str(tmp_path), (64, 32), 0).batch(0, np.arange(1)).pixels
    assert {size: pixels.shape for size, pixels in loaded.items()} == {64: (1, 64, 64, 3), 32: (1, 32, 32, 3)}
    views = ViewDecoder(64, 9, False).decoded(row(data) | {"shard": "0", "row": 0, "last": True})["views"]
    crops = np.frombuffer(views, np.uint8).reshape(9, 64, 64, 3).astype(int)
    assert np.abs(crops - loaded[64].astype(int)).mean((1, 2, 3)).min() < 8


def test_text_chunks_stay_within_their_budget() -> None:
    plain = saved(base(), "PNG")
    small = with_chunk(plain, b"tEXt", b"Author\0somebody")
    assert without_large_text(plain) == plain and without_large_text(small) == small
    many = plain
    for number in range(40):
        many = with_chunk(many, b"zTXt", b"%d\0\0" % number + zlib.compress(bytes(100_000)))
    text = Image.open(io.BytesIO(without_large_text(many))).text  # type: ignore[attr-defined]
    assert 0 < sum(map(len, text.values())) <= MAX_PNG_TEXT
    assert without_large_text(many[:5000])  # broken off


@pytest.mark.parametrize("size", [(1, 1), (256, 256), (300, 280), (8191, 90), (512, 384), (1920, 1080), (120, 100)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_jpeg_xl_is_read_from_its_header(size: tuple[int, int], container: bool) -> None:
    data = saved(Image.new("L", size), "JXL", use_container=container, effort=1)
    assert jxl_size(data) == open_image(data).size == size
    assert jxl_size(data[:20] if container else data[:8]) is None


def test_a_jpeg_xl_bomb_is_refused_by_its_header() -> None:
    header = (3 << 1) | (2**28 - 1) << 3 | 1 << 33  # 2 ** 28 rows of 30 bits, and as many columns
    with pytest.raises(UndecodableError, match="too_many_pixels"):
        open_image(b"\xff\x0a" + header.to_bytes(8, "little") + bytes(20))


# --- JPEGs that were cut off and given an end marker

OPTIONS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive with restart markers": {"progressive": True, "restart_marker_rows": 1},
    "full chroma": {"subsampling": 0, "quality": 95},
    "optimized": {"optimize": True},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_cut_jpeg_with_an_end_marker_is_truncated(options: str, mode: str) -> None:
    whole = saved(base().resize((200, 150)).convert(mode), "JPEG", **OPTIONS[options])
    check_pixels(whole)
    check_pixels(whole + b"trailing bytes \xff\xd9")
    for share in np.linspace(0.05, 0.9, 20):
        with pytest.raises(UndecodableError, match=r"truncated_image|undecodable"):
            check_pixels(cut_jpeg(whole, share))
    half = cut_jpeg(whole, 0.8 if "progressive" in options else 0.5)  # not inside the header of a scan
    assert Prefilter(FilterConfig(resolution=None)).verdict(row(half))[0] == "quarantined:truncated_image"
    assert Prefilter(FilterConfig(resolution=None), keep_truncated=True).verdict(row(half))[0] == "kept"
    assert decode_rgb(half).size == (200, 150)


@given(
    st.tuples(*[st.integers(0, 255)] * 3),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.floats(0, 1),
    st.sampled_from(sorted(OPTIONS)),
)
@settings(max_examples=200)
def test_flat_images_are_not_taken_for_truncated(
    color: tuple[int, int, int], size: tuple[int, int], share: float, options: str
) -> None:
    """Nor is the grey of missing data below an image."""
    image = base().resize(size)
    image.paste((128, 128, 128), (0, int(size[1] * share), *size))
    for each in (image, Image.new("RGB", size, color), Image.new("L", size, color[0])):
        check_pixels(saved(each, "JPEG", **OPTIONS[options]))


def test_a_thumbnail_with_scans_of_its_own_does_not_hide_a_cut() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" + saved(base().resize((16, 16)), "JPEG").decode("latin1")
    whole = saved(base(), "JPEG", exif=exif.tobytes(), icc_profile=ADOBE_RGB)
    check_pixels(whole)
    start = whole.rindex(b"\xff\xda") + 14
    with pytest.raises(UndecodableError, match="truncated_image"):
        check_pixels(whole[: start + (len(whole) - start) // 2] + b"\xff\xd9")


def test_curation_quarantines_truncated_images_unless_told_to_keep_them(tmp_path: Path) -> None:
    members = [
        ("a.jpg", cut_jpeg(image_bytes(0), 0.5)),
        ("a.txt", b"an image"),
        ("b.jpg", image_bytes(1)),
        ("b.txt", b"an image"),
    ]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    given = {"input": f"{tmp_path}/0.tar", "filters": {"resolution": {"target_size": 64}}, "local": True}
    for keep, reasons in ((False, {"truncated_image": 1}), (True, {})):
        more = {"output": f"{tmp_path}/{keep}", "keep_truncated": keep, "abort": {"quarantined": 1}}
        assert dict(run_curate(CurateConfig.model_validate(given | more)).quarantined) == reasons
