"""Image files carry what made them, in every format, and come back as they were."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.formats.images import METADATA_LIMIT, decode_rgb, encode_image, read_metadata
from instella_ray.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
FORMATS = ("png", "jpeg", "webp")

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(0, 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=60)
)
METADATA = st.dictionaries(st.text(max_size=8), VALUES | st.dictionaries(st.text(max_size=8), VALUES), max_size=6)


@pytest.mark.parametrize("output_format", FORMATS)
@given(metadata=METADATA)
@settings(max_examples=60)
def test_metadata_survives_in_every_format(output_format: str, metadata: dict[str, object]) -> None:
    data = encode_image(IMAGE, output_format, metadata)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (output_format.upper(), (24, 16))
    assert read_metadata(data) == metadata


@pytest.mark.parametrize("output_format", FORMATS)
def test_metadata_changes_no_pixel_and_its_absence_is_told(output_format: str) -> None:
    plain, told = encode_image(IMAGE, output_format), encode_image(IMAGE, output_format, {"seed": 1})
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (plain, told)]
    assert np.array_equal(*pixels)
    assert read_metadata(plain) is None
    if output_format == "png":
        assert np.array_equal(pixels[0], IMAGE)


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("character", ["x", "\N{GRINNING FACE}", '"', "é"])
def test_a_text_over_the_limit_of_exif_is_cut_and_says_so(output_format: str, character: str) -> None:
    short = {"prompt": character * 4000, "id": "a"}  # up to twelve bytes each once escaped
    assert read_metadata(encode_image(IMAGE, output_format, short)) == short
    long = {"prompt": character * 80_000, "seed": 7, "id": "b" * 50_000}
    found = read_metadata(encode_image(IMAGE, output_format, long))
    assert found is not None
    if output_format == "png":
        assert found == long
        return
    kept = found["prompt"]
    assert long["prompt"].startswith(kept) and found["prompt_truncated"] is True and found["seed"] == 7  # type: ignore[attr-defined]
    assert found["prompt_sha256"] == hashlib.sha256(long["prompt"].encode()).hexdigest()  # type: ignore[attr-defined]
    assert found["id"] == long["id"]
    assert METADATA_LIMIT - 30 < len(json.dumps(found)) <= METADATA_LIMIT


def test_text_of_any_size_is_read_from_a_png_whose_image_is_read_without_it() -> None:
    data = encode_image(IMAGE, "png", {"prompt": "word " * 400_000, "seed": 1})
    assert len(data) > 2_000_000 and np.array_equal(np.asarray(decode_rgb(data)), IMAGE)
    assert read_metadata(data) == {"prompt": "word " * 400_000, "seed": 1}


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_metadata_that_cannot_be_cut_is_refused(output_format: str) -> None:
    with pytest.raises(UserError, match="expected at most 60000"):
        encode_image(IMAGE, output_format, {"labels": ["x" * METADATA_LIMIT], "prompt": "a"})


@pytest.mark.parametrize("output_format", FORMATS)
def test_metadata_is_strict_json(output_format: str) -> None:
    data = encode_image(IMAGE, output_format, {"rho": float("inf"), "scores": [float("nan"), {"a": -float("inf")}]})
    assert read_metadata(data) == {"rho": None, "scores": [None, {"a": None}]}
    assert b"NaN" not in data and b"Infinity" not in data


def test_other_formats_and_other_files_are_refused() -> None:
    with pytest.raises(UserError, match="expected one of png, jpeg, webp"):
        encode_image(IMAGE, "gif")
    with pytest.raises(UserError, match="not an image"):
        read_metadata(b"GIF89a, or so it says")


def test_what_a_camera_wrote_is_not_taken_for_ours() -> None:
    exif = Image.Exif()
    exif[0x010E] = '{"seed": 1}'
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "JPEG", exif=exif)
    assert read_metadata(buffer.getvalue()) is None
