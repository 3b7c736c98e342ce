"""Images: file bytes to pixels and back, with what made an image written inside its file."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from ...errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
"""Endings of files and members that are read as images, the most wanted first."""
MAX_IMAGE_BYTES = 64 << 20
"""Size of a file above which it is not read."""
MAX_PIXELS = 64_000_000
"""Above this a file is refused unread: a few kilobytes can claim to be gigapixels."""


class UndecodableError(Exception):
    """The image's bytes cannot be turned into pixels; the message is a ledger reason."""


def open_image(data: bytes) -> Image.Image:
    """The image with only its header read: ``size`` is known, pixels are not. Refuses decompression bombs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UndecodableError("too_many_pixels") from None
    except Exception as error:  # Pillow raises nearly anything on hostile bytes
        raise UndecodableError("undecodable") from error
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError("too_many_pixels")
    return image


def check_pixels(image: Image.Image) -> None:
    """Read an opened image to its end, as cheaply as its format allows; afterwards its size may be a fraction."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.draft("RGB", (1, 1))  # JPEG: all bytes are read, an eighth of the pixels is computed
            image.load()
    except Exception as error:
        raise UndecodableError("undecodable") from error


def decode_rgb(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag; transparency lies on white.

    With ``at_least`` a JPEG may come out smaller than it is, but with no edge under ``at_least`` pixels: half, a
    quarter or an eighth of its size costs less to decode.
    """
    image = open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                flat = Image.new("RGBA", image.size, "white")
                flat.alpha_composite(image.convert("RGBA"))
                image = flat
            elif image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:
        raise UndecodableError("undecodable") from error


def fit_square(image: Image.Image, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Shorter edge resized to ``size``, then a square crop: uint8 ``[size, size, 3]``.

    ``offset`` in [0, 1] places the crop along each axis; the default is the centre.
    """
    return crop_square(np.asarray(resize_shorter_edge(image, size)), size, offset)


def resize_shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter edge at ``size`` pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def crop_square(pixels: np.ndarray, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The ``[size, size, 3]`` part of ``[H, W, 3]`` at ``offset`` (x, y) in [0, 1] of the free way."""
    height, width = pixels.shape[:2]
    left, top = round((width - size) * offset[0]), round((height - size) * offset[1])
    return pixels[top : top + size, left : left + size]


def file_extension(data: bytes) -> str:
    """Return ``png``, ``webp`` or ``jpg``, by the file's first bytes."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to float32 ``[B, 3, H, W]`` in [-1, 1]."""
    import torch  # here, because every worker that only decodes would wait seconds for it

    return torch.as_tensor(pixels).movedim(-1, 1).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Float ``[B, 3, H, W]`` about [-1, 1] to uint8 ``[B, H, W, 3]``: clamped, and truncated as published."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).byte().movedim(1, -1).cpu().numpy()


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


def encode_image(image: np.ndarray, output_format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
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
    Image.fromarray(image).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def read_metadata(data: bytes) -> dict[str, Any] | None:
    """What :func:`encode_image` wrote into a file's bytes, None where it is without; UserError for no image."""
    try:
        image = open_image(data)
    except UndecodableError as error:
        raise UserError(f"not an image that can be read ({error})") from None
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
        raise UserError(f"metadata: {len(text)} bytes, an image file has room for {METADATA_LIMIT}")
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
