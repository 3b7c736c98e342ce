"""Distributed measurement: actors measure units of work and store metric states, which the driver merges.

A unit's folder contains one state per metric and ``rows.json``, which is written last and marks the unit as finished. An
interrupted measurement can therefore be rerun: it measures the missing units and gives the same results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from .. import logs, storage
from ..accelerator import device_label, pick_device
from ..config import Config
from ..data.pipeline import run_rows
from ..data.stages import Pool, Stage
from ..errors import UserError, path_problem
from .metrics.base import Metric
from .metrics.images import ImageSettings
from .metrics.states import load_state, save_state
from .reader import Reader, ReaderOptions
from .sections import Maker, Section, Tools
from .units import Unit

SINGLE = "single"
"""Folder name of the setting of a sample set that is not part of a sweep."""
ROWS = "rows.json"


class Record(Config):
    """Metadata of a measured unit; its presence marks the unit as finished."""

    unit: Unit
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """Prompt id of each sample; for images each image's own id."""
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    originals: tuple[str, ...]
    """Hash of each source image file, to match images between evaluations; '' for samples."""
    quarantined: dict[str, int]
    """Number of unreadable images by reason."""
    seconds: float
    device: str


class States:
    """Stored metric states, ``FOLDER/SETTING/UNIT/METRIC.npz``, and the record of each unit."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def path(self, setting: str, unit: str, name: str) -> str:
        return storage.join(self.folder, setting or SINGLE, unit, name)

    def record(self, unit: Unit) -> Record | None:
        """Return the unit's record, None if it is not finished; raises UserError for a record of another unit."""
        path = self.path(unit.setting, unit.name, ROWS)
        if not storage.exists(path):
            return None
        record = Record.model_validate(storage.read_json(path))
        if record.unit != unit:
            raise UserError(f"{path}: belongs to a different unit of work; use mode=fresh or another folder")
        return record

    def save(self, record: Record, metrics: Mapping[str, Metric]) -> None:
        setting, unit = record.unit.setting, record.unit.name
        for name, metric in metrics.items():
            save_state(self.path(setting, unit, f"{name}.npz"), metric)
        storage.write_json(self.path(setting, unit, ROWS), record.model_dump(mode="json"))

    def merged(self, setting: str, units: Sequence[str], name: str, into: Metric | None = None) -> Metric:
        """Merge a metric's states of all ``units``, in the given order, so that rounding is reproducible.

        ``into``: an empty metric with a loaded network to merge into, for metrics that compare images of different files.
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
    """Options of the measuring actors."""

    states: str
    sections: Mapping[str, Section]
    reader: ReaderOptions
    per_prompt: int = 0
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Descriptions of the metrics' references, by section and role; actors need no more of them."""
    gpu: bool = False

    def tools(self, device: str = "cpu") -> Tools:
        return Tools(device, self.references, self.per_prompt)


class Measurer:
    """Actor that measures units with the tokenizer and the metrics' networks; returns errors of its input in ``problem``."""

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
            except (UserError, OSError, pa.ArrowException, torch.OutOfMemoryError) as error:
                reports.append((0, _problem(text, error)))
        return pa.Table.from_pylist([dict(zip(REPORT.names, r, strict=True)) for r in reports], REPORT)

    def measured(self, unit: Unit) -> Record:
        """Measure the unit and return its record; reuses an existing record, which a lost actor may have written."""
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
            for name, metric in metrics.items():
                metric.update(found_rows.at(_own_size(self.task.sections[name])))
            prompts = list(batch.prompts or [""] * len(batch))
            columns: tuple[list[Any], ...] = (
                list(batch.ids),
                batch.group_names,
                prompts,
                found_rows.categories,
                found_rows.originals,
            )
            for column, values in zip(rows, columns, strict=True):
                rows[column] += values
        about = {"quarantined": dict(sorted(reader.quarantined.items())), "device": device_label(self.device)}
        record = Record(unit=unit, **rows, **about, seconds=time.perf_counter() - began)
        states.save(record, metrics)
        return record


def _own_size(section: Section) -> int | None:
    """Return the size to which a metric resizes images itself; None if it has none."""
    images = getattr(section, "images", None)
    return images.size if isinstance(images, ImageSettings) else None


def _problem(unit: str, error: Exception) -> str:
    """Describe in one line what went wrong with a unit, given as JSON, and with which file."""
    if isinstance(error, UserError):
        return str(error)
    what = path_problem(error) or " ".join(f"{type(error).__name__}: {error}".split())
    return f"{Unit.model_validate_json(unit).source}: {what}"


REPORT = pa.schema([("images", pa.int64()), ("problem", pa.string())])


def measure(task: MeasureOptions, units: Sequence[Unit], pool: Pool, *, local: bool, title: str) -> list[Record]:
    """Measure unfinished units, on a pool of actors or in this process; returns the records of all ``units``.

    Raises UserError with the first problem reported by an actor, such as an incomplete sample file or missing weights.
    """
    states = States(task.states)
    done = {(unit.setting, unit.name): record for unit in units if (record := states.record(unit))}
    todo = [unit for unit in units if (unit.setting, unit.name) not in done]
    with logs.progress_bar(
        total=_total(units), initial=sum(len(r.ids) for r in done.values()), desc=title, unit="image"
    ) as bar:
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
    """Return the number of rows of all units; None if a unit's is unknown."""
    counts = [unit.rows for unit in units]
    return None if None in counts else sum(count or 0 for count in counts)
