"""Output folders of data jobs: parts written atomically, resumable, never overwritten unless requested, with a ledger.

A part is the output for consecutive rows of one input shard: at most one data file, at most one file of quarantined
rows, and ``parts/NAME.json``, written last, which marks both as complete. A shard is done when its parts cover it from
row 0 to the row marked ``last``; the job is done when all shards are, and only then writes ``ledger.json``. So a job
that is killed at any point and run again writes the same files.

The ledger counts every input sample as kept, dropped for a reason, or quarantined for a reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, TypeAdapter

from ... import storage
from ...config import Config
from ...errors import UserError
from ...runs import RECORD
from .rows import SCHEMA

Row = dict[str, Any]
Mode = Literal["new", "resume", "fresh"]
"""Handling of an existing output: fail, continue it, or delete it and start over."""

LOST = "lost_shard"
"""Problem of a shard that was gone when its turn came; a resumed job reads it again."""
LEDGER, SETTINGS, PARTS, QUARANTINE = "ledger.json", "settings.json", "parts", "quarantine"
INDEX = "index"
"""Subfolder of the indexes of the tars (:mod:`.tar_index`)."""
DUPLICATES = "duplicates.parquet"
"""File of the duplicates found in a finished dataset, which are then removed part by part."""
INPUTS = "inputs.json"
"""File with the URL and label of each input shard."""
UNREACHED = "unreached"
"""Subfolder of the rows whose download failed for a reason of the network, to try them again."""
KEPT, DROPPED, QUARANTINED = "kept", "dropped", "quarantined"
DOWNLOAD = "download:"
"""Prefix of the problem of a sample whose download failed. Dead links are normal, so it is dropped, not quarantined."""
DOWNLOAD_REASON = "download_"
"""Prefix of the ledger reasons of such samples."""
APPLE_DOUBLE = "apple_double"
"""Problem of a file that macOS adds to a tar; it is dropped, because a tar has one for every image."""

UNREACHED_ROWS = pa.schema([("key", pa.string()), ("caption", pa.string()), ("meta", pa.string())])
"""Columns of :data:`UNREACHED`."""
_NETWORK = re.compile(DOWNLOAD_REASON + r"(timeout|connection|dns|cut_off|robots_unreachable|http_429|http_5\d\d)")
_RETRY = re.compile(r"(?P<shard>.+)-retry(?P<number>\d+)")


def is_of_network(verdict: str) -> bool:
    """Return whether a verdict or ledger reason is a failed download whose link may work at another time."""
    return _NETWORK.fullmatch(verdict.rpartition(":")[2]) is not None


def retry_label(shard: str) -> str:
    """Return the label of the next try of the rows of ``shard`` that are :data:`UNREACHED`."""
    found = _RETRY.fullmatch(shard)
    return f"{found['shard']}-retry{int(found['number']) + 1}" if found else f"{shard}-retry1"


def _first_try(label: str) -> str:
    """Return the label of the shard whose rows are tried again under a :func:`retry_label`; others unchanged."""
    found = _RETRY.fullmatch(label)
    return found["shard"] if found else label


def verdict_of(problem: str) -> str:
    """Return the verdict on a sample whose source reports ``problem``."""
    if problem.startswith(DOWNLOAD):
        return f"{DROPPED}:{DOWNLOAD_REASON}{problem.removeprefix(DOWNLOAD)}"
    if problem == APPLE_DOUBLE:
        return f"{DROPPED}:{problem}"
    return f"{QUARANTINED}:{problem}"


@dataclass
class Ledger:
    """Counts of samples by verdict: ``in = kept + dropped(reason) + quarantined(reason)``, by construction."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> Ledger:
        """Return the sum of ledgers, given as :meth:`to_json`."""
        ledger = cls()
        for entry in entries:
            ledger.add(entry)
        return ledger

    def count(self, verdicts: Iterable[str]) -> Ledger:
        """Add samples by their verdicts: ``kept``, ``dropped:REASON`` or ``quarantined:REASON``."""
        for verdict, number in Counter(verdicts).items():
            kind, _, reason = verdict.partition(":")
            if kind == KEPT:
                self.kept += number
            else:
                (self.dropped if kind == DROPPED else self.quarantined)[reason] += number
        return self

    def add(self, other: Mapping[str, Any]) -> Ledger:
        """Add another ledger, given as :meth:`to_json`."""
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        self.quarantined.update(other["quarantined"])
        return self

    @property
    def total(self) -> int:
        return self.kept + self.dropped.total() + self.quarantined.total()

    @property
    def failed_downloads(self) -> int:
        """Number of samples dropped because their download failed."""
        return sum(number for reason, number in self.dropped.items() if reason.startswith(DOWNLOAD_REASON))

    def to_json(self) -> dict[str, Any]:
        parts = {"dropped": dict(sorted(self.dropped.items())), "quarantined": dict(sorted(self.quarantined.items()))}
        return {"in": self.total, "kept": self.kept, **parts}

    def summary(self) -> str:
        """Format the ledger as one readable line."""
        reasons = [f"{n} {r}" for r, n in (self.dropped + self.quarantined).most_common()]
        return f"{self.kept} of {self.total} kept" + (f" ({', '.join(reasons)})" if reasons else "")


