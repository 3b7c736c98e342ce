"""Measuring: an actor takes a unit of work and stores what every metric gathered from it; the driver merges.

A unit's folder holds a state a metric and, last of all, ``rows.json``: with it the unit is finished. So whatever was killed
at whatever point, measuring again adds what is missing and gives the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from .. import storage
from ..accelerator import device_label, pick_device
from ..config import Config
from ..data.pipeline import run_rows
from ..data.stages import Pool, Stage
from ..errors import UserError
from .metric_settings import Maker, Section, Tools
from .metrics.base import Metric
from .metrics.frechet import Gaussian
from .metrics.states import load_state, save_state
from .reader import Reader, ReaderOptions
from .units import Unit

SINGLE = "single"
"""Folder of what is not part of a sweep."""
ROWS = "rows.json"


class Record(Config):
    """What became of a unit: with it the unit is finished."""

    unit: Unit
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """A sample's prompt by its id; an image is its own group."""
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    originals: tuple[str, ...]
    """Hash of each image's file, to know it again; of samples ''."""
    quarantined: dict[str, int]
    """Images that could not be read, by reason."""
    seconds: float
    device: str


class States:
    """``FOLDER/SETTING/UNIT/METRIC.npz`` and each unit's record."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def path(self, setting: str, unit: str, name: str) -> str:
        return storage.join(self.folder, setting or SINGLE, unit, name)

    def record(self, unit: Unit) -> Record | None:
        """None where the unit is not finished."""
        path = self.path(unit.setting, unit.name, ROWS)
        if not storage.exists(path):
            return None
        record = Record.model_validate(storage.read_json(path))
        if record.unit != unit:
            raise UserError(f"{path}: of another piece of work; use mode=fresh or another folder")
        return record

    def save(self, record: Record, metrics: Mapping[str, Metric]) -> None:
        setting, unit = record.unit.setting, record.unit.name
        for name, metric in metrics.items():
            save_state(self.path(setting, unit, f"{name}.npz"), metric)
        storage.write_json(self.path(setting, unit, ROWS), record.model_dump(mode="json"))

    def merged(self, setting: str, units: Sequence[str], name: str, into: Metric | None = None) -> Metric:
        """A metric over all ``units``, in their order, so that sums are rounded alike each time.

        ``into`` is an empty one to merge into, for what needs its network: distances between images of two files.
        """
        for unit in units:
            part = load_state(self.path(setting, unit, f"{name}.npz"))
            if into is None:
                into = part
            else:
                into.merge(part)
        assert into is not None
        return into


@dataclass(frozen=True)
class MeasureOptions:
    """What every actor is told."""

    states: str
    sections: Mapping[str, Section]
    reader: ReaderOptions
    per_prompt: int = 0
    reference: tuple[str, str] | None = None
    """FID's: where it is stored, and what it was made of."""
    gpu: bool = False

    def tools(self, device: str = "cpu") -> Tools:
        return Tools(device, load_reference(self.reference), self.per_prompt)


def load_reference(reference: tuple[str, str] | None) -> Gaussian | None:
    """A reference as its results name it: by what it was made of."""
    if reference is None:
        return None
    url, source = reference
    loaded = Gaussian.load(url)
    return Gaussian(loaded.mean, loaded.covariance, loaded.count, source, loaded.sha256)


class Measurer:
    """Actor with the tokenizer and the metrics' networks. What is the user's to mend comes back in ``problem``."""

    def __init__(self, task: MeasureOptions) -> None:
        self.task = task
        self.device = pick_device("auto" if task.gpu else "cpu")
        self.ready: tuple[Reader, dict[str, Maker]] | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        reports: list[tuple[int, str | None]] = []
        for text in table["unit"].to_pylist():
            try:
                record = self.measured(Unit.model_validate_json(text))
                reports.append((len(record.ids), None))
            except UserError as error:
                reports.append((0, str(error)))
        return pa.Table.from_pylist([dict(zip(REPORT.names, r, strict=True)) for r in reports], REPORT)

    def measured(self, unit: Unit) -> Record:
        """The unit's record, measured unless an actor that was lost had just finished it."""
        states = States(self.task.states)
        if (found := states.record(unit)) is not None:
            return found
        if self.ready is None:
            tools = self.task.tools(str(self.device))
            makers = {name: section.load(tools) for name, section in self.task.sections.items()}
            self.ready = Reader(self.task.reader, self.device), makers
        reader, makers = self.ready
        reader.quarantined.clear()
        metrics, began = {name: make() for name, make in makers.items()}, time.perf_counter()
        rows: dict[str, list[Any]] = {"ids": [], "groups": [], "prompts": [], "categories": [], "originals": []}
        for found_rows in reader.batches(unit):
            batch = found_rows.batch
            for metric in metrics.values():
                metric.update(batch)
            prompts = list(batch.prompts or [""] * len(batch))
            columns: tuple[list[Any], ...] = (
                list(batch.ids),
                batch.group_names,
                prompts,
                found_rows.categories,
                found_rows.originals,
            )
            for name, column in zip(rows, columns, strict=True):
                rows[name] += column
        about = {"quarantined": dict(sorted(reader.quarantined.items())), "device": device_label(self.device)}
        record = Record(unit=unit, **rows, **about, seconds=time.perf_counter() - began)
        states.save(record, metrics)
        return record


REPORT = pa.schema([("images", pa.int64()), ("problem", pa.string())])


def measure(task: MeasureOptions, units: Sequence[Unit], pool: Pool, *, local: bool, title: str) -> list[Record]:
    """Measure what is not finished yet, on a pool of actors or in this process; returns the records of all ``units``.

    UserError with the first problem that an actor met: a file of samples that is not whole, weights that are not there.
    """
    states = States(task.states)
    done = {(unit.setting, unit.name): record for unit in units if (record := states.record(unit))}
    todo = [unit for unit in units if (unit.setting, unit.name) not in done]
    with tqdm(total=_total(units), initial=sum(len(r.ids) for r in done.values()), desc=title, unit="image") as bar:
        if todo:
            rows = [{"unit": unit.model_dump_json()} for unit in todo]
            for report in run_rows(rows, Stage(partial(Measurer, task), pool), local=local):
                if report["problem"]:
                    raise UserError(report["problem"])
                bar.update(report["images"])
    records = [states.record(unit) for unit in units]
    missing = [unit.name for unit, record in zip(units, records, strict=True) if record is None]
    if missing:
        raise RuntimeError(f"{task.states}: not finished: {', '.join(missing[:5])}")
    return [record for record in records if record is not None]


def _total(units: Sequence[Unit]) -> int | None:
    """Rows of all units, where that is known."""
    counts = [unit.rows for unit in units]
    return None if None in counts else sum(count or 0 for count in counts)
