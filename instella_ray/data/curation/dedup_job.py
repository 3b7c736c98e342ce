"""Second pass of curation: finds duplicates across all finished parts, and removes them from their parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ... import logs, storage
from ..formats.parts import DROPPED, DUPLICATES, Part, PartFolder, Row
from ..formats.shards import remove_shard, write_samples
from ..formats.tar_source import read_samples
from ..pipeline import run_rows
from ..stages import Stage
from .dedup import EXACT, FIELDS, NEAR, Fingerprints, find_duplicates
from .filters.base import ScoreLimits
from .filters.duplicates import DuplicateConfig
from .stats import EXAMPLES, FINGERPRINTS, write_borderline, write_thumbnails

DECISIONS = pa.schema(
    [
        ("part", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("of_part", pa.string()),
        ("of_key", pa.string()),
    ]
)
"""Decision to drop an image, with the reason and the image that is kept instead."""
READERS = 16


def deduplicate(
    folder: PartFolder,
    shards: Collection[str],
    shown: Collection[str],
    limits: Mapping[str, ScoreLimits],
    cfg: DuplicateConfig,
    *,
    local: bool,
    cpu_pool: str | None = None,
) -> None:
    """Remove duplicates from the finished parts of ``shards``; may be killed and run again at any point.

    Thumbnails are kept of the duplicates in the shards ``shown``; images with extreme scores at the ``limits`` are chosen
    among those that stay. ``local`` and ``cpu_pool`` are those of :class:`..job.DataJobConfig`.
    """
    parts = folder.all_done(shards)
    url = storage.join(folder.url, DUPLICATES)
    if not storage.exists(url):
        storage.write_parquet(url, _decide(folder.url, parts, cfg))
    data = storage.read_bytes(url)
    decided = hashlib.sha256(data).hexdigest()[:8]
    rows = pq.read_table(pa.BufferReader(data), columns=["part", "key", "reason"]).to_pylist()
    drops = {name: {row["key"]: row["reason"] for row in found} for name, found in groupby(rows, lambda r: r["part"])}
    todo = [part for part in parts if part.name in drops and part.decided != decided]
    if not todo:
        return
    given = [{"part": part.model_dump_json(), "drops": json.dumps(drops[part.name])} for part in todo]
    remover = Stage(Remover(folder.url, decided, frozenset(shown), limits))
    with logs.progress_bar(total=len(todo), desc="duplicates", unit="part") as bar:
        for _ in run_rows(given, remover, local=local, cpu_pool=cpu_pool):
            bar.update()


class Remover:
    """Rewrites the data file of a part without its duplicates, updates its entry and ledger, and deletes the old file."""

    def __init__(self, folder: str, decided: str, shown: Collection[str], limits: Mapping[str, ScoreLimits]) -> None:
        self.folder, self.decided, self.shown, self.limits = folder, decided, shown, limits

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        part, drops = Part.model_validate_json(row["part"]), json.loads(row["drops"])
        self.remove(part, drops)
        return pa.table({"part": [part.name]})

    def remove(self, part: Part, drops: dict[str, str]) -> None:
        """Remove the samples ``drops`` (key -> reason) from ``part``."""
        if PartFolder(self.folder).part(part.name).decided == self.decided or part.file is None:
            return  # already done by a worker that was lost afterwards
        old = storage.join(self.folder, part.file)
        gone, stay = list[Row](), list[Row]()
        name = f"{part.name}.{self.decided}"
        file = f"{name}.tar"
        kept = write_samples(storage.join(self.folder, file), self._staying(old, drops, gone, stay))
        if not kept:
            remove_shard(storage.join(self.folder, file))
        if part.shard in self.shown:
            write_thumbnails(self.folder, name, part.name, gone, EXAMPLES)
        write_borderline(self.folder, name, part.name, self.limits, stay)
        ledger = dict(part.ledger, kept=kept, dropped=dict(part.ledger["dropped"]))
        for sample in gone:
            reason = sample["verdict"].partition(":")[2]
            ledger["dropped"][reason] = ledger["dropped"].get(reason, 0) + 1
        changed = {"file": file if kept else None, "records": kept, "ledger": ledger, "decided": self.decided}
        PartFolder(self.folder).replace(part.model_copy(update=changed))
        remove_shard(old)

    def _staying(self, url: str, drops: dict[str, str], gone: list[Row], stay: list[Row]) -> Iterator[Row]:
        """Yield the samples that stay, and collect them without their images; collect the others in ``gone``."""
        with storage.open_file(url) as stream:
            for row in read_samples(stream, url):
                row["scores"] = json.dumps(json.loads(row["meta"]).get("scores", {}))
                if row["key"] not in drops:
                    stay.append({**row, "image": None})
                    yield row
                    continue
                row["verdict"] = f"{DROPPED}:{drops[row['key']]}"
                row["image"] = row["image"] if len(gone) < EXAMPLES else None
                gone.append(row)


def _decide(folder: str, parts: list[Part], cfg: DuplicateConfig) -> pa.Table:
    """Find the duplicates in all parts, and return their :data:`DECISIONS`, sorted by part."""
    filled = [part.name for part in parts if part.notes[FINGERPRINTS]]
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda name: _prints(folder, name), filled)
        tables = list(logs.progress_bar(read, desc="fingerprints", total=len(filled), unit="part"))
    ends = np.cumsum([table.num_rows for table in tables])
    if not len(ends):
        return DECISIONS.empty_table()
    table = pa.concat_tables(tables).combine_chunks()
    colors = np.frombuffer(b"".join(table["colors"].to_pylist()), np.uint8)
    prints = Fingerprints(
        exact=np.frombuffer(b"".join(table["exact"].to_pylist()), "S16"),
        near=table["near"].to_numpy(),
        colors=colors.reshape(table.num_rows, -1),
        pixels=table["pixels"].to_numpy(),
    )
    found = find_duplicates(prints, cfg.max_distance, cfg.max_color_difference)

    def names(index: np.ndarray) -> tuple[list[str], list[str]]:
        """Return (parts, keys) of images."""
        where = np.searchsorted(ends, index, side="right").tolist()
        keys = [_key(tables[number], row, ends[number]) for number, row in zip(where, index.tolist(), strict=True)]
        return [filled[number] for number in where], keys

    (part, key), (of_part, of_key) = names(found.image), names(found.of)
    reason = np.where(found.exact, EXACT, NEAR).tolist()
    columns = {"part": part, "key": key, "reason": reason, "of_part": of_part, "of_key": of_key}
    return pa.Table.from_pydict(columns, DECISIONS)


def _prints(folder: str, name: str) -> pa.Table:
    url = storage.join(folder, FINGERPRINTS, f"{name}.parquet")
    return storage.read_parquet(url, columns=["key", *(field for field, _ in FIELDS)])


def _key(table: pa.Table, row: int, end: int) -> str:
    key: str = table["key"][row - (int(end) - table.num_rows)].as_py()
    return key