class Part(Config):
    """Entry of ``parts/``: the output for consecutive rows of one input shard."""

    shard: str
    first_row: int
    rows: int
    last: bool
    """Whether this is the last part of the shard."""
    file: str | None
    """Name of the data file; None: no row was kept."""
    records: int
    """Number of records in the data file; an image may have several."""
    ledger: dict[str, Any]
    notes: dict[str, Any] = Field(default_factory=dict)
    """Statistics of these rows for the report of the job."""
    decided: str | None = None
    """Hash of the duplicate decisions that have been applied to this part; None: none."""

    @property
    def name(self) -> str:
        return f"{self.shard}-{self.first_row:07d}"


def ledger_of(parts: Sequence[Part], retrying: Collection[str] = ()) -> Ledger:
    """Return the sum of the ledgers of ``parts``, in which rows that have been tried again count once, as in the last try.

    Those are the unreached rows of all shards whose :func:`retry_label` is finished or in ``retrying``.
    """
    ledger = Ledger.of(part.ledger for part in parts)
    again = _done(parts).union(retrying)
    for part in parts:
        if retry_label(part.shard) in again:
            ledger.dropped -= Counter({k: n for k, n in part.ledger["dropped"].items() if is_of_network(k)})
    return ledger


def open_output(url: str, mode: Mode, settings: Mapping[str, Any]) -> bool:
    """Prepare the output folder of a job; returns whether there is existing output to continue.

    Raises UserError if it is not empty and ``mode`` is ``new``, if it was not made by such a job, or if it is resumed
    with other settings.
    """
    path = storage.join(url, SETTINGS)
    if storage.kind(url) not in (None, "directory"):
        raise UserError(f"output {url}: a file, expected a folder")
    if not storage.is_empty(url):
        if mode == "new":
            hint = "set mode=resume to continue it, mode=fresh to start over, or choose another folder"
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
    """Output folder of one job."""

    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, mode: Mode, settings: Mapping[str, Any], shards: Mapping[str, str] | None = None) -> set[str]:
        """Prepare the folder (:func:`open_output`), and return the labels of the shards that are done.

        ``shards`` are the input shards, URL -> label, if the job has some. A resumed job may have more than before, and
        reads those again that were lost. Raises UserError if it has fewer, naming one that is missing, and if shards had
        other labels when the output was made.
        """
        before = self.parts() if mode == "resume" else []
        lost = {part.shard for part in before if LOST in part.ledger["quarantined"]}
        if shards is not None and before:
            self._check_inputs(shards, lost)
        resumed = open_output(self.url, mode, settings)
        if shards is not None:
            storage.write_json(self._path(INPUTS), dict(shards))
        return self._sweep([part for part in before if part.shard not in lost]) if resumed else set()

    def _check_inputs(self, shards: Mapping[str, str], lost: Collection[str]) -> None:
        """Raise UserError if this output was made from other shards than ``shards``, besides those ``lost`` then."""
        if not storage.exists(self._path(INPUTS)):
            reason = "its shards have the labels of an older version, which depended on the other shards"
            raise UserError(f"output {self.url}: {reason}; use mode=fresh or another folder")
        before = TypeAdapter(dict[str, str]).validate_python(storage.read_json(self._path(INPUTS)))
        gone = sorted(url for url, label in before.items() if shards.get(url) != label and label not in lost)
        if gone:
            others = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            found = f"made from {gone[0]}{others}, which the input no longer has"
            raise UserError(
                f"output {self.url}: {found}; put back what is missing, or use mode=fresh or another folder"
            )

    def parts(self) -> list[Part]:
        """Return all finished parts, sorted by shard and row."""
        files = storage.read_many(storage.glob(self._path(PARTS, "*.json")))
        return sorted(map(Part.model_validate_json, files), key=lambda part: (part.shard, part.first_row))

    def part(self, name: str) -> Part:
        """Read the entry of a part by name."""
        return Part(**storage.read_json(self._path(PARTS, f"{name}.json")))

    def replace(self, part: Part) -> None:
        """Write the entry of ``part``, replacing an existing one."""
        storage.write_json(self._path(PARTS, f"{part.name}.json"), part.model_dump(mode="json"))

    def all_done(self, shards: Iterable[str]) -> list[Part]:
        """Return all parts.

        Raises RuntimeError unless all ``shards`` are done, and UserError if there are parts of others, as when the input was
        changed between two attempts.
        """
        parts, expected = self.parts(), set(shards)
        if others := {_first_try(part.shard) for part in parts} - expected:
            raise UserError(f"{self.url}: has rows of '{min(others)}', which the input no longer has; use mode=fresh")
        missing = expected - _done(parts)
        if missing:
            raise RuntimeError(f"{self.url}: shards not finished: {', '.join(sorted(missing)[:5])}")
        return parts

    def close(self, shards: Iterable[str]) -> Ledger:
        """Check that all ``shards`` are done, and write the ledger; RuntimeError if they are not, or rows are missing."""
        parts = self.all_done(shards)
        rows, counted = sum(part.rows for part in parts), Ledger.of(part.ledger for part in parts).total
        if counted != rows:
            raise RuntimeError(f"{self.url}: the ledger has {counted} rows, expected the {rows} of the parts")
        ledger = ledger_of(parts)
        self._sweep(parts)  # incomplete files of killed workers
        storage.write_json(self._path(LEDGER), ledger.to_json())
        return ledger

    def _sweep(self, parts: Sequence[Part]) -> set[str]:
        """Delete all files, complete or not, that belong to no finished shard of ``parts``; returns the finished shards."""
        done = _done(parts)
        whole = [part for part in parts if part.shard in done]
        keep = {part.name for part in whole} | {f"{part.name}.{part.decided}" for part in whole}
        current = {part.file.rpartition(".")[0] for part in whole if part.file}
        files = {part.file for part in whole} | {SETTINGS, INPUTS, DUPLICATES, RECORD}
        fs, root = storage.filesystem(self.url)
        for path in fs.find(root):
            below, name = path[len(root) :].strip("/"), path.rsplit("/", 1)[-1]
            stem = name.rpartition(".")[0]
            if not (below in files if below == name else stem in (current if below.startswith(INDEX) else keep)):
                fs.rm_file(path)
        return done

    def _path(self, *names: str) -> str:
        return storage.join(self.url, *names)


