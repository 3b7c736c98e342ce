"""Bytes of image files: their extension, and what has to be known or removed before they are decoded."""

from __future__ import annotations

import zlib
from collections import defaultdict

MAX_PNG_TEXT = 1 << 20
"""Maximum size of a PNG's text and ICC profile together, decompressed (bytes); the chunks above it are removed."""
_TEXT_CHUNKS = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_CODESTREAM = b"\xff\x0a"
_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),  # BigTIFF
    (b"MM\0+", "tiff"),
    (_JXL_CONTAINER, "jxl"),
    (_JXL_CODESTREAM, "jxl"),
)


def file_extension(data: bytes) -> str:
    """Return the extension of an image file by its magic bytes; ``jpg`` for unknown ones."""
    if data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif"
    return next((extension for start, extension in _SIGNATURES if data.startswith(start)), "jpg")


def without_large_text(data: bytes) -> bytes:
    """Remove the text chunks and ICC profiles of a PNG that exceed :data:`MAX_PNG_TEXT`, so that its image can be read."""
    kept, start, at, budget = list[bytes](), 0, 8, MAX_PNG_TEXT
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind in _TEXT_CHUNKS:
            # After the first that does not fit all others go too, or many small bombs would each be decompressed.
            budget = max(0, budget - _text_size(kind, data[at + 8 : end - 4], budget + 1)) if budget else 0
            if not budget:
                kept.append(data[start:at])
                start = end
        at = end
    return b"".join([*kept, data[start:]])


def _text_size(kind: bytes, chunk: bytes, limit: int) -> int:
    """Return the size of a text chunk or profile, decompressed up to ``limit`` bytes; ``limit`` for an invalid one."""
    keyword, found, rest = chunk.partition(b"\0")
    if not found or (kind in (b"iCCP", b"zTXt") and rest[:1] != b"\0"):
        return limit
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    elif kind in (b"iCCP", b"zTXt"):
        packed = rest[1:]
    else:
        return len(chunk)
    try:
        return len(keyword) + len(zlib.decompressobj().decompress(packed, limit))
    except zlib.error:
        return len(chunk)


def find_scan(data: bytes) -> int:
    """Find the marker of a JPEG's first scan, as opposed to that of a thumbnail inside it (bytes); -1 without one."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 4:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        # Markers are followed by the length of their segment, except for these.
        at += (
            1 if marker in (0x00, 0x01, 0xFF, *range(0xD0, 0xD8)) else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        )
    return -1


def complete_components(scans: bytes) -> int:
    """Count the components of which several scans hold all coefficients to the last bit."""
    coefficients: dict[int, set[int]] = defaultdict(set)
    for header in scans.split(b"\xff\xda")[1:]:
        count = header[2] if len(header) > 2 else 0
        components, rest = header[3 : 3 + 2 * count : 2], header[3 + 2 * count : 6 + 2 * count]
        if len(rest) == 3 and not rest[2] & 15:  # 15: the bits that are left to later scans
            for component in components:
                coefficients[component].update(range(rest[0], min(rest[1], 63) + 1))
    return sum(len(found) == 64 for found in coefficients.values())


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Read the (width, height) of a JPEG XL file from its first bytes; None if it is damaged.

    The field is SizeHeader of ISO/IEC 18181-1. Pillow's plugin would decode the whole image to learn its size.
    """
    stream = data if data.startswith(_JXL_CODESTREAM) else _jxl_codestream(data)
    if not stream.startswith(_JXL_CODESTREAM) or len(stream) < 12:
        return None
    bits, at = int.from_bytes(stream[2:16], "little"), 0

    def read(count: int) -> int:
        nonlocal at
        value = bits >> at & (1 << count) - 1
        at += count
        return value

    small = read(1)

    def length() -> int:
        return 8 * (read(5) + 1) if small else read((9, 13, 18, 30)[read(2)]) + 1

    height = length()
    ratio = read(3)
    if not ratio:
        return length(), height
    wide, high = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * wide // high, height


def _jxl_codestream(data: bytes) -> bytes:
    """Return the start of the codestream in a container of ISO base media boxes; empty if there is none."""
    at = 0
    while at + 16 <= len(data):
        size, kind, header = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            first = at + header + (4 if kind == b"jxlp" else 0)
            return data[first : first + 16]
        if size < header:  # 0: the last box
            break
        at += size
    return b""
