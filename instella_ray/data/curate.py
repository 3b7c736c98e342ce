"""Curation job: captioned shards in, clean shards, a ledger and a report out, on Ray Data."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from .. import storage
from ..config import Config
from ..errors import UserError
from ..runs import recorded
from .curation_notes import CurationNotes, shown_shards
from .curation_report import write_report
from .deduplicate import deduplicate
from .download import DownloadConfig, with_downloads
from .filters.config import FilterConfig
from .fingerprint import Fingerprinter
from .judge import Judge
from .ledger import Ledger
from .origins import output_origin, shard_origins
from .parts import DUPLICATES, Mode, PartFolder, PartWriter, Row
from .pipeline import AbortConfig, init_ray, write_parts
from .pools import CpuPool
from .scoring import with_scores
from .shard_list import close_with_list
from .shards import write_samples
from .sources import find_inputs, open_source, require_captions


class CurateConfig(Config):
    """Which shards are read, what may stay, and where it goes."""

    input: str
    """WebDataset tars, or parquet with pictures or LAION's links: a path, glob, folder, list of shards, commas between.

    Local or any fsspec URL. ``instella-ray shards`` writes lists of shards.
    """
    output: str
    """Folder for the curated tars, their list, ``quarantine/``, ``ledger.json`` and ``curation.html``."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    download: DownloadConfig = DownloadConfig()
    filters: FilterConfig = FilterConfig()
    rows_per_shard: int = Field(1000, ge=1)
    """Samples looked at for one output tar."""
    cpu_pool: CpuPool | None = None
    """Label KEY=VALUE of the nodes that do the work on CPUs, where a cluster has such a pool; none means any node."""
    abort: AbortConfig = AbortConfig()


def run_curate(cfg: CurateConfig) -> Ledger:
    """Curate ``cfg.input`` into ``cfg.output``; returns the ledger that is also written there.

    UserError when a filter lacks its package or weights, when there is no input, no caption in it, too much of it is
    damaged, nothing is left of it, or when the output exists unasked.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output)})
    for section in cfg.filters.sections().values():
        section.check()
    inputs = find_inputs(cfg.input)
    shards = inputs.shards
    require_captions(list(shards))
    folder = PartFolder(cfg.output)
    done = folder.open(cfg.mode, _settings(cfg))
    shown = shown_shards(shards.values())
    with recorded(cfg.output, "curate", cfg, shard_origins("shards", cfg.input)) as outputs:
        if todo := {url: label for url, label in shards.items() if label not in done}:
            init_ray(cpu_pool=cfg.cpu_pool)
            storage.remove_tree(storage.join(cfg.output, DUPLICATES))  # of a smaller set
            notes = CurationNotes(cfg.output, cfg.filters.scales(), shown)
            rows = open_source(todo, rows_per_block=cfg.rows_per_shard)
            if inputs.links:
                rows = with_downloads(rows, cfg.download)
            rows = rows.map_batches(Judge(cfg.filters, shown, notes.examples), batch_format="pyarrow", batch_size=None)
            rows = with_scores(rows, cfg.filters)
            if cfg.filters.duplicates:
                rows = rows.map_batches(Fingerprinter(), batch_format="pyarrow", batch_size=None)
            write_parts(
                rows,
                PartWriter(cfg.output, ".tar", cfg.rows_per_shard, _write, notes),
                shards=shards,
                done=done,
                title="curate",
                abort=cfg.abort,
            )
        if cfg.filters.duplicates:
            init_ray(cpu_pool=cfg.cpu_pool)
            deduplicate(folder, shards.values(), shown, cfg.filters.duplicates)
        ledger = close_with_list(folder, shards.values())
        write_report(cfg.output, cfg.filters, folder.parts(), ledger)
        if not ledger.kept:
            raise UserError(
                f"input {cfg.input}: no sample left ({ledger.summary()}); see {storage.join(cfg.output, 'ledger.json')}"
            )
        outputs.append(output_origin("shards", cfg.output, ledger))
        return ledger


def _settings(cfg: CurateConfig) -> dict[str, object]:
    """What the output depends on: not how many actors made it."""
    spread = {name: {"actors", "gpus_per_actor", "batch_size"} for name in cfg.filters.of_pictures()}
    links = set(DownloadConfig.model_fields) - {"max_bytes", "respect_opt_out"}
    whole = dict.fromkeys(("mode", "output", "abort", "cpu_pool"), True)
    volatile: dict[str, Any] = {**whole, "download": links, "filters": spread}
    return cfg.model_dump(mode="json", exclude=volatile)


def _write(url: str, rows: list[Row]) -> int:
    for row in rows:
        row["meta"] = json.dumps({**json.loads(row["meta"]), "scores": json.loads(row["scores"])})
    return write_samples(url, rows)
