"""Evaluation job: measures generated samples or tokenizer reconstructions and writes ``report.html``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .. import storage
from ..accelerator import hardware_summary
from ..bulk.sample_set import samples_provenance
from ..data.formats.parts import open_output
from ..data.formats.patterns import pattern_text
from ..data.model_provenance import model_provenance
from ..data.stages import Pool
from ..errors import UserError
from ..runs import Provenance, recorded
from .citation import add_citations, library_versions
from .inputs import EvaluateConfig, EvaluationInputs
from .measure import MeasureOptions, Record, States, load_reference, measure
from .metric_settings import FID, GenEval, LpipsDiversity, Reference, Section, absolute, choose
from .metrics.base import Metric
from .metrics.frechet import Frechet
from .metrics.presets import preset
from .reader import ReaderOptions
from .report import write_report
from .results import RESULTS, STATES
from .select import Selection, choose_images
from .thumbnails import ThumbnailOptions, write_thumbnails
from .units import image_units

REFERENCE = "reference"


def run_evaluate(cfg: EvaluateConfig) -> str:
    """Measure, write ``results.json`` and ``report.html`` into ``cfg.output``, and return the report's path.

    Raises UserError if the inputs are incomplete or do not match the tokenizer or the metrics, or if the output exists
    and ``cfg.mode`` is ``new``.
    """
    cfg = cfg.absolute()
    if cfg.preset is not None:
        preset(cfg.preset)
    inputs = EvaluationInputs(cfg)
    sections = choose(cfg.metrics, frozenset(inputs.offers), scenes=inputs.scenes)
    sections = {name: absolute(section) for name, section in sections.items()}
    if cfg.local and isinstance(sections.get("geneval"), GenEval):
        raise UserError("metrics.geneval: the detector runs in a Ray runtime environment; expected local=false")
    open_output(cfg.output, cfg.mode, _identity(cfg, inputs, sections))
    with recorded(cfg.output, "evaluate", cfg, _inputs(cfg, inputs)):
        pool = Pool(cfg.actors, cfg.gpus_per_actor)
        fid = sections.get("fid")
        reference = _reference(cfg, fid, pool) if isinstance(fid, FID) else None
        captions = any("prompts" in section.needs for section in sections.values())
        reader = ReaderOptions(cfg.tokenizer, inputs.size, cfg.batch_size, captions, cfg.caption_keys)
        gpu = cfg.gpus_per_actor > 0
        task = MeasureOptions(storage.join(cfg.output, STATES), sections, reader, inputs.per_prompt, reference, gpu)
        measured = measure(task, inputs.all_units, pool, local=cfg.local, title="evaluate")
        _require_measured(cfg, measured)
        records: dict[str, list[Record]] = {name: [] for name in inputs.units}
        for record in measured:
            records[record.unit.setting].append(record)
        selections, settings = {}, []
        for name, found in records.items():
            metrics = _merged(task, name, found)
            selections[name] = choose_images(found, metrics, cfg.show, len(records))
            settings.append(_summary(name, inputs.about[name], found, metrics, selections[name], cfg.seed))
        if "images" in inputs.offers:
            shown = ThumbnailOptions(reader, cfg.show.size, gpu)
            write_thumbnails(cfg.output, shown, records, selections, pool, local=cfg.local)
        card = _card(cfg, inputs, measured)
        add_citations(settings, card)
        storage.write_json(storage.join(cfg.output, RESULTS), {"card": card, "settings": settings})
        return write_report(cfg.output)


def _require_measured(cfg: EvaluateConfig, records: Sequence[Record]) -> None:
    """Raise UserError if no sample of any setting could be measured."""
    if not any(record.ids for record in records):
        problems = sum((Counter(record.quarantined) for record in records), Counter[str]())
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(problems.items())) or "no samples"
        raise UserError(f"{cfg.source}: nothing could be measured ({found})")


def _inputs(cfg: EvaluateConfig, inputs: EvaluationInputs) -> tuple[Provenance, ...]:
    if cfg.samples is not None:
        read = samples_provenance("samples", cfg.samples)
    else:
        read = Provenance(role="images", kind="name", path=cfg.source)
    if cfg.tokenizer is None:
        return (read,)
    return (read, model_provenance("tokenizer", cfg.tokenizer, inputs.tokenizer_hash))


def _identity(cfg: EvaluateConfig, inputs: EvaluationInputs, sections: dict[str, Section]) -> dict[str, Any]:
    """Return the settings that must be unchanged for a job to resume into the same output folder."""
    work = [unit.model_dump(mode="json") for unit in inputs.all_units]
    runs = {name: about.get("run_id") for name, about in inputs.about.items()}
    return {
        "samples": cfg.samples,
        "images": cfg.images and cfg.source,
        "size": inputs.size,
        "batch_size": cfg.batch_size,
        "caption_keys": list(cfg.caption_keys),
        "tokenizer_hash": inputs.tokenizer_hash,
        "metrics": {name: section.model_dump(mode="json") for name, section in sections.items()},
        "work": hashlib.sha256(json.dumps([work, runs]).encode()).hexdigest(),
    }


def _reference(cfg: EvaluateConfig, fid: FID, pool: Pool) -> tuple[str, str]:
    """Return path and source name of FID's reference statistics, computing them from images if they are not stored."""
    source = pattern_text(fid.reference)
    if source.endswith(".npz"):
        return source, source
    if fid.images.size is None:
        raise UserError("metrics.fid.images.size: missing; a reference made of images needs it, for example 256")
    url = storage.join(cfg.output, f"{REFERENCE}.npz")
    if not storage.exists(url):
        sections = {"fid": Reference(**fid.model_dump())}
        reader = ReaderOptions(None, fid.images.size, cfg.batch_size, images=fid.images)
        task = MeasureOptions(storage.join(cfg.output, REFERENCE), sections, reader, gpu=cfg.gpus_per_actor > 0)
        units = image_units(fid.reference, cfg.rows_per_unit)
        measure(task, units, pool, local=cfg.local, title="reference")
        gathered = States(task.states).merged("", [unit.name for unit in units], "fid")
        assert isinstance(gathered, Frechet)
        gathered.gaussian().save(url)
    return url, source


