"""Evaluation job: samples, or a tokenizer's reconstructions, are measured on actors and become ``report.html``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from .. import storage
from ..accelerator import hardware_summary
from ..config import Config
from ..data.parts import Mode, open_output
from ..data.pipeline import init_ray
from ..errors import UserError
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config, weight_hash
from .choice import Choice, ShowConfig, choose_pictures
from .gallery import Order, paint
from .measure import Record, States, Task, load_reference, measure
from .metric_settings import FID, LpipsDiversity, MetricsConfig, Reference, Section, absolute, choose
from .metrics.base import Metric
from .metrics.frechet import Frechet
from .metrics.presets import preset
from .reading import ReaderOptions
from .report import write_report
from .results import RESULTS, STATES
from .sample_set import SampleSet, find_sample_sets
from .subjects import Unit, has_captions, has_scene_captions, picture_units, sample_units

REFERENCE = "reference"
PLAIN_SIZE = 256
"""Pixels a side of pictures that are measured as they are, where nothing else is asked for."""


class EvaluateConfig(Config):
    """What is measured, by which metrics, and where the report goes."""

    output: str
    """Folder for ``report.html``, ``results.json`` and what the metrics gathered."""
    samples: str | None = None
    """Folder of samples, one set or a sweep."""
    pictures: str | None = None
    """In place of samples: tars, parquet files or folders of pictures, which the tokenizer reconstructs."""
    tokenizer: str | None = None
    """Model folder of the BIT. Without it samples stay codes, and pictures are measured as they are: a ceiling."""
    size: int | None = Field(None, ge=16)
    """Pixels a side of the pictures that are measured; none means the tokenizer's own."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    metrics: MetricsConfig | None = None
    """Those to measure; none means those that need no file beside."""
    preset: str | None = None
    """A table of the paper whose numbers stand beside ours: paper-table1, paper-table3, ..."""
    show: ShowConfig = ShowConfig()
    seed: int = 0
    """Of the bootstrap."""
    batch_size: int = Field(16, ge=1)
    """Pictures a call of a network."""
    rows_per_unit: int = Field(1000, ge=1)
    """Pictures that an actor measures in one go; of samples it is a file."""
    actors: int | None = Field(None, ge=1)
    """Measuring actors; none means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 measures on the CPU."""

    @model_validator(mode="after")
    def _one_subject(self) -> EvaluateConfig:
        if (self.samples is None) == (self.pictures is None):
            raise ValueError("expected one of samples, pictures")
        return self


