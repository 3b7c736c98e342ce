"""Images: decoding, resizing, cropping and encoding, and generation metadata embedded in image files."""

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

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")
"""Extensions of files and tar members that are read as images, in order of preference."""
MAX_IMAGE_BYTES = 64 << 20
"""Maximum size of an image file (bytes); larger ones are not read."""
MAX_PIXELS = 64_000_000
"""Maximum number of pixels; larger images are refused by their header, because small files can decode to gigapixels."""


class UndecodableError(Exception):
    """Image bytes that cannot be decoded; the message is a reason of the ledger."""


def open_image(data: bytes) -> Image.Image:
    """Open an image by reading only its header, which gives its ``size``.

    Raises UndecodableError for invalid data and for decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UndecodableError("too_many_pixels") from None
    except Exception as error:  # Pillow raises many types of exceptions on malformed data
        raise UndecodableError("undecodable") from error
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError("too_many_pixels")
    return image


def check_pixels(image: Image.Image) -> None:
    """Decode an opened image as cheaply as its format allows, which may reduce its size; UndecodableError if damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.draft("RGB", (1, 1))  # JPEG: reads all bytes, but decodes at an eighth of the size
            image.load()
    except Exception as error:
        raise UndecodableError("undecodable") from error


def decode_rgb(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decode an image as RGB, oriented by its EXIF tag, with transparency composited on white.

    With ``at_least``, a JPEG may be decoded at a half, a quarter or an eighth of its size, which is faster, but with no
    edge under ``at_least`` pixels. Raises UndecodableError for invalid data.
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
            elif image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to white
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:
        raise UndecodableError("undecodable") from error


def fit_square(image: Image.Image, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Resize the shorter edge to ``size`` and crop a square: uint8 ``[size, size, 3]``.

    ``offset`` (x, y) in [0, 1] positions the crop; the default is the centre.
    """
    return crop_square(np.asarray(resize_shorter_edge(image, size)), size, offset)


def resize_shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its shorter edge has ``size`` pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def crop_square(pixels: np.ndarray, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Crop ``[size, size, 3]`` from ``[H, W, 3]`` at ``offset`` (x, y), each in [0, 1] of the possible positions."""
    height, width = pixels.shape[:2]
    left, top = round((width - size) * offset[0]), round((height - size) * offset[1])
    return pixels[top : top + size, left : left + size]


def file_extension(data: bytes) -> str:
    """Return ``png``, ``webp`` or ``jpg``, by the magic bytes of the file."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 ``[B, H, W, 3]`` to float32 ``[B, 3, H, W]`` in [-1, 1]."""
    import torch  # here, because the import would cost workers that only decode seconds

    return torch.as_tensor(pixels).movedim(-1, 1).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert float ``[B, 3, H, W]``, clamped to [-1, 1], to uint8 ``[B, H, W, 3]``, truncating as the published code."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).byte().movedim(1, -1).cpu().numpy()


ImageFormat = Literal["png", "jpeg", "webp"]

SOFTWARE = "instella-ray"
"""Keyword of the PNG text chunk, and value of EXIF's Software tag, which marks metadata of this package."""
METADATA_LIMIT = 60_000
"""Maximum size of metadata (bytes): a JPEG's EXIF segment holds 65,533, which includes other tags."""

# PNG compression level 1 is 5 times as fast as the default, for files a tenth larger.
OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 92},
    "webp": {"quality": 92, "method": 2},
}


def encode_image(image: np.ndarray, output_format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as the bytes of an image file.

    ``metadata`` (model, seed, settings, prompt; anything JSON can represent) is stored in a PNG text chunk, or in EXIF's
    ImageDescription, which file managers show. Raises UserError for an unknown format, and for metadata over
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
    """Read the metadata that :func:`encode_image` stored in an image file; None if there is none.

    Raises UserError if ``data`` is not an image.
    """
    try:
        image = open_image(data)
    except UndecodableError as error:
        raise UserError(f"not an image ({error})") from None
    if image.format == "PNG":
        text = image.info.get(SOFTWARE)
    else:
        exif = image.getexif()
        marked = exif.get(ExifTags.Base.Software) == SOFTWARE
        text = exif.get(ExifTags.Base.ImageDescription) if marked else None
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _as_text(metadata: Mapping[str, Any]) -> str:
    # Escaped to ASCII, because PNG's plain text chunks and EXIF's strings are not defined for Unicode.
    text = json.dumps(dict(metadata), ensure_ascii=True)
    if len(text) > METADATA_LIMIT:
        raise UserError(f"metadata: {len(text)} bytes, expected at most {METADATA_LIMIT}")
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
