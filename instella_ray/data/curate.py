"""Curation job: captioned shards in, clean shards and a ledger out, on Ray Data."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from .. import storage
from ..config import Config
from ..errors import UserError
from .decode import UndecodableError, check_pixels, open_picture
from .filters import FilterConfig, build_filters
from .ledger import KEPT, Ledger
from .parts import Mode, PartFolder
from .pipeline import init_ray, write_parts
from .shards import find_shards, write_tar
from .tar_source import SCHEMA, read_shards, require_captions


class CurateConfig(Config):
    """Which shards are read, what may stay, and where it goes."""

    input: str
    """WebDataset tars: a path, a glob, a folder, or several with commas between, local or any fsspec URL."""
    output: str
    """Folder for the curated tars, ``quarantine/`` and ``ledger.json``."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    filters: FilterConfig = FilterConfig()
    rows_per_shard: int = 1000
    """Samples looked at for one output tar."""


class Judge:
    """Gives every row a verdict; the bytes of dropped rows go no further."""

    def __init__(self, cfg: FilterConfig) -> None:
        self.filters = build_filters(cfg)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        verdicts = [self.verdict(row) for row in rows]
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict.startswith("dropped"):
                row["image"] = None
        return pa.Table.from_pylist(rows, SCHEMA).append_column("verdict", pa.array(verdicts, pa.string()))

    def verdict(self, row: dict[str, Any]) -> str:
        """``kept``, ``dropped:REASON`` or ``quarantined:REASON`` for one row of :data:`.tar_source.SCHEMA`."""
        if row["problem"]:
            return f"quarantined:{row['problem']}"
        try:
            image = open_picture(row["image"])
            meta = json.loads(row["meta"])
            for f in self.filters:
                if not f.keeps(image, row["caption"], meta):
                    return f"dropped:{f.name}"
            check_pixels(image)  # last, because it costs the most
        except UndecodableError as error:
            return f"quarantined:{error}"
        return KEPT


def run_curate(cfg: CurateConfig) -> Ledger:
    """Curate ``cfg.input`` into ``cfg.output``; returns the ledger that is also written there.

    UserError when there is no input, no caption in it, nothing left of it, or when the output exists unasked.
    """
    shards = find_shards(cfg.input)
    require_captions(list(shards))
    folder = PartFolder(cfg.output)
    done = folder.open(cfg.mode, cfg.model_dump(mode="json", exclude={"mode", "output"}))
    todo = {url: label for url, label in shards.items() if label not in done}
    if todo:
        init_ray()
        samples = read_shards(todo, rows_per_block=cfg.rows_per_shard)
        judged = samples.map_batches(Judge(cfg.filters), batch_format="pyarrow", batch_size=None)
        write_parts(judged, cfg.output, ".tar", cfg.rows_per_shard, _write, shards=shards, done=done, title="curate")
    ledger = folder.close(shards.values())
    if not ledger.kept:
        raise UserError(
            f"input {cfg.input}: no sample left ({ledger.summary()}); see {storage.join(cfg.output, 'ledger.json')}"
        )
    return ledger


def _write(url: str, rows: list[dict[str, Any]]) -> int:
    return write_tar(url, ((row["key"], row["image"], row["caption"], json.loads(row["meta"])) for row in rows))
