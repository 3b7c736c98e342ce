"""Thumbnails of the images in a report, rendered by a pool of actors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import storage
from ..accelerator import pick_device
from ..data.pipeline import run_rows
from ..data.stages import Pool, Stage
from ..errors import UserError
from ..rendering import thumbnail
from .measure import Record
from .reader import Reader, ReaderOptions
from .units import Unit

THUMBNAILS = "thumbnails.parquet"
"""File of the measured images, and end of the name of that of a reference's images."""
SCHEMA = pa.schema(
    [
        ("setting", pa.string()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("category", pa.string()),
        ("image", pa.binary()),
        ("original", pa.binary()),
    ]
)


@dataclass(frozen=True)
class ThumbnailOptions:
    """Options of the thumbnail actors."""

    reader: ReaderOptions
    size: int
    gpu: bool


class ThumbnailActor:
    """Actor that renders thumbnails from rows with a unit and the ids to show."""

    def __init__(self, order: ThumbnailOptions) -> None:
        self.order = order
        self.reader = Reader(order.reader, pick_device("auto" if order.gpu else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [shown for row in table.to_pylist() for shown in self.made(row)]
        return pa.Table.from_pylist(rows, SCHEMA)

    def made(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        unit, shown = Unit.model_validate_json(row["unit"]), []
        for part in self.reader.batches(unit, set(row["ids"])):
            batch = part.at(None)
            for place, name in enumerate(batch.ids):
                prompt = batch.prompts[place] if batch.prompts else ""
                images = (self._file(batch.images, place), self._file(batch.references, place))
                values = (unit.setting, name, prompt, part.categories[place], *images)
                shown.append(dict(zip(SCHEMA.names, values, strict=True)))
        return shown

    def _file(self, images: np.ndarray | Sequence[np.ndarray] | None, place: int) -> bytes | None:
        return None if images is None else thumbnail(images[place], self.order.size)


def write_thumbnails(
    url: str,
    order: ThumbnailOptions,
    records: Mapping[str, Sequence[Record]],
    wanted: Mapping[str, Collection[str]],
    pool: Pool,
    *,
    local: bool,
) -> None:
    """Write a parquet file of thumbnails of the ``wanted`` ids of every setting."""
    rows = [
        {"unit": record.unit.model_dump_json(), "ids": ids}
        for setting, found in records.items()
        for record in found
        if (ids := [name for name in record.ids if name in wanted[setting]])
    ]
    made: list[dict[str, Any]] = []
    if rows:
        shown = run_rows(rows, Stage(partial(ThumbnailActor, order), pool), local=local)
        made = sorted(shown, key=lambda row: (row["setting"], row["id"]))
    storage.write_parquet(url, pa.Table.from_pylist(made, SCHEMA))


def read_thumbnails(url: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Read rows of :data:`SCHEMA` by setting and sample id; raises UserError if the file is missing or damaged."""
    with storage.open_file(url) as stream:
        try:
            rows = pq.read_table(stream).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{url}: damaged ({str(error).splitlines()[0]})") from None
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["id"]] = row
    return found
