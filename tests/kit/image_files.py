"""Image files of many kinds, and the pixels that each must show by libvips, littlecms or arithmetic."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pyvips
from PIL import Image, ImageCms

from .image_bytes import ADOBE_RGB, CMYK, DISPLAY_P3, GREY_18, SRGB, exif, png, tiff, with_chunk

SIZE = (64, 48)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def base() -> Image.Image:
    """A smooth image of soft colours, which profiles of all colour spaces here can represent."""
    small = np.random.default_rng(1).integers(40, 216, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def grey() -> np.ndarray:
    return np.asarray(base().convert("L"))


def alpha() -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1)))


def with_alpha(mode: str) -> Image.Image:
    image = base().convert(mode)
    image.putalpha(alpha())
    return image


# --- references


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    found = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert found is not None
    return np.asarray(found)


def by_vips(data: bytes) -> np.ndarray:
    """The pixels by libvips: upright, sRGB by the profile, 8 bits, on white."""
    image = pyvips.Image.new_from_buffer(data, "").autorot()
    if "icc-profile-data" in image.get_fields():
        image = image.icc_transform("srgb", embedded=True, intent="perceptual")
    image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=255)
    pixels: np.ndarray = image.cast("uchar").numpy()
    return pixels


def turned(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


# --- the kinds: file, and pixels to be shown


def _vips(data: bytes) -> tuple[bytes, np.ndarray]:
    return data, by_vips(data)


def _stored(image: Image.Image, profile: bytes, kind: str, **options: Any) -> tuple[bytes, np.ndarray]:
    """The base image, converted to the colours of ``profile``."""
    data = saved(image, kind, icc_profile=profile, **options)
    return data, by_vips(data)


def _same(data: bytes, expected: Any = None) -> tuple[bytes, np.ndarray]:
    pixels = np.asarray(base() if expected is None else expected)
    return data, pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1)


def _on_white(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    share = (opacity / np.float64(opacity.max()))[..., None]
    return np.round(colors * share + 255 * (1 - share))


def _cmyk() -> Image.Image:
    return base().convert("CMYK")


def _multiplied(image: Image.Image) -> np.ndarray:
    inks = 255 - np.asarray(image).astype(np.float64)
    return np.round(inks[..., :3] * inks[..., 3:] / 255)


def _keyed(depth: int, key: int) -> tuple[bytes, np.ndarray]:
    """Grey of ``depth`` bits, of which one value is transparent."""
    values = grey().astype(np.int64) * (2**depth - 1) // 255
    values[:8] = key
    data = png(values[..., None], depth, 0, (b"tRNS", struct.pack(">H", key)))
    levels = np.round(values / (2**depth - 1) * 255)
    return _same(data, np.where(values == key, 255, levels))


def _keyed_rgb(depth: int) -> tuple[bytes, np.ndarray]:
    values = np.asarray(base()).astype(np.int64)
    values = values * 256 + 17 if depth == 16 else values
    values[:8] = key = values[0, 0]
    data = png(values, depth, 2, (b"tRNS", struct.pack(">3H", *key)))
    shown = np.where((values == key).all(-1, keepdims=True), 255, np.asarray(base()))
    return _same(data, shown)


def _palette(*, transparent: bool = False) -> tuple[bytes, np.ndarray]:
    image = base().quantize(32)
    shown = np.asarray(image.convert("RGB")).astype(np.float64)
    if not transparent:
        return _same(saved(image, "PNG"), shown)
    opacity = np.full(256, 255, np.uint8)
    opacity[:3] = 0, 128, 200
    data = saved(image, "PNG", transparency=opacity[:32].tobytes())
    return _same(data, _on_white(shown, opacity[np.asarray(image)]))


def _lab() -> tuple[bytes, np.ndarray]:
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(base(), ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    assert image is not None
    back = ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return _same(saved(image, "TIFF"), back)


def _gif(**options: Any) -> tuple[bytes, np.ndarray]:
    image = base().quantize(64)
    return _same(saved(image, "GIF", **options), image.convert("RGB"))


def _transparent_gif() -> tuple[bytes, np.ndarray]:
    image = base().quantize(64)
    shown = np.where(np.asarray(image)[..., None] == 5, 255, np.asarray(image.convert("RGB")))
    return _same(saved(image, "GIF", transparency=5), shown)


def _premultiplied(mode: str) -> tuple[bytes, np.ndarray]:
    image, opacity = with_alpha(mode), np.asarray(alpha()).astype(np.float64)
    colors = np.asarray(image)[..., :-1].astype(np.float64)
    samples = np.concatenate([np.round(colors * opacity[..., None] / 255), opacity[..., None]], -1).astype(np.uint8)
    shown = _on_white(np.broadcast_to(colors, (*colors.shape[:2], 3)), opacity)
    return _same(tiff(samples, photometric=2 if mode == "RGBA" else 1, extra=1), shown)


def _exif_jpeg(*entries: tuple[int, int, int, bytes]) -> tuple[bytes, np.ndarray]:
    """A photograph to be turned by 90 degrees, with entries of wrong types."""
    data = saved(base(), "JPEG", quality=95, exif=exif(*entries, (0x112, 3, 1, b"\6\0\0\0")))
    upright = Image.open(io.BytesIO(saved(base(), "JPEG", quality=95))).transpose(Image.Transpose.ROTATE_270)
    return _same(data, upright)


def _bomb(kind: bytes, prefix: bytes) -> tuple[bytes, np.ndarray]:
    return _same(with_chunk(saved(base(), "PNG"), kind, prefix + zlib.compress(bytes(8 << 20))))


def _moving(kind: str, **options: Any) -> bytes:
    return saved(base(), kind, save_all=True, append_images=[Image.new("RGB", SIZE, "red")] * 2, **options)


def _wrong(mode: str, profile: bytes) -> tuple[bytes, np.ndarray]:
    """A profile that does not fit the mode: the image as if there were none."""
    image = base().convert(mode)
    plain = np.asarray(Image.open(io.BytesIO(saved(image, "JPEG"))).convert("RGB"))
    return _same(saved(image, "JPEG", icc_profile=profile), plain)


def _sixteen(channels: str) -> tuple[bytes, np.ndarray]:
    """PNG of 16 bits a sample."""
    image = with_alpha(channels) if channels.endswith("A") else base().convert(channels)
    values = np.atleast_3d(np.asarray(image)).astype(np.int64)
    return _vips(png(values * 257, 16, {"RGB": 2, "LA": 4, "RGBA": 6}[channels]))


Kind = Callable[[], tuple[bytes, np.ndarray]]
KINDS: dict[str, Kind] = {
    "jpeg": lambda: _vips(saved(base(), "JPEG")),
    "jpeg progressive": lambda: _vips(saved(base(), "JPEG", progressive=True)),
    "jpeg grey": lambda: _vips(saved(base().convert("L"), "JPEG")),
    "jpeg cmyk": lambda: _same(saved(_cmyk(), "JPEG", quality=100, subsampling=0), _multiplied(_cmyk())),
    "jpeg cmyk with profile": lambda: _stored(_cmyk(), CMYK, "JPEG", quality=100),
    "jpeg display p3": lambda: _stored(base(), DISPLAY_P3, "JPEG", quality=95),
    "jpeg adobe rgb": lambda: _stored(base(), ADOBE_RGB, "JPEG", quality=95),
    "jpeg srgb": lambda: _stored(base(), SRGB, "JPEG", quality=95),
    "jpeg grey with profile": lambda: _stored(base().convert("L"), GREY_18, "JPEG", quality=95),
    "jpeg grey with rgb profile": lambda: _wrong("L", ADOBE_RGB),
    "jpeg rgb with cmyk profile": lambda: _wrong("RGB", CMYK),
    "jpeg cmyk with rgb profile": lambda: _wrong("CMYK", ADOBE_RGB),
    "jpeg with cut profile": lambda: _wrong("RGB", ADOBE_RGB[:200]),
    "jpeg with text as profile": lambda: _wrong("RGB", b"no profile"),
    "jpeg width of wrong type": lambda: _exif_jpeg((0x100, 7, 4, b"\1\2\3\4")),
    "jpeg bits as text": lambda: _exif_jpeg((0x102, 2, 4, b"abc\0")),
    "jpeg orientation as text": lambda: _vips(saved(base(), "JPEG", exif=exif((0x112, 2, 2, b"6\0\0\0")), quality=95)),
    "jpeg orientation 9": lambda: _vips(saved(base(), "JPEG", exif=exif((0x112, 3, 1, b"\x09\0\0\0")), quality=95)),
    "jpeg cut exif": lambda: _vips(saved(base(), "JPEG", exif=exif((0x112, 3, 1, b"\6\0\0\0"))[:12], quality=95)),
    **{
        f"jpeg orientation {number}": partial(lambda n: _vips(saved(base(), "JPEG", exif=turned(n))), number)
        for number in range(1, 9)
    },
    "png rgb": lambda: _same(saved(base(), "PNG")),
    "png rgba": lambda: _vips(saved(with_alpha("RGBA"), "PNG")),
    "png grey": lambda: _same(saved(base().convert("L"), "PNG"), grey()),
    "png grey with alpha": lambda: _vips(saved(with_alpha("LA"), "PNG")),
    "png 1 bit": lambda: _same(saved(base().convert("1"), "PNG"), base().convert("1").convert("L")),
    "png palette": _palette,
    "png palette with transparency": partial(_palette, transparent=True),
    "png palette display p3": lambda: _stored(base().quantize(64), DISPLAY_P3, "PNG"),
    "png 1 bit, one transparent": partial(_keyed, 1, 0),
    "png 2 bits, one transparent": partial(_keyed, 2, 2),
    "png 4 bits, one transparent": partial(_keyed, 4, 5),
    "png 8 bits, one transparent": partial(_keyed, 8, 100),
    "png 16 bits, one transparent": partial(_keyed, 16, 40_000),
    "png rgb, one transparent": partial(_keyed_rgb, 8),
    "png rgb of 16 bits, one transparent": partial(_keyed_rgb, 16),
    "png grey of 16 bits": lambda: _same(saved(Image.fromarray(grey().astype(np.uint16) * 257), "PNG"), grey()),
    "png rgb of 16 bits": partial(_sixteen, "RGB"),
    "png rgba of 16 bits": partial(_sixteen, "RGBA"),
    "png grey with alpha of 16 bits": partial(_sixteen, "LA"),
    "png rgba adobe rgb": lambda: _stored(with_alpha("RGBA"), ADOBE_RGB, "PNG"),
    "png orientation": lambda: _vips(saved(base(), "PNG", exif=turned(6))),
    "png text bomb": partial(_bomb, b"zTXt", b"Comment\0\0"),
    "png international text bomb": partial(_bomb, b"iTXt", b"Comment\0\1\0\0\0"),
    "png profile bomb": partial(_bomb, b"iCCP", b"profile\0\0"),
    "png large text": lambda: _same(with_chunk(saved(base(), "PNG"), b"tEXt", b"prompt\0" + b"x" * (3 << 20))),
    "png profile of unknown compression": lambda: _same(with_chunk(saved(base(), "PNG"), b"iCCP", b"profile\0\7abc")),
    "png animated": lambda: _same(_moving("PNG")),
    "webp": lambda: _vips(saved(base(), "WEBP", quality=90)),
    "webp rgba": lambda: _vips(saved(with_alpha("RGBA"), "WEBP", lossless=True, exact=True)),
    "webp display p3": lambda: _stored(base(), DISPLAY_P3, "WEBP", lossless=True),
    "webp orientation": lambda: _vips(saved(base(), "WEBP", lossless=True, exif=turned(8))),
    "webp animated": lambda: _same(_moving("WEBP", lossless=True)),
    "avif": lambda: _vips(saved(base(), "AVIF", quality=90, subsampling="4:4:4")),
    "avif rgba": lambda: _vips(saved(with_alpha("RGBA"), "AVIF", quality=100, subsampling="4:4:4")),
    "avif display p3": lambda: _stored(base(), DISPLAY_P3, "AVIF", quality=100, subsampling="4:4:4"),
    "avif orientation": lambda: _vips(saved(base(), "AVIF", quality=90, subsampling="4:4:4", exif=turned(6))),
    "gif": _gif,
    "gif with transparency": _transparent_gif,
    "gif animated": lambda: (data := _moving("GIF"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))),
    "bmp": lambda: _same(saved(base(), "BMP")),
    "bmp palette": lambda: _same(saved(base().quantize(32), "BMP"), base().quantize(32).convert("RGB")),
    "bmp of 32 bits": lambda: _same(saved(with_alpha("RGBA"), "BMP")),  # whose fourth byte means nothing
    "tiff rgb": lambda: _same(saved(base(), "TIFF")),
    "tiff lzw": lambda: _same(saved(base(), "TIFF", compression="tiff_lzw")),
    "tiff jpeg": lambda: _vips(saved(base(), "TIFF", compression="jpeg", quality=95)),
    "tiff cmyk": lambda: _same(saved(_cmyk(), "TIFF"), _multiplied(_cmyk())),
    "tiff cmyk with profile": lambda: (
        saved(_cmyk(), "TIFF", icc_profile=CMYK),
        by_littlecms(_cmyk(), CMYK),
    ),
    "tiff lab": _lab,
    "tiff orientation": lambda: _vips(saved(base(), "TIFF", exif=turned(6))),
    "tiff grey of 16 bits": lambda: _same(tiff(grey().astype(np.uint16) * 257), grey()),
    "tiff grey of 16 bits, big-endian": lambda: _same(tiff(grey().astype(np.uint16) * 257, big_endian=True), grey()),
    "tiff grey of 16 bits, white is 0": lambda: _same(
        tiff((255 - grey()).astype(np.uint16) * 257, photometric=0), grey()
    ),
    "tiff rgb of 16 bits": lambda: _same(tiff(np.asarray(base()).astype(np.uint16) * 257, photometric=2)),
    "tiff int32 of 8 bits": lambda: _same(tiff(grey().astype(np.int32)), grey()),
    "tiff int32 of 16 bits": lambda: _same(tiff(grey().astype(np.int32) * 257), grey()),
    "tiff int32": lambda: _same(tiff(grey().astype(np.int32) << 23), grey()),
    "tiff uint32": lambda: _same(tiff(grey().astype(np.uint32) << 24), grey()),
    "tiff int16 below 0": lambda: _same(
        tiff(np.linspace(-1000, 1000, 64 * 48).reshape(48, 64).astype(np.int16)),
        np.linspace(0, 255, 64 * 48).reshape(48, 64),
    ),
    "tiff float to 1": lambda: _same(tiff(grey().astype(np.float32) / 255), grey()),
    "tiff float to 1, overshooting": lambda: _same(
        tiff((grey().astype(np.float32) - 128) / 100 * 0.5 + 0.5),
        ((grey().astype(np.float32) - 128) / 100 * 0.5 + 0.5).clip(0, 1) * 255,
    ),
    "tiff float to 255": lambda: _same(tiff(grey().astype(np.float32)), grey()),
    "tiff float to 65535, big-endian": lambda: _same(tiff(grey().astype(np.float32) * 257, big_endian=True), grey()),
    "tiff float of any range": lambda: _same(
        tiff(np.linspace(-7, 9, 64 * 48, dtype=np.float32).reshape(48, 64)),
        np.linspace(0, 255, 64 * 48).reshape(48, 64),
    ),
    "tiff float with nan": lambda: _same(
        tiff(np.where(grey() < 80, np.nan, grey() / 255).astype(np.float32)), np.where(grey() < 80, 0, grey())
    ),
    "tiff premultiplied": partial(_premultiplied, "RGBA"),
    "tiff grey premultiplied": partial(_premultiplied, "LA"),
}
"""Name -> file and uint8 ``[H, W, 3]`` by libvips, littlecms or arithmetic."""


def jpeg_xl() -> dict[str, Kind]:
    """Kinds of JPEG XL, which needs Pillow's plugin."""
    return {
        "jxl": lambda: _same(saved(base(), "JXL", lossless=True)),
        "jxl rgba": lambda: _same(
            saved(with_alpha("RGBA"), "JXL", lossless=True), _on_white(np.asarray(base()), np.asarray(alpha()))
        ),
        "jxl grey": lambda: _same(saved(base().convert("L"), "JXL", lossless=True), grey()),
    }