class Subject:
    """What is to be measured, looked at before any of it is read."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        self.size, self.tokenizer_hash = cfg.size or PLAIN_SIZE, None
        if cfg.tokenizer is not None:
            self._look_at(cfg, cfg.tokenizer)
        if cfg.samples is not None:
            self.sets = find_sample_sets(cfg.samples)
            self.units = {name: sample_units(name, found) for name, found in self.sets.items()}
            each = {found.run.images_per_prompt for found in self.sets.values()}
            self.per_prompt = each.pop() if len(each) == 1 else 0
            self.offers = {"codes", "prompts", "meta"} | ({"images"} if cfg.tokenizer else set())
            self.offers |= {"groups"} if self.per_prompt != 1 else set()
            self.about = {name: _about(found) for name, found in self.sets.items()}
            self._check_tokenizer(cfg)
        else:
            self.units = {"": picture_units(str(cfg.pictures), cfg.rows_per_unit)}
            self.per_prompt = 0
            self.offers = {"images"} | ({"references", "codes"} if cfg.tokenizer else set())
            self.offers |= {"prompts"} if has_captions(self.units[""]) else set()
            self.about = {"": {"pictures": cfg.pictures}}
        empty = next((name for name, units in self.units.items() if not units), None)
        if empty is not None:
            raise UserError(f"samples {cfg.samples}: setting '{empty}' holds no files")
        self.scenes = "prompts" in self.offers and has_scene_captions(next(iter(self.units.values())))

    @property
    def all_units(self) -> list[Unit]:
        return [unit for units in self.units.values() for unit in units]

    def _look_at(self, cfg: EvaluateConfig, tokenizer: str) -> None:
        bit = parse_model(read_checkpoint_config(tokenizer)["model"], tokenizer)
        if not isinstance(bit, BITConfig):
            raise UserError(f"tokenizer {tokenizer}: holds a {bit.kind} generator, expected a BIT")
        self.size, self.tokenizer_hash = cfg.size or bit.image_size, weight_hash(tokenizer)
        multiple = bit.size_multiple if cfg.pictures else bit.decode_multiple
        if self.size % multiple:
            raise UserError(f"size {self.size}: not a multiple of {multiple}, as tokenizer {tokenizer} needs")

    def _check_tokenizer(self, cfg: EvaluateConfig) -> None:
        for found in self.sets.values():
            theirs = found.run.tokenizer_hash
            if cfg.tokenizer is not None and theirs != self.tokenizer_hash:
                ours = str(self.tokenizer_hash)[:12]
                raise UserError(f"{found.folder}: codes of tokenizer {str(theirs)[:12]}, {cfg.tokenizer} is {ours}")


def run_evaluate(cfg: EvaluateConfig) -> str:
    """Measure, write ``results.json`` and ``report.html`` into ``cfg.output``, and return the report's path.

    UserError when the subject is not whole, does not fit the tokenizer or the metrics, or the output exists unasked.
    """
    cfg = _absolute(cfg)
    if cfg.preset is not None:
        preset(cfg.preset)
    subject = Subject(cfg)
    sections = choose(cfg.metrics, frozenset(subject.offers), scenes=subject.scenes)
    sections = {name: absolute(section) for name, section in sections.items()}
    open_output(cfg.output, cfg.mode, _identity(cfg, subject, sections))
    init_ray()
    spread: dict[str, Any] = {"actors": cfg.actors, "gpus_per_actor": cfg.gpus_per_actor}
    fid = sections.get("fid")
    reference = _reference(cfg, fid, spread) if isinstance(fid, FID) else None
    captions = any("prompts" in section.needs for section in sections.values())
    reader = ReaderOptions(cfg.tokenizer, subject.size, cfg.batch_size, captions)
    gpu = cfg.gpus_per_actor > 0
    task = Task(storage.join(cfg.output, STATES), sections, reader, subject.per_prompt, reference, gpu)
    measured = measure(task, subject.all_units, **spread, title="evaluate")
    records: dict[str, list[Record]] = {name: [] for name in subject.units}
    for record in measured:
        records[record.unit.setting].append(record)
    choices, settings = {}, []
    for name, found in records.items():
        metrics = _merged(task, name, found)
        choices[name] = choose_pictures(found, metrics, cfg.show, len(records))
        settings.append(_summary(name, subject.about[name], found, metrics, choices[name], cfg.seed))
    if "images" in subject.offers:
        paint(cfg.output, Order(reader, cfg.show.size, gpu), records, choices, **spread)
    card = _card(cfg, subject, measured)
    storage.write_json(storage.join(cfg.output, RESULTS), {"card": card, "settings": settings})
    return write_report(cfg.output)


def _absolute(cfg: EvaluateConfig) -> EvaluateConfig:
    """With full paths, as actors work in directories of their own; the name of a folder may hold commas."""
    places = {"pictures": cfg.pictures and storage.absolute(cfg.pictures)}
    for name in ("output", "samples", "tokenizer"):
        path = getattr(cfg, name)
        places[name] = str(Path(path).absolute()) if path and "://" not in path else path
    return cfg.model_copy(update=places)


def _identity(cfg: EvaluateConfig, subject: Subject, sections: dict[str, Section]) -> dict[str, Any]:
    """What a job must share with the one whose output it goes on with."""
    work = [unit.model_dump(mode="json") for unit in subject.all_units]
    runs = {name: about.get("run_id") for name, about in subject.about.items()}
    return {
        "samples": cfg.samples,
        "pictures": cfg.pictures,
        "size": subject.size,
        "batch_size": cfg.batch_size,
        "tokenizer_hash": subject.tokenizer_hash,
        "metrics": {name: section.model_dump(mode="json") for name, section in sections.items()},
        "work": hashlib.sha256(json.dumps([work, runs]).encode()).hexdigest(),
    }


def _reference(cfg: EvaluateConfig, fid: FID, spread: dict[str, Any]) -> tuple[str, str]:
    """Where the statistics of FID's reference are, gathered from its pictures where they are not stored, and its name."""
    if fid.reference.endswith(".npz"):
        return fid.reference, fid.reference
    if fid.images.size is None:
        raise UserError("metrics.fid.images.size: a reference of pictures needs one, for example 256")
    url = storage.join(cfg.output, f"{REFERENCE}.npz")
    if not storage.exists(url):
        sections = {"fid": Reference(**fid.model_dump())}
        reader = ReaderOptions(None, fid.images.size, cfg.batch_size, images=fid.images)
        task = Task(storage.join(cfg.output, REFERENCE), sections, reader, gpu=cfg.gpus_per_actor > 0)
        units = picture_units(fid.reference, cfg.rows_per_unit)
        measure(task, units, **spread, title="reference")
        gathered = States(task.states).merged("", [unit.name for unit in units], "fid")
        assert isinstance(gathered, Frechet)
        gathered.gaussian().save(url)
    return url, fid.reference