def _merged(task: MeasureOptions, setting: str, records: Sequence[Record]) -> dict[str, Metric]:
    states, units = States(task.states), [record.unit.name for record in records]
    found: dict[str, Metric] = {}
    for name, section in task.sections.items():
        into = section.load(task.tools())() if isinstance(section, LpipsDiversity) else None
        metric = found[name] = states.merged(setting, units, name, into)
        if isinstance(metric, Frechet) and (reference := load_reference(task.reference)) and name == "fid":
            metric.attach(reference)
    return found


def _summary(
    name: str,
    about: dict[str, Any],
    records: Sequence[Record],
    metrics: dict[str, Metric],
    selection: Selection,
    seed: int,
) -> dict[str, Any]:
    quarantined = sum((Counter(record.quarantined) for record in records), Counter[str]())
    return {
        "name": name,
        "about": about,
        "measured": sum(len(record.ids) for record in records),
        "quarantined": dict(sorted(quarantined.items())),
        "units": [record.unit.name for record in records],
        "metrics": {key: metric.result(seed=seed).to_json() for key, metric in metrics.items()},
        "shown": selection.model_dump(mode="json"),
    }


def _card(cfg: EvaluateConfig, inputs: EvaluationInputs, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "measured_inputs": "samples" if cfg.samples else "reconstructions" if cfg.tokenizer else "images",
        "source": cfg.source,
        "tokenizer": cfg.tokenizer,
        "tokenizer_hash": inputs.tokenizer_hash,
        "size": inputs.size if "images" in inputs.offers else None,
        "preset": cfg.preset,
        "bootstrap_seed": cfg.seed,
        "batch_size": cfg.batch_size,
        "versions": library_versions(),
        "hardware": hardware_summary(),
        "devices": sorted({record.device for record in records}),
        "actor_seconds": sum(record.seconds for record in records),
    }
