"""Curation job: downloads, filters and deduplicates captioned shards, and writes shards, a ledger and a report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ... import storage
from ...config import OutputPath
from ...errors import UserError
from ..formats.parts import DUPLICATES, Ledger, PartWriter, Row
from ..formats.patterns import Pattern, pattern_text
from ..formats.shards import write_samples
from ..formats.sources import find_inputs, require_captions, shard_sources
from ..formats.texts import CAPTION_NAMES, CaptionKeys
from ..job import INPUT_KEYS, DataJob, DataJobConfig, data_job
from ..provenance import shard_provenance
from ..stages import Source, Stage
from .dedup import Fingerprinter
from .dedup_job import deduplicate
from .download import DownloadConfig, download_stage
from .filters.config import FilterConfig
from .prefilter import Prefilter
from .report import write_report
from .retry import retry_sources
from .scoring import score_stages
from .stats import CurationNotes, shown_shards


class CurateConfig(DataJobConfig):
    """Configuration of the curation job: input shards, downloads, filters and output."""

    input: Pattern
    """Tars, folders of images, or tables of images, paths or links; paths, globs or lists of shards, one or several.

    A folder of images has captions beside them, as ``NAME.txt``, ``NAME.caption`` or ``NAME.json``, or in its
    ``metadata.csv`` or ``metadata.jsonl``. Tables are parquet with images or LAION's links, and CSV, TSV or JSONL with paths
    relative to their folder, or links. Local or any fsspec URL; several are a list, or separated by commas.
    ``instella-ray shards`` writes lists of shards.
    """
    output: OutputPath
    """Output folder of the curated tars, their list, ``quarantine/``, ``ledger.json`` and ``curation.html``."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in any case, in order of preference."""
    download: DownloadConfig = DownloadConfig()
    filters: FilterConfig = FilterConfig()
    keep_truncated: bool = False
    """Keep JPEGs that were cut off and then given an end marker, of which the missing part is decoded as grey."""
    rows_per_shard: int = Field(1000, ge=1)
    """Input samples per output tar; fewer if their images are large."""
    retry: Literal["network"] | None = None
    """With ``mode=resume``: try those downloads again that failed for reasons of the network, such as timeouts or 503."""


def run_curate(cfg: CurateConfig) -> Ledger:
    """Curate ``cfg.input`` into ``cfg.output``; returns the ledger, which is also written there.

    Raises UserError if a filter lacks its package or weights, if the input is missing or has no captions, if too many
    samples are damaged or none is kept, or if the output exists and ``cfg.mode`` does not allow it.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output)})
    for section in cfg.filters.sections().values():
        section.check()
    if cfg.retry and cfg.mode != "resume":
        raise UserError(f"retry={cfg.retry}: needs mode=resume, because it continues an earlier run")
    inputs = find_inputs(cfg.input, output=cfg.output, caption_keys=cfg.caption_keys)
    require_captions(list(inputs.shards), cfg.caption_keys)
    labels = tuple(inputs.shards.values())
    shown = shown_shards(labels)
    settings, shards = _settings(cfg, bool(inputs.links)), inputs.shards
    provenance = shard_provenance("shards", cfg.input, output=cfg.output)
    with data_job(cfg, "curate", "shards", settings, provenance, shards) as job:
        rows_per_block = min(cfg.rows_per_shard, cfg.download.batch_size) if inputs.links else cfg.rows_per_shard
        write = partial(_curate, job, cfg, shown, downloads=bool(inputs.links))
        write(shard_sources(shards, rows_per_block, caption_keys=cfg.caption_keys, time_limit_s=cfg.shard_time_limit_s))
        if cfg.retry:
            write(retry_sources(job.folder, rows_per_block), title="retry")
        if cfg.filters.duplicates:
            limits, duplicates = cfg.filters.limits(), cfg.filters.duplicates
            deduplicate(job.folder, labels, shown, limits, duplicates, local=cfg.local, cpu_pool=cfg.cpu_pool)
        ledger = job.close(labels)
        write_report(cfg.output, cfg.filters, cfg.abort, job.folder.parts(), ledger)
        job.require_kept(f"input {pattern_text(cfg.input)}: no sample was kept")
        return ledger


def _curate(
    job: DataJob,
    cfg: CurateConfig,
    shown: Collection[str],
    sources: Mapping[str, Source],
    *,
    downloads: bool,
    title: str | None = None,
) -> None:
    """Curate the unfinished shards of ``sources``, up to the search for duplicates."""
    if job.done.issuperset(sources):
        return
    storage.remove_tree(storage.join(cfg.output, DUPLICATES))  # decided for fewer shards
    notes = CurationNotes(cfg.output, cfg.filters, shown)
    prefilter = Prefilter(cfg.filters, shown, notes.examples, keep_truncated=cfg.keep_truncated)
    stages = [Stage(prefilter), *score_stages(cfg.filters)]
    if cfg.filters.duplicates:
        stages.append(Stage(Fingerprinter()))
    if downloads:
        stages.insert(0, download_stage(cfg.download))
    job.write(sources, stages, PartWriter(cfg.output, ".tar", _write, notes), title=title)


def _settings(cfg: CurateConfig, downloads: bool) -> dict[str, object]:
    """Return the settings that the output depends on, without those of execution."""
    spread = {name: {"actors", "gpus_per_actor", "batch_size"} for name in cfg.filters.of_images()}
    asked = {"max_bytes", "respect_opt_out", "respect_robots"}
    links = set(DownloadConfig.model_fields) - asked - ({"batch_size"} if downloads else set())
    volatile: dict[str, Any] = {**dict.fromkeys(INPUT_KEYS, True), "retry": True, "download": links, "filters": spread}
    return cfg.model_dump(mode="json", exclude=volatile)


def _write(url: str, rows: list[Row]) -> int:
    for row in rows:
        row["meta"] = json.dumps({**json.loads(row["meta"]), "scores": json.loads(row["scores"])})
    return write_samples(url, rows)
