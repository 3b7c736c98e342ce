"""Lineage: the provenance chain from an image, model, run, or set of codes or samples down to the source shards.

The chain is read from run records and checkpoints. Every artifact that still exists is verified: changed and missing ones
are marked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .. import storage
from ..bulk.sample_set import MANIFEST, SWEEP, samples_provenance
from ..config import Config
from ..data.formats.images import read_metadata
from ..data.formats.names import image_extension
from ..data.formats.parts import LEDGER
from ..data.formats.sources import list_inputs
from ..data.model_provenance import model_provenance
from ..data.provenance import data_identity, data_provenance, files_identity
from ..errors import UserError
from ..models.checkpoint import CONFIG, EMA, WEIGHTS, read_checkpoint_config, weight_hash
from ..models.folders import CHECKPOINTS, latest_checkpoint, named_checkpoint
from ..runs import RECORD, Provenance, read_record

State = Literal["here", "moved", "changed", "missing", "unknown"]
"""Unchanged, found at another path, other contents at its path, not found, or not verifiable."""


class Link(Config):
    """Artifact in the chain, with its recorded provenance and current state."""

    role: str
    path: str
    identity: str | None
    facts: dict[str, Any]
    state: State
    note: str | None = None
    """Explanation of the state."""
    inputs: tuple[Link, ...] = ()

    def walk(self) -> Iterator[Link]:
        """Yield this link and all links below it."""
        yield self
        for link in self.inputs:
            yield from link.walk()


def trace(thing: str, models: Sequence[str] = ()) -> Link:
    """Trace the provenance of ``thing``: an image file, model folder, run directory, or output folder of a job.

    A model folder may be given as ``RUN_DIR/latest`` or ``RUN_DIR/best``. ``models``: folders in which to search for
    models whose path is unknown or outdated. Raises UserError if ``thing`` is none of these.
    """
    verifier = ProvenanceVerifier(models)
    if image_extension(thing):
        return _image(thing, verifier)
    return verifier.link(_provenance(named_checkpoint(thing)))


def _provenance(folder: str) -> Provenance:
    """Read the provenance of a folder according to its files; raises UserError if there is none."""
    has = {name: storage.exists(storage.join(folder, name)) for name in (CONFIG, RECORD, LEDGER, MANIFEST, SWEEP)}
    if has[CONFIG] and storage.is_local(folder) and any(Path(folder, name).is_file() for name in (WEIGHTS, EMA)):
        return model_provenance("model", folder)
    if has[LEDGER]:
        return data_provenance("codes" if has[MANIFEST] else "shards", folder)
    if has[MANIFEST] or has[SWEEP]:
        return samples_provenance("samples", folder)
    record = read_record(folder) if has[RECORD] else None
    if record is None:
        expected = "an image, a model folder, a run directory, or the output folder of a job"
        raise UserError(f"{folder}: no provenance found; expected {expected}")
    facts = {**record.facts, "attempts": len(record.attempts)}
    if storage.exists(storage.join(folder, CHECKPOINTS)) and storage.is_local(folder):
        model = model_provenance("checkpoint", latest_checkpoint(folder))
        return Provenance(role="run", kind="name", path=storage.absolute(folder), facts=facts, inputs=(model,))
    return Provenance(role="run", kind="name", path=storage.absolute(folder), facts=facts, inputs=record.inputs)


def _image(path: str, verifier: ProvenanceVerifier) -> Link:
    about = read_metadata(storage.read_bytes(path))
    if about is None:
        raise UserError(f"{path}: no metadata of its generation; expected an image from the endpoint or the decode job")
    weights = about.get("weights")
    facts = {name: about[name] for name in ("model", "seed", "prompt") if name in about}
    named = weights.items() if isinstance(weights, Mapping) else ()
    named_weights = [Provenance(role=str(role), kind="model", path="", identity=str(value)) for role, value in named]
    note = None if named_weights else "names no weights: made before images recorded them"
    links = tuple(verifier.link(provenance) for provenance in named_weights)
    return Link(role="image", path=path, identity=None, facts=facts, state="here", note=note, inputs=links)


class ProvenanceVerifier:
    """Verifies recorded provenance against the file system, searching models in ``folders``.

    Raises UserError for a folder that does not exist.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(f"--models {folder}: no such folder")
        self.folders = folders
        self._hash = cache(weight_hash)

    def link(self, provenance: Provenance) -> Link:
        """Verify ``provenance`` and its inputs; a found model without recorded inputs contributes its own."""
        try:
            state, note, place = self._verify(provenance)
        except Exception as error:  # damaged files or an unreachable store must not hide the rest of the chain
            state, note, place = "unknown", f"cannot be verified ({type(error).__name__}: {error})", None
        if place is not None and provenance.kind == "model" and not provenance.inputs:
            own = model_provenance(provenance.role, place, provenance.identity)
            provenance = provenance.model_copy(
                update={"facts": {**own.facts, **provenance.facts}, "inputs": own.inputs}
            )
        if place is not None and provenance.kind == "model" and not provenance.inputs:
            note = "; ".join(filter(None, (note, "no record of its training data")))
        return Link(
            role=provenance.role,
            path=place or provenance.path,
            identity=provenance.identity,
            facts=provenance.facts,
            state=state,
            note=note,
            inputs=tuple(self.link(each) for each in provenance.inputs),
        )

    def _verify(self, provenance: Provenance) -> tuple[State, str | None, str | None]:
        """Return the state, a note, and the current path."""
        if provenance.kind in ("name", "samples") or (provenance.identity is None and provenance.kind == "files"):
            return "unknown", None, None
        now = self._identity(provenance)
        if now is not None and now == provenance.identity:
            return "here", None, provenance.path
        if provenance.kind == "model" and (other := self._elsewhere(provenance.identity)) is not None:
            return "moved", f"was at {provenance.path}" if provenance.path else None, other
        if now is not None:
            return "changed", f"now {now[:12]}: differs from what was read", None
        hint = f"not found in {', '.join(self.folders)}" if self.folders else "not found; search with --models FOLDER"
        return "missing", hint if provenance.kind == "model" else "no longer exists", None

    def _identity(self, provenance: Provenance) -> str | None:
        """Return the identity of the current contents of the recorded path; None if there are none."""
        if not provenance.path:
            return None
        if provenance.kind == "files":
            try:
                return files_identity(list_inputs(provenance.path))
            except UserError:
                return None
        if provenance.kind == "data":
            return data_identity(provenance.path) if storage.exists(storage.join(provenance.path, LEDGER)) else None
        there = storage.is_local(provenance.path) and _is_model(Path(provenance.path))
        return self._hash(provenance.path) if there else None

    def _elsewhere(self, identity: str | None) -> str | None:
        return next((path for path in self._all() if self._hash(path) == identity), None)

    def _all(self) -> Iterator[str]:
        """Yield every model folder below ``folders``, the newest checkpoint of a run first."""
        for folder in self.folders:
            for here, below, files in os.walk(folder):
                below.sort(reverse=True)
                if CONFIG in files and _is_model(Path(here)):
                    yield here


def _is_model(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in (WEIGHTS, EMA)) and bool(read_checkpoint_config(folder))
    except UserError:
        return False


def tree(link: Link) -> str:
    """Format the chain as a text tree."""
    return "\n".join(_lines(link, "", ""))


def _lines(link: Link, first: str, rest: str) -> Iterator[str]:
    identity = f" {link.identity[:12]}" if link.identity else ""
    facts = ", ".join(f"{name} {value}" for name, value in link.facts.items() if value is not None)
    mark = {"changed": "  ** CHANGED **", "missing": "  ** MISSING **"}.get(link.state, "")
    yield f"{first}{link.role}{identity}  {link.path or '(path unknown)'}{mark}"
    bar = "│  " if link.inputs else "   "
    for more in (facts, link.note):
        if more:
            yield f"{rest}{bar}{more}"
    for number, each in enumerate(link.inputs, start=1):
        last = number == len(link.inputs)
        yield from _lines(each, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
