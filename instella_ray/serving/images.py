"""Picture files: PNG, JPEG or WebP, with what made the picture written inside."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from ..data.decode import UndecodableError, open_picture
from ..errors import UserError

ImageFormat = Literal["png", "jpeg", "webp"]

SOFTWARE = "instella-ray"
"""Name of the PNG text chunk, and EXIF's Software: tells our metadata from a camera's."""
METADATA_LIMIT = 60_000
"""Bytes of metadata: JPEG has room for 65,533 in its EXIF segment, the rest of which is a few tags."""

# PNG's level 1 is 5 times as fast as the default for files that are a tenth larger.
OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 92},
    "webp": {"quality": 92, "method": 2},
}


def encode_image(picture: np.ndarray, output_format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """File bytes of uint8 ``[H, W, 3]``.

    ``metadata`` (model, seed, settings, prompt; anything that JSON holds) goes into a PNG text chunk, or into EXIF's
    ImageDescription, where file managers show it. UserError for another format, or for metadata over
    :data:`METADATA_LIMIT` bytes.
    """
    if output_format not in OPTIONS:
        raise UserError(f"output_format '{output_format}': expected one of {', '.join(OPTIONS)}")
    options = dict(OPTIONS[output_format])
    if metadata is not None:
        options |= _metadata_options(_as_text(metadata), output_format)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def read_metadata(data: bytes) -> dict[str, Any] | None:
    """What :func:`encode_image` wrote into a file's bytes, None where it is without; UserError for no picture."""
    try:
        image = open_picture(data)
    except UndecodableError as error:
        raise UserError(f"not a picture that can be read ({error})") from None
    if image.format == "PNG":
        text = image.info.get(SOFTWARE)
    else:
        exif = image.getexif()
        ours = exif.get(ExifTags.Base.Software) == SOFTWARE
        text = exif.get(ExifTags.Base.ImageDescription) if ours else None
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _as_text(metadata: Mapping[str, Any]) -> str:
    # ASCII, with escapes for the rest, is what PNG's plain text chunk and EXIF's strings are defined for.
    text = json.dumps(dict(metadata), ensure_ascii=True)
    if len(text) > METADATA_LIMIT:
        raise UserError(f"metadata: {len(text)} bytes, a picture file has room for {METADATA_LIMIT}")
    return text


def _metadata_options(text: str, output_format: str) -> dict[str, Any]:
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(SOFTWARE, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    exif[ExifTags.Base.ImageDescription] = text
    return {"exif": exif}
