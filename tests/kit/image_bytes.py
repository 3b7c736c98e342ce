"""ICC profiles, PNG, TIFF, EXIF and cut JPEGs written byte by byte, where Pillow would write none of the kind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import ImageCms

# --- ICC profiles


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = "test".encode("utf-16-be")
    named = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    white = b"XYZ \0\0\0\0" + _fixed(0.9642, 1, 0.82491)
    tags = {b"desc": named, b"cprt": named, b"wtpt": white, **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acspAPPL" + bytes(24) + _fixed(0.9642, 1, 0.82491)
    return header + bytes(128 - len(header)) + body


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _rgb_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    points = {
        name + b"XYZ": b"XYZ \0\0\0\0" + _fixed(*xyz) for name, xyz in zip((b"r", b"g", b"b"), primaries, strict=True)
    }
    return _profile(b"mntr", b"RGB ", b"XYZ ", points | {name + b"TRC": _gamma(gamma) for name in (b"r", b"g", b"b")})


def _ink_profile() -> bytes:
    """CMYK to Lab by a table of the 16 solid overprints."""
    inks = np.array([[0.2, 0.6, 0.9], [0.85, 0.1, 0.5], [0.95, 0.9, 0.1], [0.1, 0.1, 0.1]])
    corners = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    paper = np.prod(np.where(corners[:, :, None] == 1, inks, 0.97), 1)
    red, green, blue = paper.T
    lab = np.stack([255 * green, 128 + 90 * (red - green), 128 + 60 * (green - blue)], 1).clip(0, 255).astype(np.uint8)
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table + 4 * ramp + lab.tobytes() + 3 * ramp})


DISPLAY_P3 = _rgb_profile([(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)], 2.2)
ADOBE_RGB = _rgb_profile([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 2.2)
GREY_18 = _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(1.8)})
CMYK = _ink_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# --- PNG and TIFF byte by byte


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, depth: int, color: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of ``samples`` ``[H, W, C]``, with ``chunks`` before its data."""
    height, width = samples.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = [png_chunk(b"IHDR", header), *(png_chunk(*each) for each in chunks), png_chunk(b"IDAT", packed)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(middle) + png_chunk(b"IEND", b"")


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    return data[:33] + png_chunk(kind, content) + data[33:]


def tiff(samples: np.ndarray, *, big_endian: bool = False, photometric: int = 1, extra: int | None = None) -> bytes:
    """An uncompressed TIFF of ``samples`` ``[H, W]`` or ``[H, W, C]``, whose dtype is that of the file."""
    order = ">" if big_endian else "<"
    height, width = samples.shape[:2]
    count = samples.shape[2] if samples.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{count}H", *[8 * samples.dtype.itemsize] * count)
    bits += bytes(len(bits) % 4)
    found = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, count, 8 + len(pixels) if count > 2 else bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, count),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
        *([(338, 3, 1, extra)] if extra is not None else []),
        (339, 3, count, struct.pack(f"{order}2H", kind, kind) if count <= 2 else 8 + len(pixels) + len(bits)),
    ]
    formats = struct.pack(f"{order}{count}H", *[kind] * count) + bytes(2 * count % 4)
    entries = b""
    for tag, form, number, value in found:
        if isinstance(value, int):
            value = struct.pack(
                f"{order}I" if form == 4 or number > 2 else f"{order}HH",
                *([value] if form == 4 or number > 2 else [value, 0]),
            )
        entries += struct.pack(f"{order}HHI", tag, form, number) + value[:4].ljust(4, b"\0")
    body = pixels + bits + formats
    start = 8 + len(body)
    mark = b"MM\0*" if big_endian else b"II*\0"
    return mark + struct.pack(f"{order}I", start) + body + struct.pack(f"{order}H", len(found)) + entries + bytes(4)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of entries (tag, type, count, value of four bytes), which Pillow would not write."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def cut_jpeg(data: bytes, share: float) -> bytes:
    """A JPEG that ends after a share of its data, made whole by an end marker."""
    start = data.index(b"\xff\xda") + 14
    return data[: start + int((len(data) - start) * share)].removesuffix(b"\xff") + b"\xff\xd9"
