"""Where something comes from: the chain from an image, model, run, or set of codes or samples down to the source shards.

The chain is what run records and checkpoints say. Each of its things that can still be found is looked at again: one
that is now another, or is gone, is named at its place.
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
from ..data.formats.names import find_files
from ..data.formats.parts import LEDGER
from ..data.formats.sources import SUFFIXES
from ..data.model_provenance import model_provenance
from ..data.provenance import data_identity, data_provenance, files_identity
from ..errors import UserError
from ..models.checkpoint import CONFIG, EMA, WEIGHTS, read_checkpoint_config, weight_hash
from ..runs import RECORD, Provenance, read_record
from ..training.run_dir import CHECKPOINTS, latest_checkpoint

State = Literal["here", "moved", "changed", "missing", "unknown"]
"""The same as it was, the same at another place, another one at its place, not to be found, nothing to tell it by."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


class Link(Config):
    """A thing of the chain, as it was and as it was found."""

    role: str
    path: str
    identity: str | None
    facts: dict[str, Any]
    state: State
    note: str | None = None
    """What there is to say of its state."""
    inputs: tuple[Link, ...] = ()

    def walk(self) -> Iterator[Link]:
        """This one and all below it."""
        yield self
        for link in self.inputs:
            yield from link.walk()


def trace(thing: str, models: Sequence[str] = ()) -> Link:
    """The chain behind ``thing``: an image's file, or a model folder, run directory, or output folder of a job.

    ``models`` are folders to look for models in whose place is not known, or not theirs any more. UserError where
    ``thing`` is none of these.
    """
    shelf = Shelf(models)
    if thing.lower().endswith(IMAGES):
        return _image(thing, shelf)
    return shelf.found(_provenance(thing))


def _provenance(folder: str) -> Provenance:
    """A folder by what lies in it."""
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
        raise UserError(f"{folder}: nothing there says where it comes from; expected {expected}")
    facts = {**record.facts, "attempts": len(record.attempts)}
    if storage.exists(storage.join(folder, CHECKPOINTS)) and storage.is_local(folder):
        model = model_provenance("checkpoint", latest_checkpoint(folder))
        return Provenance(role="run", kind="name", path=storage.absolute(folder), facts=facts, inputs=(model,))
    return Provenance(role="run", kind="name", path=storage.absolute(folder), facts=facts, inputs=record.inputs)


def _image(path: str, shelf: Shelf) -> Link:
    about = read_metadata(storage.read_bytes(path))
    if about is None:
        raise UserError(f"{path}: says nothing of what made it; expected an image from this endpoint or bulk job")
    weights = about.get("weights")
    facts = {name: about[name] for name in ("model", "seed", "prompt") if name in about}
    named = weights.items() if isinstance(weights, Mapping) else ()
    named_weights = [Provenance(role=str(role), kind="model", path="", identity=str(value)) for role, value in named]
    note = None if named_weights else "names no weights: made before images did"
    links = tuple(shelf.found(provenance) for provenance in named_weights)
    return Link(role="image", path=path, identity=None, facts=facts, state="here", note=note, inputs=links)


class Shelf:
    """Where models are looked for."""

    def __init__(self, folders: Sequence[str]) -> None:
        """UserError for a folder that is none."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(f"--models {folder}: no such folder")
        self.folders = folders
        self._hash = cache(weight_hash)

    def found(self, provenance: Provenance) -> Link:
        """``provenance`` and what is behind it, as they are now. A model that is found tells its own chain."""
        try:
            state, note, place = self._look(provenance)
        except Exception as error:  # damaged, or a store out of reach: that is what there is to say of it
            state, note, place = "unknown", f"cannot be looked at ({type(error).__name__}: {error})", None
        if place is not None and provenance.kind == "model" and not provenance.inputs:
            told = model_provenance(provenance.role, place, provenance.identity)
            provenance = provenance.model_copy(
                update={"facts": {**told.facts, **provenance.facts}, "inputs": told.inputs}
            )
        if place is not None and provenance.kind == "model" and not provenance.inputs:
            note = "; ".join(filter(None, (note, "says nothing of what it was trained on")))
        return Link(
            role=provenance.role,
            path=place or provenance.path,
            identity=provenance.identity,
            facts=provenance.facts,
            state=state,
            note=note,
            inputs=tuple(self.found(each) for each in provenance.inputs),
        )

    def _look(self, provenance: Provenance) -> tuple[State, str | None, str | None]:
        """State, what to say of it, and where it is now."""
        if provenance.kind in ("name", "samples") or (provenance.identity is None and provenance.kind == "files"):
            return "unknown", None, None
        now = self._identity(provenance)
        if now is not None and now == provenance.identity:
            return "here", None, provenance.path
        if provenance.kind == "model" and (other := self._elsewhere(provenance.identity)) is not None:
            return "moved", f"was at {provenance.path}" if provenance.path else None, other
        if now is not None:
            return "changed", f"now {now[:12]}: not what was read then", None
        hint = f"not found in {', '.join(self.folders)}" if self.folders else "not found; --models FOLDER looks there"
        return "missing", hint if provenance.kind == "model" else "not there any more", None

    def _identity(self, provenance: Provenance) -> str | None:
        """That of what is at the provenance's place now, None where nothing is."""
        if not provenance.path:
            return None
        if provenance.kind == "files":
            try:
                return files_identity(find_files(provenance.path, SUFFIXES))
            except UserError:
                return None
        if provenance.kind == "data":
            return data_identity(provenance.path) if storage.exists(storage.join(provenance.path, LEDGER)) else None
        there = storage.is_local(provenance.path) and _is_model(Path(provenance.path))
        return self._hash(provenance.path) if there else None

    def _elsewhere(self, identity: str | None) -> str | None:
        return next((path for path in self._all() if self._hash(path) == identity), None)

    def _all(self) -> Iterator[str]:
        """Every model folder on the shelf, the newest checkpoint of a run first."""
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
    """The chain as lines for people."""
    return "\n".join(_lines(link, "", ""))


def _lines(link: Link, first: str, rest: str) -> Iterator[str]:
    identity = f" {link.identity[:12]}" if link.identity else ""
    facts = ", ".join(f"{name} {value}" for name, value in link.facts.items() if value is not None)
    mark = {"changed": "  ** CHANGED **", "missing": "  ** MISSING **"}.get(link.state, "")
    yield f"{first}{link.role}{identity}  {link.path or '(place not known)'}{mark}"
    bar = "│  " if link.inputs else "   "
    for more in (facts, link.note):
        if more:
            yield f"{rest}{bar}{more}"
    for number, each in enumerate(link.inputs, start=1):
        last = number == len(link.inputs)
        yield from _lines(each, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
