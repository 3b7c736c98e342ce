"""Curation job: downloads, filters and deduplicates captioned shards, and writes shards, a ledger and a report."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from ... import storage
from ..formats.parts import DUPLICATES, Ledger, PartWriter, Row
from ..formats.shards import write_samples
from ..formats.sources import find_inputs, require_captions, shard_sources
from ..formats.texts import CAPTION_NAMES, CaptionKeys
from ..job import EXECUTION_KEYS, DataJobConfig, data_job
from ..provenance import shard_provenance
from ..stages import Stage
from .dedup import Fingerprinter
from .dedup_job import deduplicate
from .download import DownloadConfig, download_stage
from .filters.config import FilterConfig
from .prefilter import Prefilter
from .report import write_report
from .scoring import score_stages
from .stats import CurationNotes, shown_shards


class CurateConfig(DataJobConfig):
    """Configuration of the curation job: input shards, downloads, filters and output."""

    input: str
    """Tars, folders of images, or tables of images, paths or links; paths, globs, lists of shards, comma-separated.

    A folder of images has captions beside them, as ``NAME.txt``, ``NAME.caption`` or ``NAME.json``, or in its
    ``metadata.csv`` or ``metadata.jsonl``. Tables are parquet with images or LAION's links, and CSV, TSV or JSONL with paths
    relative to their folder, or links. Local or any fsspec URL. ``instella-ray shards`` writes lists of shards.
    """
    output: str
    """Output folder of the curated tars, their list, ``quarantine/``, ``ledger.json`` and ``curation.html``."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in any case, in order of preference."""
    download: DownloadConfig = DownloadConfig()
    filters: FilterConfig = FilterConfig()
    keep_truncated: bool = False
    """Keep JPEGs that were cut off and then given an end marker, of which the missing part is decoded as grey."""
    rows_per_shard: int = Field(1000, ge=1)
    """Input samples per output tar; fewer if their images are large."""


def run_curate(cfg: CurateConfig) -> Ledger:
    """Curate ``cfg.input`` into ``cfg.output``; returns the ledger, which is also written there.

    Raises UserError if a filter lacks its package or weights, if the input is missing or has no captions, if too many
    samples are damaged or none is kept, or if the output exists and ``cfg.mode`` does not allow it.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output)})
    for section in cfg.filters.sections().values():
        section.check()
    inputs = find_inputs(cfg.input, caption_keys=cfg.caption_keys)
    require_captions(list(inputs.shards), cfg.caption_keys)
    labels = tuple(inputs.shards.values())
    shown = shown_shards(labels)
    settings = _settings(cfg, bool(inputs.links))
    with data_job(cfg, "curate", "shards", settings, shard_provenance("shards", cfg.input)) as job:
        if not job.done.issuperset(labels):
            storage.remove_tree(storage.join(cfg.output, DUPLICATES))  # decided for fewer shards
            notes = CurationNotes(cfg.output, cfg.filters, shown)
            prefilter = Prefilter(cfg.filters, shown, notes.examples, keep_truncated=cfg.keep_truncated)
            stages = [Stage(prefilter), *score_stages(cfg.filters)]
            if cfg.filters.duplicates:
                stages.append(Stage(Fingerprinter()))
            rows_per_block = cfg.rows_per_shard
            if inputs.links:
                stages.insert(0, download_stage(cfg.download))
                rows_per_block = min(rows_per_block, cfg.download.batch_size)
            sources = shard_sources(
                inputs.shards,
                rows_per_block,
                caption_keys=cfg.caption_keys,
                time_limit_s=cfg.shard_time_limit_s,
            )
            job.write(sources, stages, PartWriter(cfg.output, ".tar", _write, notes))
        if cfg.filters.duplicates:
            limits, duplicates = cfg.filters.limits(), cfg.filters.duplicates
            deduplicate(job.folder, labels, shown, limits, duplicates, local=cfg.local, cpu_pool=cfg.cpu_pool)
        ledger = job.close(labels)
        write_report(cfg.output, cfg.filters, cfg.abort, job.folder.parts(), ledger)
        job.require_kept(f"input {cfg.input}: no sample was kept")
        return ledger


def _settings(cfg: CurateConfig, downloads: bool) -> dict[str, object]:
    """Return the settings that the output depends on, without those of execution."""
    spread = {name: {"actors", "gpus_per_actor", "batch_size"} for name in cfg.filters.of_images()}
    links = (
        set(DownloadConfig.model_fields) - {"max_bytes", "respect_opt_out"} - ({"batch_size"} if downloads else set())
    )
    volatile: dict[str, Any] = {**dict.fromkeys(EXECUTION_KEYS, True), "download": links, "filters": spread}
    return cfg.model_dump(mode="json", exclude=volatile)


def _write(url: str, rows: list[Row]) -> int:
    for row in rows:
        row["meta"] = json.dumps({**json.loads(row["meta"]), "scores": json.loads(row["scores"])})
    return write_samples(url, rows)
