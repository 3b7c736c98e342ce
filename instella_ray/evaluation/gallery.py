"""Pictures for the report: which ones, and their thumbnails, made by actors like those that measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from .. import storage
from ..accelerator import pick_device
from ..config import Config
from ..data.pipeline import actor_pool, quiet
from ..errors import UserError
from .measure import Record
from .metrics.base import Metric
from .metrics.rates import RateMetric
from .metrics.samples import SampleMetric
from .reading import Reader, ReaderOptions
from .rendering import thumbnail
from .subjects import Unit

GALLERY = "gallery.parquet"
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
LOWER_IS_BETTER = ("lpips",)


class ShowConfig(Config):
    """Pictures in the report."""

    prompts: int = Field(24, ge=0)
    """In the grid, spread over categories: a sample drawn by a hash of their ids, so that two runs show the same."""
    extremes: int = Field(8, ge=0)
    """Best and worst pictures by each score."""
    size: int = Field(256, ge=16)
    """Longer side in pixels at most."""
    most: int = Field(600, ge=0)
    """Pictures in the whole report: a sweep shows fewer of each setting."""


class Shown(Config):
    """A picture with its score."""

    id: str
    score: float
    reason: str = ""


class Choice(Config):
    """What is shown of a setting."""

    grid: tuple[str, ...]
    verdicts: dict[str, str]
    """Of the grid's pictures, by the metric that judges them: why they are wrong, '' where they are right."""
    best: dict[str, tuple[Shown, ...]]
    """By metric."""
    worst: dict[str, tuple[Shown, ...]]

    @property
    def ids(self) -> set[str]:
        shown = [s for part in (self.best, self.worst) for column in part.values() for s in column]
        return {*self.grid, *(s.id for s in shown)}


def choose_pictures(
    records: Sequence[Record], metrics: Mapping[str, Metric], show: ShowConfig, settings: int
) -> Choice:
    """A fixed sample of prompts, and the best and worst by every score, of one of ``settings``."""
    scored = {name: m for name, m in metrics.items() if isinstance(m, SampleMetric | RateMetric)}
    wanted = show.prompts + 2 * show.extremes * len(scored)
    share = min(1.0, show.most / max(1, settings * wanted))
    extremes, prompts = int(show.extremes * share), int(show.prompts * share)
    ranked = {name: _ranked(metric) for name, metric in scored.items()}
    best = {name: tuple(found[:extremes]) for name, found in ranked.items()}
    worst = {name: tuple(found[::-1][:extremes]) for name, found in ranked.items()}
    grid = tuple(_grid(records, prompts))
    judged = next((m.verdicts() for m in scored.values() if isinstance(m, RateMetric)), {})
    verdicts = {name: judged[name].reason for name in grid if name in judged}
    return Choice(grid=grid, verdicts=verdicts, best=best, worst=worst)


def _grid(records: Sequence[Record], count: int) -> list[str]:
    """One picture of each prompt; categories take turns, prompts come by the hash of their name."""
    first: dict[str, tuple[str, str]] = {}
    for record in records:
        for name, group, category in zip(record.ids, record.groups, record.categories, strict=True):
            place = first.setdefault(group, (name, category or ""))
            first[group] = min(place, (name, category or ""))
    by_category: dict[str, list[str]] = {}
    for group in sorted(first, key=_draw):
        name, category = first[group]
        by_category.setdefault(category, []).append(name)
    each = -(-count // max(1, len(by_category)))
    return [name for _, names in sorted(by_category.items()) for name in names[:each]]


def _ranked(metric: SampleMetric | RateMetric) -> list[Shown]:
    """Best first; those of one score by the hash of their name."""
    reasons = {k: v.reason for k, v in metric.verdicts().items()} if isinstance(metric, RateMetric) else {}
    sign = 1 if metric.info.name.startswith(LOWER_IS_BETTER) else -1
    rows = sorted(metric.scores().items(), key=lambda row: (sign * row[1], _draw(row[0])))
    return [Shown(id=name, score=value, reason=reasons.get(name, "")) for name, value in rows]


def _draw(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@dataclass(frozen=True)
class Order:
    """What the painting actors are told."""

    reader: ReaderOptions
    size: int
    gpu: bool


class Painter:
    """Actor: rows with a unit and the ids to show become thumbnails."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.reader = Reader(order.reader, pick_device("auto" if order.gpu else "cpu"))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [shown for row in table.to_pylist() for shown in self.painted(row)]
        return pa.Table.from_pylist(rows, SCHEMA)

    def painted(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        unit, shown = Unit.model_validate_json(row["unit"]), []
        for part in self.reader.batches(unit, set(row["ids"])):
            batch = part.batch
            for place, name in enumerate(batch.ids):
                prompt = batch.prompts[place] if batch.prompts else ""
                images = (self._file(batch.images, place), self._file(batch.references, place))
                values = (unit.setting, name, prompt, part.categories[place], *images)
                shown.append(dict(zip(SCHEMA.names, values, strict=True)))
        return shown

    def _file(self, images: np.ndarray | None, place: int) -> bytes | None:
        return None if images is None else thumbnail(images[place], self.order.size)


def paint(
    output: str,
    order: Order,
    records: Mapping[str, Sequence[Record]],
    choices: Mapping[str, Choice],
    *,
    actors: int | None,
    gpus_per_actor: float,
) -> None:
    """Write ``gallery.parquet`` with the chosen pictures of every setting."""
    rows = []
    for setting, found in records.items():
        wanted = choices[setting].ids
        rows += [
            {"unit": record.unit.model_dump_json(), "ids": ids}
            for record in found
            if (ids := [name for name in record.ids if name in wanted])
        ]
    made: list[dict[str, Any]] = []
    if rows:
        painted = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Painter,
            fn_constructor_args=(order,),
            batch_format="pyarrow",
            batch_size=1,
            **actor_pool(actors, gpus_per_actor),
        )
        quiet(painted)
        made = sorted(painted.iter_rows(), key=lambda row: (row["setting"], row["id"]))
    with storage.open_file(storage.join(output, GALLERY), "wb") as stream:
        pq.write_table(pa.Table.from_pylist(made, SCHEMA), stream)


def read_gallery(output: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Setting -> id -> row of :data:`SCHEMA`; UserError where there is none."""
    url = storage.join(output, GALLERY)
    with storage.open_file(url) as stream:
        try:
            rows = pq.read_table(stream).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{url}: damaged ({str(error).splitlines()[0]})") from None
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["id"]] = row
    return found
