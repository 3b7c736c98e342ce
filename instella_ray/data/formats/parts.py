"""Output folders of data jobs: complete or absent part by part, resumable, never overwritten unasked.

A part is what became of consecutive rows of one input shard: at most one data file, at most one file of quarantined
rows, and last of all ``parts/NAME.json``, which says that both are whole. A shard is done when its parts reach from row
0 to the row marked ``last``; the job is done when all are, and only then is there a ``ledger.json``. So whatever was
killed at whatever point, running again makes the same set of files.

The ledger is the account of it all: every sample that went in is kept, dropped for a reason, or quarantined for one.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from ... import storage
from ...config import Config
from ...errors import UserError
from ...runs import RECORD

Row = dict[str, Any]
Mode = Literal["new", "resume", "fresh"]
"""What to do about an output that exists: refuse, go on with it, or start over."""

LEDGER, SETTINGS, PARTS, QUARANTINE = "ledger.json", "settings.json", "parts", "quarantine"
INDEX = "index"
"""Folder of the indexes of a folder's tars (:mod:`.tar_index`)."""
DUPLICATES = "duplicates.parquet"
"""What is decided over a finished set, and then carried out part by part."""
KEPT, DROPPED, QUARANTINED = "kept", "dropped", "quarantined"
DOWNLOAD = "download:"
"""Begins the problem of a sample whose image could not be fetched. Links die: that is a drop, not damage."""
DOWNLOAD_REASON = "download_"
"""Begins the reason that such a sample is dropped for."""


def verdict_of(problem: str) -> str:
    """The verdict on a sample whose source reports ``problem``."""
    if problem.startswith(DOWNLOAD):
        return f"{DROPPED}:{DOWNLOAD_REASON}{problem.removeprefix(DOWNLOAD)}"
    return f"{QUARANTINED}:{problem}"


@dataclass
class Ledger:
    """``in = kept + dropped(reason) + quarantined(reason)``, by construction."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """The sum of several :meth:`to_json`."""
        ledger = cls()
        for entry in entries:
            ledger.add(entry)
        return ledger

    def count(self, verdicts: Iterable[str]) -> Ledger:
        """Add verdicts: ``kept``, ``dropped:REASON`` or ``quarantined:REASON``."""
        for verdict, number in Counter(verdicts).items():
            kind, _, reason = verdict.partition(":")
            if kind == KEPT:
                self.kept += number
            else:
                (self.dropped if kind == DROPPED else self.quarantined)[reason] += number
        return self

    def add(self, other: Mapping[str, Any]) -> Ledger:
        """Add another ledger's :meth:`to_json`."""
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        self.quarantined.update(other["quarantined"])
        return self

    @property
    def total(self) -> int:
        return self.kept + self.dropped.total() + self.quarantined.total()

    @property
    def failed_downloads(self) -> int:
        """Samples dropped because their image could not be fetched."""
        return sum(number for reason, number in self.dropped.items() if reason.startswith(DOWNLOAD_REASON))

    def to_json(self) -> dict[str, Any]:
        parts = {"dropped": dict(sorted(self.dropped.items())), "quarantined": dict(sorted(self.quarantined.items()))}
        return {"in": self.total, "kept": self.kept, **parts}

    def summary(self) -> str:
        """One line for people."""
        reasons = [f"{n} {r}" for r, n in (self.dropped + self.quarantined).most_common()]
        return f"{self.kept} of {self.total} kept" + (f" ({', '.join(reasons)})" if reasons else "")


class Part(Config):
    """One entry of ``parts/``."""

    shard: str
    first_row: int
    rows: int
    last: bool
    """The shard ends with this part."""
    file: str | None
    """Name of the data file; none when no row was kept."""
    records: int
    """Records in that file (an image may give several)."""
    ledger: dict[str, Any]
    notes: dict[str, Any] = Field(default_factory=dict)
    """What the job has to say of these rows, for its report."""
    decided: str | None = None
    """Which decisions over the whole set (their hash) have been carried out on this part."""

    @property
    def name(self) -> str:
        return f"{self.shard}-{self.first_row:07d}"


def open_output(url: str, mode: Mode, settings: Mapping[str, Any]) -> bool:
    """Get a job's output folder ready; true where there is something to go on with.

    UserError when it holds something and ``mode`` is ``new``, when it was not made by such a job, or when a job with
    other settings is to be resumed.
    """
    path = storage.join(url, SETTINGS)
    if not storage.is_empty(url):
        if mode == "new":
            hint = "set mode=resume to go on with it, mode=fresh to start over, or choose another folder"
            raise UserError(f"output {url}: exists already; {hint}")
        if not storage.exists(path):
            raise UserError(f"output {url}: not made by this job (no {SETTINGS}); choose another folder")
        if mode == "resume":
            before = storage.read_json(path)
            for key in sorted({*before, *settings}):
                if (was := before.get(key)) != (now := settings.get(key)):
                    raise UserError(f"output {url}: made with {key}={was}, now {now}; use mode=fresh or another folder")
            return True
        storage.remove_tree(url)
    storage.write_json(path, settings)
    return False


