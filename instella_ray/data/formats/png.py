"""Fast lossless PNG files: one filter for all rows, compressed by ISA-L.

Libraries try five filters on each row and compress with zlib. Differences to the row above alone, compressed by ISA-L's
igzip, give files of about the same size in a tenth of the time.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from isal import isal_zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEPTH, RGB, UP = 8, 2, 2
"""Bits per sample, colour type, and the filter of differences to the row above (PNG specification, 11.2.1 and 9.2)."""
LEVEL = 1
"""Level of igzip; 0 gives files 1.4 times as large in the same time."""


def write_png(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """Write uint8 ``[H, W, 3]`` as the bytes of a PNG file; ``texts`` are its text chunks (Latin-1) by keyword."""
    height, width, _ = pixels.shape
    rows = np.ascontiguousarray(pixels).reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, DEPTH, RGB, 0, 0, 0))]
    chunks += [(b"tEXt", f"{keyword}\0{text}".encode("latin-1")) for keyword, text in texts.items()]
    chunks += [(b"IDAT", isal_zlib.compress(filtered, LEVEL)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def read_text(data: bytes, keyword: str) -> str | None:
    """Return the first text chunk (Latin-1) with ``keyword`` of a PNG file, whatever its size; None if there is none."""
    start, at = keyword.encode("latin-1") + b"\0", len(SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"tEXt" and data.startswith(start, at + 8):
            return data[at + 8 + len(start) : end - 4].decode("latin-1")
        at = end
    return None


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))
