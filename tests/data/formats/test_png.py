"""PNG files: other readers find the same pixels, the same pixels give the same bytes, and it pays."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torchvision.io import decode_png

from instella_ray.data.formats.images import encode_image, to_pixels
from instella_ray.data.formats.png import write_png

PIXELS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)),
    elements=st.integers(0, 255) | st.sampled_from([0, 255]),
)


def photograph(size: int) -> np.ndarray:
    """Large shapes with some grain, as a camera's."""
    random = np.random.default_rng(0)
    shapes = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((size, size))
    return np.clip(np.asarray(shapes) + random.normal(0, 3, (size, size, 3)), 0, 255).astype(np.uint8)


def by_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def by_libpng(data: bytes) -> np.ndarray:
    return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8)).movedim(0, -1).numpy()


def by_opencv(data: bytes) -> np.ndarray:
    cv2 = pytest.importorskip("cv2", reason="the extra 'curate' is not installed")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


@pytest.mark.parametrize("read", [by_pillow, by_libpng, by_opencv])
@given(pixels=PIXELS)
@settings(max_examples=80)
def test_any_pixels_survive_in_other_readers(read: Callable[[bytes], np.ndarray], pixels: np.ndarray) -> None:
    assert np.array_equal(read(write_png(pixels, {"made by": "a test"})), pixels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (512, 768)])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_the_extremes_survive(shape: tuple[int, int], fill: int | None) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = noise if fill is None else np.full_like(noise, fill)
    data = write_png(pixels, {})
    assert np.array_equal(by_pillow(data), pixels) and np.array_equal(by_libpng(data), pixels)


def test_a_file_is_as_the_standard_says() -> None:
    pixels = photograph(64)
    data = write_png(pixels, {"one": "first", "two": "\xe4"})
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, []
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body, (checksum,) = (
            data[at + 8 : at + 8 + length],
            struct.unpack(">I", data[at + 8 + length : at + 12 + length]),
        )
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"tEXt", b"tEXt", b"IDAT", b"IEND"]
    assert chunks[1][1] == b"one\0first" and chunks[2][1] == b"two\0\xe4"
    rows = np.frombuffer(zlib.decompress(chunks[3][1]), np.uint8).reshape(64, 1 + 3 * 64)
    assert (rows[:, 0] == 2).all() and np.array_equal(rows[:, 1:].cumsum(0, dtype=np.uint8), pixels.reshape(64, -1))


def test_the_same_pixels_give_the_same_bytes() -> None:
    """Whatever their layout in memory, and in threads."""
    pixels = photograph(256)
    data = encode_image(pixels, "png", {"seed": 1})
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert not planar.flags.c_contiguous and encode_image(planar, "png", {"seed": 1}) == data
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: encode_image(pixels, "png", {"seed": 1}), range(8))) == {data}


def test_decoded_pixels_are_laid_out_as_files_have_them() -> None:
    assert to_pixels(torch.zeros(2, 3, 8, 8)).flags.c_contiguous


def test_files_are_about_as_small_as_pillows_in_less_than_half_the_time() -> None:
    pixels = photograph(1024)

    def by_library() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def seconds(write: Callable[[], bytes]) -> float:
        began = time.perf_counter()
        write()
        return time.perf_counter() - began

    assert len(write_png(pixels, {})) < 1.15 * len(by_library())
    # About a tenth; the smallest of some, as other processes take time too.
    ours = min(seconds(lambda: write_png(pixels, {})) for _ in range(5))
    assert ours < 0.5 * min(seconds(by_library) for _ in range(3))