class PartWriter:
    """Last stage of a job: writes the rows of a table as a part, and returns one row with its shard and ledger.

    A table has consecutive rows of one shard, with ``key, shard, row, last, caption, meta, image`` and ``verdict`` (see
    :class:`Ledger`). ``write_file(url, kept rows)`` writes the data file and returns the number of its records.
    ``note(name of the part, all rows)`` returns the ``notes`` of the entry, and may write further files with that name.
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
        unreached = [row for row in rows if is_of_network(row["verdict"])]
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
        if unreached:
            table = pa.Table.from_pylist(unreached, UNREACHED_ROWS)
            storage.write_parquet(storage.join(self.folder, UNREACHED, f"{part.name}.parquet"), table)
        if self.note:
            part = part.model_copy(update={"notes": self.note(part.name, rows)})
        PartFolder(self.folder).replace(part)
        return part


def read_quarantine(folder: str, part: Part, columns: Sequence[str]) -> pa.Table:
    """Read ``columns`` of the quarantined rows of a part that has some (:data:`.rows.SCHEMA`, and ``reason``)."""
    return storage.read_parquet(storage.join(folder, QUARANTINE, f"{part.name}.parquet"), columns=list(columns))


def finished_file(folder: str, name: str, what: str) -> str:
    """Return the path of the file that a job writes last; UserError without it: ``folder`` is not a finished ``what``."""
    path = storage.join(folder, name)
    if not storage.exists(path):
        hint = "; run its job again with mode=resume" if storage.exists(storage.join(folder, SETTINGS)) else ""
        raise UserError(f"{folder}: not a finished {what} (no {name}){hint}")
    return path


def refuse_unfinished(folder: str) -> None:
    """Raise UserError if ``folder`` is the output of an unfinished data job."""
    if storage.exists(storage.join(folder, SETTINGS)) and not storage.exists(storage.join(folder, LEDGER)):
        raise UserError(f"{folder}: unfinished output of a data job; run that job again with mode=resume")


def _done(parts: Iterable[Part]) -> set[str]:
    """Return the labels of the finished shards, and of the finished tries of their unreached rows."""
    shards: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        shards[part.shard].append(part)
    done = {shard for shard, found in shards.items() if _reaches_the_end(found)}
    return {shard for shard in done if not (retry := _RETRY.fullmatch(shard)) or retry["shard"] in done}


def _reaches_the_end(parts: list[Part]) -> bool:
    row = 0
    for part in sorted(parts, key=lambda part: part.first_row):
        if part.first_row != row:
            return False
        row += part.rows
    return parts != [] and max(parts, key=lambda part: part.first_row).last


def _quarantine_table(rows: list[Row]) -> pa.Table:
    columns = ("key", "shard", "row", "caption", "meta", "image", "members")
    schema = pa.schema([*map(SCHEMA.field, columns), ("reason", pa.string())])
    reasons = [{"reason": row["verdict"].partition(":")[2]} for row in rows]
    return pa.Table.from_pylist([{**row, **why} for row, why in zip(rows, reasons, strict=True)], schema)
