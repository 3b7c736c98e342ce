"""Provenance of data in run records: outputs of data jobs are identified by their ledgers, other files by their sizes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from .. import storage
from ..runs import Provenance, read_record
from .formats.codes import MANIFEST
from .formats.names import SHARD_LIST, ShardEntry
from .formats.parts import INPUTS, LEDGER, SETTINGS, Ledger
from .formats.patterns import Pattern, absolute_pattern, file_name, pattern_text
from .formats.sources import SUFFIXES, list_inputs

ACCOUNT = (SETTINGS, INPUTS, LEDGER, SHARD_LIST, MANIFEST)
"""Files of a data job's output that identify it; a job need not write all of them."""


def shard_provenance(role: str, pattern: Pattern, *, output: str | None = None) -> tuple[Provenance, ...]:
    """Return the provenance of the shards of ``pattern``: one entry per data job output, and one for all other files.

    The folder ``output`` is no part of the pattern.
    """
    by_folder: dict[str, list[ShardEntry]] = defaultdict(list)
    for entry in list_inputs(pattern, output=output):
        # Outputs of jobs are tars and parquet files; folders of images may be many.
        by_folder[entry.url.rpartition("/")[0] if file_name(entry.url).endswith(SUFFIXES) else ""].append(entry)
    made = {folder for folder in by_folder if folder and storage.exists(storage.join(folder, LEDGER))}
    found = [data_provenance(role, folder) for folder in sorted(made)]
    others = [entry for folder, entries in by_folder.items() if folder not in made for entry in entries]
    return (*found, *([files_provenance(role, pattern, others)] if others else []))


def files_provenance(role: str, pattern: Pattern, entries: Sequence[ShardEntry]) -> Provenance:
    """Return the provenance of files without a ledger, identified by names and sizes, which need no reading."""
    facts = {"files": len(entries), "bytes": sum(entry.bytes for entry in entries)}
    return Provenance(
        role=role,
        kind="files",
        path=pattern_text(absolute_pattern(pattern)),
        identity=files_identity(entries),
        facts=facts,
    )


def files_identity(entries: Sequence[ShardEntry]) -> str:
    """Return the SHA-256 of the names, without their folders, and sizes of files."""
    lines = sorted(f"{entry.url.rpartition('/')[2]} {entry.bytes}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def data_provenance(role: str, folder: str) -> Provenance:
    """Return the provenance of the finished output of a data job, with the inputs of its run record.

    Without a record, the input comes from its settings. Codes without a ledger are identified by their manifest.
    """
    ledger = storage.join(folder, LEDGER)
    found = storage.read_json(ledger) if storage.exists(ledger) else {}
    about = {"path": storage.absolute(folder), "identity": data_identity(folder)}
    counts = {name: found[name] for name in ("in", "kept") if name in found}
    record = read_record(folder)
    if record is not None:
        facts = {**record.facts, **counts}
        return Provenance(role=role, kind="data", facts=facts, inputs=record.inputs, **about)
    settings = storage.join(folder, SETTINGS)
    source = storage.read_json(settings).get("input") if storage.exists(settings) else None
    inputs = (Provenance(role="shards", kind="files", path=str(source)),) if source else ()
    return Provenance(role=role, kind="data", facts=counts, inputs=inputs, **about)


def output_provenance(role: str, folder: str, ledger: Ledger) -> Provenance:
    """Return the provenance of the output that a data job has just finished."""
    facts = {"in": ledger.total, "kept": ledger.kept}
    return Provenance(role=role, kind="data", path=folder, identity=data_identity(folder), facts=facts)


def data_identity(folder: str) -> str:
    """Return the SHA-256 of the :data:`ACCOUNT` files of a folder."""
    digest = hashlib.sha256()
    for name in ACCOUNT:
        if storage.exists(path := storage.join(folder, name)):
            digest.update(f"{name} {storage.file_sha256(path)}\n".encode())
    return digest.hexdigest()
