"""Conversion of decoded images of any mode, depth and colour space to 8-bit sRGB."""

from __future__ import annotations

import io
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

MAX_PROFILE_BYTES = 4 << 20
"""Maximum size of an ICC profile (bytes); larger ones are ignored."""
_COLOR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
"""Mode -> colour space of the profiles that may describe it."""
_DEVICES = ("mntr", "scnr", "prtr", "spac")
"""Classes of profiles that describe colours of images, as opposed to links between devices and named colours."""
_INTEGER_RANGES = (2.0**8 - 1, 2.0**16 - 1, 2.0**31 - 1, 2.0**32 - 1)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF: bits per sample, photometric interpretation (0: white is zero), sample format (1: unsigned)."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to an RGB image in sRGB, with transparency composited on white.

    An embedded ICC profile is applied (perceptual intent), and ignored if it is damaged or describes another colour space
    than the image has. Without one, CMYK is multiplied out as browsers do. 16-bit grey is scaled from its full range, 32-bit
    integers and floats from the smallest of [0, 1] (floats alone), 8, 16, 31 and 32 bits that holds their values, or from
    their minimum to their maximum if none does or the image would be nearly black.
    """
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(image)
    rgb = _apply_profile(image, profile)
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha) if alpha else rgb


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours as mode L, RGB, CMYK or LAB, and the alpha channel, if any."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode not in _COLOR_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, None


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale grey of 16 or 32 bits to mode L; a transparent value (PNG) becomes an alpha channel."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    values, alpha = np.asarray(image), None
    if image.mode.startswith("I;16"):
        full = 2 ** int(tags.get(_BITS, (16,))[0]) - 1
        levels = np.arange(2**16, dtype=np.uint32) * 255 / full
        grey = (levels + 0.5).clip(0, 255).astype(np.uint8)[values]
        if isinstance(transparent := image.info.get("transparency"), int):
            alpha = Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))
    else:
        if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1 and tags.get(_BITS, (0,))[0] == 32:
            values = values.view(np.uint32)  # Pillow reads unsigned integers as signed
        low, high = _value_range(values)
        levels = (values.astype(np.float32) - low) * (255 / (high - low)) + 0.5
        grey = np.nan_to_num(levels.clip(0, 255)).astype(np.uint8)
    found = Image.fromarray(grey)
    return ImageOps.invert(found) if tags.get(_PHOTOMETRIC) == 0 else found, alpha


def _value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the values that black and white stand for."""
    floats = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if floats else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if floats and low >= -0.1 and high <= 1.1:  # resampling leaves [0, 1] by a little
        return 0.0, 1.0
    full = next((full for full in _INTEGER_RANGES if high <= full), 0.0)
    if low >= 0 and high >= full / 256 > 0:
        return 0.0, full
    return low, max(high, low + 1)


def _apply_profile(image: Image.Image, profile: Any) -> Image.Image:
    """Convert mode L, RGB, CMYK or LAB to sRGB, by its profile if it has a valid one."""
    transform = None
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        transform = _transform(profile, image.mode)
    if transform is None and image.mode == "LAB":
        transform = _lab_transform()
    converted = transform.apply(image) if transform else image.convert("RGB")
    converted.info.clear()  # the profile and the orientation of the file are not those of these pixels
    return converted


@lru_cache(16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform to sRGB; None if ``profile`` is not valid for ``mode``, or changes no colour by over a level."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        about = source.profile
        if about.xcolor_space.strip() != _COLOR_SPACES[mode] or about.device_class not in _DEVICES:
            return None
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode in ("L", "RGB"):
        steps = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
        colors = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        sample = Image.fromarray(np.ascontiguousarray(colors))
        change = np.asarray(transform.apply(sample)).astype(int) - np.asarray(sample.convert("RGB"))
        if np.abs(change).max() <= 1:
            return None
    return transform


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), _srgb(), "LAB", "RGB")