class PartFolder:
    """The output folder of one job."""

    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, mode: Mode, settings: Mapping[str, Any]) -> set[str]:
        """Get the folder ready (:func:`open_output`) and return the labels of the shards that are done already."""
        return self._sweep(self.parts()) if open_output(self.url, mode, settings) else set()

    def parts(self) -> list[Part]:
        """All finished parts, by shard and row."""
        files = storage.read_many(storage.glob(self._path(PARTS, "*.json")))
        return sorted(map(Part.model_validate_json, files), key=lambda part: (part.shard, part.first_row))

    def part(self, name: str) -> Part:
        """The entry of that name."""
        return Part(**storage.read_json(self._path(PARTS, f"{name}.json")))

    def replace(self, part: Part) -> None:
        """Put ``part`` in place of the entry of that name."""
        storage.write_json(self._path(PARTS, f"{part.name}.json"), part.model_dump(mode="json"))

    def all_done(self, shards: Iterable[str]) -> list[Part]:
        """All parts, once every one of ``shards`` is accounted for from end to end."""
        parts = self.parts()
        missing = set(shards) - _done(parts)
        if missing:
            raise RuntimeError(f"{self.url}: shards not finished: {', '.join(sorted(missing)[:5])}")
        return parts

    def close(self, shards: Iterable[str]) -> Ledger:
        """Check that every one of ``shards`` is accounted for from end to end, and write the ledger."""
        parts = self.all_done(shards)
        ledger = Ledger.of(part.ledger for part in parts)
        if ledger.total != sum(part.rows for part in parts):
            raise RuntimeError(f"{self.url}: the ledger has {ledger.total} rows, the parts have other numbers")
        self._sweep(parts)  # halves of files that killed workers left
        storage.write_json(self._path(LEDGER), ledger.to_json())
        return ledger

    def _sweep(self, parts: Sequence[Part]) -> set[str]:
        """Delete what belongs to no finished shard of ``parts``, halves of files too; returns the labels of those."""
        done = _done(parts)
        whole = [part for part in parts if part.shard in done]
        keep = {part.name for part in whole} | {f"{part.name}.{part.decided}" for part in whole}
        current = {part.file.rpartition(".")[0] for part in whole if part.file}
        files = {part.file for part in whole} | {SETTINGS, DUPLICATES, RECORD}
        fs, root = storage.filesystem(self.url)
        for path in fs.find(root):
            below, name = path[len(root) :].strip("/"), path.rsplit("/", 1)[-1]
            stem = name.rpartition(".")[0]
            if not (below in files if below == name else stem in (current if below.startswith(INDEX) else keep)):
                fs.rm(path)
        return done

    def _path(self, *names: str) -> str:
        return storage.join(self.url, *names)


class PartWriter:
    """A job's last stage: writes a table's rows as a part, and passes on one small row about it.

    A table has consecutive rows of one shard, with ``key, shard, row, last, caption, meta, image`` and ``verdict`` (see
    :class:`.ledger.Ledger`). ``write_file(url, kept rows)`` writes the data file and returns the number of records in it.
    ``note(part's name, all rows)`` gives the entry's ``notes``, and may write further files named after the part.
    """

    def __init__(
        self,
        folder: str,
        suffix: str,
        write_file: Callable[[str, list[Row]], int],
        note: Callable[[str, list[Row]], dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.suffix, self.write_file, self.note = folder, suffix, write_file, note

    def __call__(self, table: pa.Table) -> pa.Table:
        part = self._write(table.to_pylist())
        return pa.Table.from_pylist([{"shard": part.shard, "last": part.last, "ledger": json.dumps(part.ledger)}])

    def _write(self, rows: list[Row]) -> Part:
        kept = [row for row in rows if row["verdict"] == KEPT]
        bad = [row for row in rows if row["verdict"].startswith(QUARANTINED)]
        first = rows[0]
        facts = {"shard": first["shard"], "first_row": first["row"], "rows": len(rows), "last": rows[-1]["last"]}
        ledger = Ledger().count(row["verdict"] for row in rows).to_json()
        part = Part(**facts, file=None, records=0, ledger=ledger)
        if kept:
            name = part.name + self.suffix
            records = self.write_file(storage.join(self.folder, name), kept)
            part = part.model_copy(update={"file": name, "records": records})
        if bad:
            storage.write_parquet(storage.join(self.folder, QUARANTINE, f"{part.name}.parquet"), _quarantine_table(bad))
        if self.note:
            part = part.model_copy(update={"notes": self.note(part.name, rows)})
        PartFolder(self.folder).replace(part)
        return part


def finished_file(folder: str, name: str, what: str) -> str:
    """Where the file lies that a job writes last of all; UserError that calls ``folder`` no finished ``what`` without it."""
    path = storage.join(folder, name)
    if not storage.exists(path):
        hint = "; run its job again with mode=resume" if storage.exists(storage.join(folder, SETTINGS)) else ""
        raise UserError(f"{folder}: not a finished {what} (no {name}){hint}")
    return path


def refuse_unfinished(folder: str) -> None:
    """UserError for a job's output folder whose job has not come to its end."""
    if storage.exists(storage.join(folder, SETTINGS)) and not storage.exists(storage.join(folder, LEDGER)):
        raise UserError(f"{folder}: unfinished output of a data job; run that job again with mode=resume")


def _done(parts: Iterable[Part]) -> set[str]:
    shards: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        shards[part.shard].append(part)
    return {shard for shard, found in shards.items() if _reaches_the_end(found)}


def _reaches_the_end(parts: list[Part]) -> bool:
    row = 0
    for part in sorted(parts, key=lambda part: part.first_row):
        if part.first_row != row:
            return False
        row += part.rows
    return parts != [] and max(parts, key=lambda part: part.first_row).last


def _quarantine_table(rows: list[Row]) -> pa.Table:
    columns = ("key", "shard", "row", "caption", "meta", "image")
    kinds = (pa.string(), pa.string(), pa.int64(), pa.string(), pa.string(), pa.large_binary())
    schema = pa.schema([*zip(columns, kinds, strict=True), ("reason", pa.string())])
    reasons = [{"reason": row["verdict"].partition(":")[2]} for row in rows]
    return pa.Table.from_pylist([{**row, **why} for row, why in zip(rows, reasons, strict=True)], schema)
