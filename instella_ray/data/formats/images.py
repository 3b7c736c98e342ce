"""Images: decoding, resizing, cropping and encoding, and generation metadata embedded in image files."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import random
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import ExifTags, Image

from ...errors import UserError
from .containers import complete_components, file_extension, find_scan, jxl_size, without_large_text
from .metadata import json_text
from .pixels import to_srgb
from .png import read_text, write_png

try:
    import pillow_jxl  # noqa: F401  registers JPEG XL with Pillow
except ImportError:
    JPEG_XL = False
else:
    JPEG_XL = True

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "jxl")
"""Extensions of files and tar members that are read as images, in order of preference."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF") + (("JXL",) if JPEG_XL else ())
"""Formats that are decoded, told by content. Pillow knows more, and starts Ghostscript for one of them."""
MAX_IMAGE_BYTES = 64 << 20
"""Maximum size of an image file (bytes); larger ones are not read."""
MAX_PIXELS = 64_000_000
"""Maximum number of pixels; larger images are refused by their header, because small files can decode to gigapixels."""
MAX_ASPECT_RATIO = 100
"""Maximum aspect ratio, longer over shorter edge: narrower images show nothing, and grow large when they are resized."""
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILLER = b"".join(random.Random(0).randbytes(1024).replace(b"\xff", b"") + bytes((0xFF, 0xD0 + n)) for n in range(8))
"""Entropy-coded data without end: noise between all restart markers."""


class UndecodableError(Exception):
    """Image bytes that cannot be decoded; the message is a reason of the ledger."""


def open_image(data: bytes) -> Image.Image:
    """Open an image by reading only its header, which gives its ``size``.

    Raises UndecodableError for invalid data, other formats than :data:`FORMATS`, and images that are too large or too
    narrow to decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data.startswith(b"\x89PNG"):
                data = without_large_text(data)
            if file_extension(data) == "jxl":
                _check_size(jxl_size(data) or (0, 0))
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UndecodableError:
        raise
    except Image.DecompressionBombError:
        raise UndecodableError("too_many_pixels") from None
    except Exception as error:  # Pillow raises many types of exceptions on malformed data
        raise UndecodableError("undecodable") from error
    _check_size(image.size)
    if image.format == "PNG":
        _scale_transparent_color(image, depth=data[24])
    return image


def check_pixels(data: bytes, *, keep_truncated: bool = False) -> None:
    """Decode an image as cheaply as its format allows; UndecodableError if :func:`decode_rgb` would raise it.

    A JPEG that ends before its last row, although it has an end marker, is refused unless ``keep_truncated``.
    """
    image = open_image(data)
    start = find_scan(data) if image.format in ("JPEG", "MPO") and not keep_truncated else -1
    components = len(image.getbands())
    # The last of several scans add details, which are not decoded at an eighth of the size.
    several = start >= 0 and ("progressive" in image.info or data[start + 4] < components)
    at_least = max(1, min(image.size) // 2) if several else 1
    _load(image, at_least)
    if several or (start >= 0 and _ends_grey(image)):
        end = data.find(b"\xff\xd9", start)
        if several and complete_components(data[start:end]) < components:
            raise UndecodableError("truncated_image")
        longer = open_image(data[:end] + _FILLER + data[end:])
        _load(longer, at_least)
        # More data change nothing where the data were complete.
        if longer.tobytes() != image.tobytes():
            raise UndecodableError("truncated_image")
    _upright_srgb(image)


def decode_rgb(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decode an image as 8-bit sRGB (:func:`.pixels.to_srgb`), oriented by its EXIF tag; of several frames, the first.

    With ``at_least``, a JPEG may be decoded at a half, a quarter or an eighth of its size, which is faster, but with no
    edge under ``at_least`` pixels. Raises UndecodableError for invalid data.
    """
    image = open_image(data)
    _load(image, at_least)
    return _upright_srgb(image)


def _check_size(size: tuple[int, int]) -> None:
    """Raise UndecodableError for a size (width, height) that would cost too much to decode or to resize."""
    if size[0] * size[1] > MAX_PIXELS:
        raise UndecodableError("too_many_pixels")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise UndecodableError("too_narrow")
    if not min(size):
        raise UndecodableError("undecodable")


