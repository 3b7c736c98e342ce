"""CPU stage of encoding: decodes images into square views. Without torch, whose import would cost workers seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from .formats.images import UndecodableError, decode_rgb, fit_square
from .formats.parts import KEPT, verdict_of
from .formats.rows import MEMBERS

ROWS_AT_ONCE = 64
"""Images decoded before their pixels are converted to Arrow columns."""
PIXELS = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("last", pa.bool_()),
        ("caption", pa.string()),
        ("meta", pa.string()),
        ("image", pa.large_binary()),
        ("members", MEMBERS),
        ("verdict", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("views", pa.large_binary()),
    ]
)
"""Columns between decoding and encoding: ``views`` is uint8 ``[V, size, size, 3]``; undecodable images keep ``image``."""


class ViewDecoder:
    """Decodes, resizes and crops images into rows of :data:`PIXELS`."""

    def __init__(self, size: int, crops: int, flips: bool) -> None:
        self.size, self.crops, self.flips = size, crops, flips

    def __call__(self, table: pa.Table) -> pa.Table:
        # In small batches: Python objects of the whole table would double the memory.
        parts = (table.slice(start, ROWS_AT_ONCE).to_pylist() for start in range(0, table.num_rows, ROWS_AT_ONCE))
        return pa.concat_tables(pa.Table.from_pylist([self.decoded(row) for row in rows], PIXELS) for rows in parts)

    def rows_within(self, size: int) -> int:
        """Return the number of images whose views fit into ``size`` bytes; at least 1."""
        views = self.crops * (2 if self.flips else 1)
        return max(1, size // (3 * views * self.size**2))

    def decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["problem"]:
            return {**row, "verdict": verdict_of(row["problem"])}
        try:
            image = decode_rgb(row["image"], at_least=2 * self.size)
        except UndecodableError as error:
            return {**row, "verdict": f"quarantined:{error}"}
        places = [crop / (self.crops - 1) if self.crops > 1 else 0.5 for crop in range(self.crops)]
        views = [fit_square(image, self.size, (place, place)) for place in places]
        if self.flips:
            views += [view[:, ::-1] for view in views]
        facts = {"verdict": KEPT, "width": image.width, "height": image.height, "image": None, "members": None}
        return {**row, **facts, "views": np.stack(views).tobytes()}