def _merged(task: Task, setting: str, records: Sequence[Record]) -> dict[str, Metric]:
    states, units = States(task.states), [record.unit.name for record in records]
    found: dict[str, Metric] = {}
    for name, section in task.sections.items():
        into = section.load(task.tools())() if isinstance(section, LpipsDiversity) else None
        metric = found[name] = states.merged(setting, units, name, into)
        if isinstance(metric, Frechet) and (reference := load_reference(task.reference)) and name == "fid":
            metric.attach(reference)
    return found


def _about(samples: SampleSet) -> dict[str, Any]:
    manifest = samples.manifest
    run = manifest.run.model_dump(mode="json")
    cost = {"seconds": manifest.seconds, "cost": manifest.cost, "price_per_hour": manifest.price_per_hour}
    each = manifest.seconds / manifest.rows if manifest.rows else None
    return {"run_id": manifest.run_id, **run, "hardware": manifest.hardware, **cost, "seconds_per_image": each}


def _summary(
    name: str, about: dict[str, Any], records: Sequence[Record], metrics: dict[str, Metric], choice: Choice, seed: int
) -> dict[str, Any]:
    quarantined = sum((Counter(record.quarantined) for record in records), Counter[str]())
    return {
        "name": name,
        "about": about,
        "measured": sum(len(record.ids) for record in records),
        "quarantined": dict(sorted(quarantined.items())),
        "units": [record.unit.name for record in records],
        "metrics": {key: metric.result(seed=seed).to_json() for key, metric in metrics.items()},
        "shown": choice.model_dump(mode="json"),
    }


def _card(cfg: EvaluateConfig, subject: Subject, records: Sequence[Record]) -> dict[str, Any]:
    names = ("instella-ray", "torch", "ray", "numpy", "pillow")
    return {
        "subject": "samples" if cfg.samples else "reconstructions" if cfg.tokenizer else "pictures",
        "source": cfg.samples or cfg.pictures,
        "tokenizer": cfg.tokenizer,
        "tokenizer_hash": subject.tokenizer_hash,
        "size": subject.size if "images" in subject.offers else None,
        "preset": cfg.preset,
        "bootstrap_seed": cfg.seed,
        "batch_size": cfg.batch_size,
        "versions": {name: version(name) for name in names},
        "hardware": hardware_summary(),
        "devices": sorted({record.device for record in records}),
        "actor_seconds": sum(record.seconds for record in records),
    }
