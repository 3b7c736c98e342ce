"""Evaluation job: measures generated samples or tokenizer reconstructions and writes ``report.html``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import storage
from ..accelerator import hardware_summary
from ..bulk.sample_set import samples_provenance
from ..data.formats.parts import SETTINGS, open_output
from ..data.model_provenance import model_provenance
from ..data.stages import Pool
from ..errors import UserError
from ..packages import installed_versions
from ..runs import Provenance, recorded
from .citation import LIBRARIES, add_citations
from .inputs import EvaluateConfig, EvaluationInputs
from .measure import MeasureOptions, Record, States, measure
from .metric_settings import GenEval, LpipsDiversity, absolute, choose
from .metrics.base import Metric
from .metrics.presets import preset
from .reader import ReaderOptions
from .references import Gathering, References
from .report import write_report
from .results import RESULTS, STATES
from .sections import Section
from .select import Selection, choose_images
from .thumbnails import THUMBNAILS, ThumbnailOptions, write_thumbnails
from .units import ImageSet, counts_text, find_image_set, warn_left_out

IMAGES, REFERENCES = "images_identity", "references_identity"
"""Settings that identify the content of files (:class:`.units.ImageSet`)."""
log = logging.getLogger(__name__)


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
    references = References(sections, cfg.output)
    compared = [_reference_images(cfg, gathering) for gathering in references.gatherings]
    _open_output(cfg, _identity(cfg, inputs, sections, _identities(references, compared)))
    with recorded(cfg.output, "evaluate", cfg, _inputs(cfg, inputs)):
        pool = Pool(cfg.actors, cfg.gpus_per_actor)
        gathered = {
            gathering.name: _gather(cfg, gathering, images, pool)
            for gathering, images in zip(references.gatherings, compared, strict=True)
        }
        captions = any("prompts" in section.needs for section in sections.values())
        reader = ReaderOptions(cfg.tokenizer, inputs.size, cfg.batch_size, captions, cfg.caption_keys)
        gpu = cfg.gpus_per_actor > 0
        about = references.describe()
        task = MeasureOptions(storage.join(cfg.output, STATES), sections, reader, inputs.per_prompt, about, gpu)
        measured = measure(task, inputs.all_units, pool, local=cfg.local, title="evaluate")
        _require_measured(cfg.source, measured)
        records: dict[str, list[Record]] = {name: [] for name in inputs.units}
        for record in measured:
            records[record.unit.setting].append(record)
        selections, settings = {}, []
        for name, found in records.items():
            metrics = _merged(task, references, name, found)
            selections[name] = choose_images(found, metrics, cfg.show, len(records))
            summary = _summary(name, inputs.about[name], found, metrics, selections[name], cfg.seed)
            settings.append({**summary, "left_out": inputs.left_out})
        if "images" in inputs.offers:
            shown = ThumbnailOptions(reader, cfg.show.size, gpu)
            wanted = {name: selection.ids for name, selection in selections.items()}
            write_thumbnails(storage.join(cfg.output, THUMBNAILS), shown, records, wanted, pool, local=cfg.local)
        card = {**_card(cfg, inputs, measured), "references": [about for about, _ in gathered.values()]}
        if trained_on := references.training():
            card["training_images"] = _show_training(cfg, trained_on, gathered, selections.values(), pool)
        add_citations(settings, card)
        storage.write_json(storage.join(cfg.output, RESULTS), {"card": card, "settings": settings})
        return write_report(cfg.output)


def _require_measured(source: str, records: Sequence[Record]) -> None:
    """Raise UserError if no sample of any setting could be measured; log how many could not."""
    problems = _quarantined(records)
    if not any(record.ids for record in records):
        raise UserError(f"{source}: nothing could be measured ({counts_text(problems) or 'no samples'})")
    if problems:
        log.warning("%s: not measured: %s", source, counts_text(problems))


def _quarantined(records: Sequence[Record]) -> dict[str, int]:
    """Return the number of images that could not be measured, by reason."""
    return dict(sorted(sum((Counter(record.quarantined) for record in records), Counter[str]()).items()))


def _inputs(cfg: EvaluateConfig, inputs: EvaluationInputs) -> tuple[Provenance, ...]:
    if cfg.samples is not None:
        read = samples_provenance("samples", cfg.samples)
    else:
        read = Provenance(role="images", kind="name", path=cfg.source)
    if cfg.tokenizer is None:
        return (read,)
    return (read, model_provenance("tokenizer", cfg.tokenizer, inputs.tokenizer_hash))


def _open_output(cfg: EvaluateConfig, settings: dict[str, Any]) -> None:
    """Prepare the output folder; UserError as :func:`..data.formats.parts.open_output`, and if images have changed."""
    path = storage.join(cfg.output, SETTINGS)
    if cfg.mode == "resume" and storage.exists(path):
        before = storage.read_json(path)
        changed = {key for key, value in settings.items() if before.get(key) != value}
        if before.get(REFERENCES) is not None and changed <= {IMAGES, REFERENCES, "work"}:
            sources = [cfg.source] if IMAGES in changed else []
            sources += [
                url for url, identity in settings[REFERENCES].items() if before[REFERENCES].get(url) != identity
            ]
            if sources:
                reason = f"{sources[0]} has changed since it was measured (names, sizes or times of files)"
                raise UserError(f"output {cfg.output}: {reason}; use mode=fresh or another folder")
    open_output(cfg.output, cfg.mode, settings)


def _identity(
    cfg: EvaluateConfig, inputs: EvaluationInputs, sections: dict[str, Section], references: dict[str, str]
) -> dict[str, Any]:
    """Return the settings that must be unchanged for a job to resume into the same output folder."""
    work = [unit.model_dump(mode="json") for unit in inputs.all_units]
    runs = {name: about.get("run_id") for name, about in inputs.about.items()}
    return {
        "samples": cfg.samples,
        "images": cfg.images and cfg.source,
        IMAGES: inputs.identity,
        REFERENCES: references,
        "size": inputs.size,
        "batch_size": cfg.batch_size,
        "caption_keys": list(cfg.caption_keys),
        "tokenizer_hash": inputs.tokenizer_hash,
        "metrics": {name: section.model_dump(mode="json") for name, section in sections.items()},
        "work": hashlib.sha256(json.dumps([work, runs]).encode()).hexdigest(),
    }


def _reference_images(cfg: EvaluateConfig, gathering: Gathering) -> ImageSet:
    """Find the images of a reference; raises UserError if there are none."""
    found = find_image_set(gathering.pattern, cfg.rows_per_unit, output=cfg.output)
    warn_left_out(gathering.source, found.left_out)
    return found


def _identities(references: References, images: Sequence[ImageSet]) -> dict[str, str]:
    """Return what identifies the content of all references, by source."""
    found = {gathering.source: each.identity for gathering, each in zip(references.gatherings, images, strict=True)}
    return {**references.statistics, **found}


def _gather(
    cfg: EvaluateConfig, gathering: Gathering, images: ImageSet, pool: Pool
) -> tuple[dict[str, Any], list[Record]]:
    """Compute the features or statistics of reference images, unless they are stored; returns what was measured."""
    reader = ReaderOptions(None, gathering.size, cfg.batch_size)
    folder, gpu = storage.join(cfg.output, gathering.name), cfg.gpus_per_actor > 0
    task = MeasureOptions(folder, gathering.sections, reader, gpu=gpu)
    records = measure(task, images.units, pool, local=cfg.local, title="reference")
    _require_measured(gathering.source, records)
    count = sum(len(record.ids) for record in records)
    if count < 2:
        raise UserError(f"{gathering.source}: a single image could be measured, expected at least two of a reference")
    if not gathering.stored(cfg.output):
        gathering.save(cfg.output, [unit.name for unit in images.units])
    about = {"source": gathering.source, "identity": images.identity, "measured": count}
    return {**about, "quarantined": _quarantined(records), "left_out": images.left_out}, records


def _show_training(
    cfg: EvaluateConfig,
    gatherings: Mapping[str, Gathering],
    gathered: Mapping[str, tuple[dict[str, Any], list[Record]]],
    selections: Iterable[Selection],
    pool: Pool,
) -> dict[str, str]:
    """Write thumbnails of the training images that ``selections`` show; returns the name of the file by metric."""
    wanted: dict[str, set[str]] = {gathering.name: set() for gathering in gatherings.values()}
    for selection in selections:
        for name, column in selection.nearest.items():
            wanted[gatherings[name].name].update(shown.training for shown in column)
    for gathering in {each.name: each for each in gatherings.values()}.values():
        shown = ThumbnailOptions(
            ReaderOptions(None, gathering.size, cfg.batch_size), cfg.show.size, cfg.gpus_per_actor > 0
        )
        url, records = storage.join(cfg.output, f"{gathering.name}-{THUMBNAILS}"), gathered[gathering.name][1]
        write_thumbnails(url, shown, {"": records}, {"": wanted[gathering.name]}, pool, local=cfg.local)
    return {name: f"{gathering.name}-{THUMBNAILS}" for name, gathering in gatherings.items()}


def _merged(task: MeasureOptions, references: References, setting: str, records: Sequence[Record]) -> dict[str, Metric]:
    states, units = States(task.states), [record.unit.name for record in records]
    found: dict[str, Metric] = {}
    for name, section in task.sections.items():
        into = section.load(task.tools())() if isinstance(section, LpipsDiversity) else None
        metric = found[name] = states.merged(setting, units, name, into)
        references.attach(name, metric)
    return found


def _summary(
    name: str,
    about: dict[str, Any],
    records: Sequence[Record],
    metrics: dict[str, Metric],
    selection: Selection,
    seed: int,
) -> dict[str, Any]:
    results = {key: metric.result(seed=seed).to_json() for key, metric in metrics.items()}
    for result in results.values():
        for caution in result["cautions"]:
            log.warning("%s%s: %s", f"{name}: " if name else "", result["name"], caution)
    return {
        "name": name,
        "about": about,
        "measured": sum(len(record.ids) for record in records),
        "quarantined": _quarantined(records),
        "units": [record.unit.name for record in records],
        "metrics": results,
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
        "versions": installed_versions(LIBRARIES),
        "hardware": hardware_summary(),
        "devices": sorted({record.device for record in records}),
        "actor_seconds": sum(record.seconds for record in records),
    }
