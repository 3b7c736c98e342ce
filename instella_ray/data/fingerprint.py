"""What copies of a picture share: a hash of the bytes, a perceptual hash, and the colours of a 4 x 4 grid."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy.fft import dctn

from .decode import UndecodableError, decode_rgb, open_picture
from .ledger import KEPT, QUARANTINED

GRID = 4
"""Cells along each side in which mean colours are compared."""
FLAT = 8.0
"""Coefficients under this, which is half a grey level of amplitude, are an encoder's noise and count as none."""

FIELDS = [
    ("exact", pa.binary(16)),
    ("near", pa.uint64()),
    ("colors", pa.binary(3 * GRID**2)),
    ("pixels", pa.int64()),
]
"""Columns of a fingerprint: BLAKE2b of the file; the perceptual hash; mean RGB of each cell, since that hash knows no colour
and little of plain pictures; width times height, since of several copies the largest stays."""


def fingerprint(data: bytes) -> dict[str, Any]:
    """The :data:`FIELDS` of an encoded picture; UndecodableError where it is none."""
    width, height = open_picture(data).size
    image = decode_rgb(data, at_least=64)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    return {
        "exact": hashlib.blake2b(data, digest_size=16).digest(),
        "near": perceptual_hash(grey),
        "colors": np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.uint8).tobytes(),
        "pixels": width * height,
    }


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of luminance ``[32, 32]``: which of its 64 lowest frequencies lie above their median (pHash)."""
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    low[np.abs(low) < FLAT] = 0
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


class Fingerprinter:
    """Gives the kept rows of a block the columns of a fingerprint."""

    def __call__(self, table: pa.Table) -> pa.Table:
        verdicts = table["verdict"].to_pylist()
        found: list[dict[str, Any]] = []
        for number, (data, verdict) in enumerate(zip(table["image"].to_pylist(), verdicts, strict=True)):
            try:
                found.append(fingerprint(data) if verdict == KEPT else {})
            except UndecodableError as error:
                found.append({})
                verdicts[number] = f"{QUARANTINED}:{error}"
        columns = pa.Table.from_pylist(found, pa.schema(FIELDS))
        judged = table.set_column(table.schema.get_field_index("verdict"), "verdict", pa.array(verdicts, pa.string()))
        for name in columns.column_names:
            judged = judged.append_column(name, columns[name])
        return judged