def _load(image: Image.Image, at_least: int | None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
    except Exception as error:
        raise UndecodableError("undecodable") from error


def _upright_srgb(image: Image.Image) -> Image.Image:
    try:
        rgb = to_srgb(image)
    except Exception as error:
        raise UndecodableError("undecodable") from error
    method = _ORIENTATIONS.get(_orientation(image))
    return rgb if method is None else rgb.transpose(method)


def _orientation(image: Image.Image) -> Any:
    """Return the orientation of EXIF, or else of XMP; 1 (upright) if it cannot be read."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # applied by the decoder; the standard tells to ignore EXIF's
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _scale_transparent_color(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour of a PNG, given in ``depth`` bits a sample, to the 8 bits that Pillow decodes."""
    color = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(color, int):
        image.info["transparency"] = color * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _ends_grey(image: Image.Image) -> bool:
    """Return whether the last pixel is the grey with which libjpeg fills what is missing."""
    last: Any = image.getpixel((image.width - 1, image.height - 1))
    return all(value in (127, 128) for value in (last if isinstance(last, tuple) else (last,)))


def fit_square(image: Image.Image, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Resize the shorter edge to ``size`` and crop a square: uint8 ``[size, size, 3]``.

    ``offset`` (x, y) in [0, 1] positions the crop; the default is the centre. Only the cropped part is resized.
    """
    width, height = _fitted_size(image, size)
    left, top = round((width - size) * offset[0]), round((height - size) * offset[1])
    if image.size == (width, height):
        return np.asarray(image.crop((left, top, left + size, top + size)))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def shrink_shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its shorter edge has ``size`` pixels, unless it is shorter already."""
    if min(image.size) <= size:
        return image
    return image.resize(_fitted_size(image, size), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _fitted_size(image: Image.Image, size: int) -> tuple[int, int]:
    """Return the (width, height) of an image whose shorter edge is resized to ``size``."""
    scale = size / min(image.size)
    return max(size, round(image.width * scale)), max(size, round(image.height * scale))


def crop_square(pixels: np.ndarray, size: int, offset: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Crop ``[size, size, 3]`` from ``[H, W, 3]`` at ``offset`` (x, y), each in [0, 1] of the possible positions."""
    height, width = pixels.shape[:2]
    left, top = round((width - size) * offset[0]), round((height - size) * offset[1])
    return pixels[top : top + size, left : left + size]


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 ``[B, H, W, 3]`` to float32 ``[B, 3, H, W]`` in [-1, 1], on its device."""
    return normalized(channels_first(pixels))


def channels_first(pixels: np.ndarray | Tensor) -> Tensor:
    """View ``[B, H, W, 3]`` as a tensor ``[B, 3, H, W]`` of the same dtype."""
    import torch  # here, because the import would cost workers that only decode seconds

    return torch.as_tensor(pixels).movedim(-1, 1)


def normalized(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [-1, 1], on their device; floats are returned unchanged."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert float ``[B, 3, H, W]``, clamped to [-1, 1], to uint8 ``[B, H, W, 3]``, truncating as the published code."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).byte().movedim(1, -1).contiguous().cpu().numpy()


ImageFormat = Literal["png", "jpeg", "webp"]

SOFTWARE = "instella-ray"
"""Keyword of the PNG text chunk, and value of EXIF's Software tag, which marks metadata of this package."""
METADATA_LIMIT = 60_000
"""Maximum size of metadata (bytes) except of a PNG: a JPEG's EXIF segment holds 65,533, which includes other tags."""

OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "jpeg": {"quality": 92}, "webp": {"quality": 92, "method": 2}}
"""Formats of encoded images, with Pillow's options for the lossy ones."""


def encode_image(image: np.ndarray, output_format: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as the bytes of an image file.

    ``metadata`` (model, seed, settings, prompt; anything JSON can represent) is stored in a PNG text chunk of any size, or
    in EXIF's ImageDescription, which file managers show. There, texts over :data:`METADATA_LIMIT` bytes in all are cut: of
    ``prompt``, ``prompt_truncated`` and ``prompt_sha256``, that of the whole text, tell it. The same pixels and metadata
    give the same bytes. Raises UserError for an unknown format, and for metadata over the limit without such texts.
    """
    if output_format not in OPTIONS:
        raise UserError(f"output_format '{output_format}': expected one of {', '.join(OPTIONS)}")
    # JSON of ASCII alone, because PNG's plain text chunks and EXIF's strings are not defined for Unicode.
    if output_format == "png":
        return write_png(image, {} if metadata is None else {SOFTWARE: json_text(dict(metadata))})
    options = dict(OPTIONS[output_format])
    if metadata is not None:
        options["exif"] = exif = Image.Exif()
        exif[ExifTags.Base.Software] = SOFTWARE
        exif[ExifTags.Base.ImageDescription] = json_text(_fitted(metadata))
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
        text = read_text(data, SOFTWARE)
    else:
        exif = image.getexif()
        marked = exif.get(ExifTags.Base.Software) == SOFTWARE
        text = exif.get(ExifTags.Base.ImageDescription) if marked else None
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _fitted(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the longest texts of ``metadata`` so that it fits into :data:`METADATA_LIMIT`; UserError if that is not enough."""
    fitted = dict(metadata)
    while (size := len(json_text(fitted))) > METADATA_LIMIT:
        texts = [name for name, value in metadata.items() if isinstance(value, str) and f"{name}_sha256" not in fitted]
        if not texts:
            raise UserError(f"metadata: {size} bytes, expected at most {METADATA_LIMIT}")
        name = max(texts, key=lambda name: len(json.dumps(metadata[name])))
        text = str(metadata[name])
        fitted |= {
            f"{name}_truncated": True,
            f"{name}_sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(),
            name: "",
        }
        left = METADATA_LIMIT - len(json_text(fitted))
        # Escaped, a character takes up to 12 bytes; two are the quotes.
        fits = bisect.bisect_right(range(len(text)), left, key=lambda end: len(json.dumps(text[:end])) - 2)
        fitted[name] = text[: max(0, fits - 1)]
    return fitted
