"""Samples on disk: a folder of parquet files with packed codes, and a manifest that says what made them.

A sample's bits are a function of the model, its prompt, its number and the settings; the hash of all these is the *run*,
and every file carries it. So a file that was damaged, or belongs to another run, is found and named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from .. import storage
from ..config import Config
from ..data.formats.codes import pack_codes, unpack_codes
from ..data.formats.parts import finished_file
from ..errors import UserError
from ..models.sampling import SamplingConfig
from ..runs import Provenance, read_record

MANIFEST, SWEEP = "manifest.json", "sweep.json"
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("prompt", pa.string()),
        ("category", pa.string()),
        ("meta", pa.string()),
        ("seed", pa.int64()),
        ("codes", pa.binary()),
    ]
)


class BadFile(UserError):
    """A file of samples that is missing, damaged, or of another run; the message names it."""


class SampleFile(Config):
    """One parquet file."""

    name: str
    rows: int
    seconds: float
    """Time that its actor took."""


class SampleRun(Config):
    """Everything that a sample's bits depend on, beside its prompt and number."""

    model: str
    """Where the model was; what counts is its hash."""
    model_hash: str
    kind: str
    """``diffusion`` or ``ar``."""
    tokenizer_hash: str | None
    text_encoder: dict[str, Any] | None
    text_length: int
    """Longer prompts were cut to so many tokens."""
    precision: str
    num_tokens: int
    bits_per_token: int
    seed: int
    sampling: SamplingConfig
    prompts: str
    """Where they came from; what counts is their hash."""
    prompts_hash: str
    images_per_prompt: int

    @property
    def id(self) -> str:
        """Sixteen digits of the hash of all that counts."""
        about = self.model_dump(mode="json", exclude={"model", "prompts"})
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


class SampleManifest(Config):
    """A finished folder."""

    run_id: str
    run: SampleRun
    rows: int
    files: tuple[SampleFile, ...]
    hardware: str
    price_per_hour: float | None = None
    """Of one actor."""

    @property
    def seconds(self) -> float:
        """Of all actors together."""
        return sum(file.seconds for file in self.files)

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_hour is None else self.seconds / 3600 * self.price_per_hour


@dataclass(frozen=True)
class SampleBlock:
    """The rows of one file, in order."""

    ids: list[str]
    """``PROMPT_ID/INDEX``, unique in the set."""
    prompt_ids: list[str]
    indices: list[int]
    prompts: list[str]
    categories: list[str | None]
    meta: list[dict[str, Any]]
    seeds: list[int]
    """Each sample's own: a request with it gives the same bits."""
    codes: np.ndarray
    """uint8 0/1 ``[N, L, K]``."""

    def __len__(self) -> int:
        return len(self.ids)


class SampleSet:
    """A finished folder of samples, read file by file."""

    def __init__(self, folder: str) -> None:
        """UserError where the folder is none, or not finished."""
        path = finished_file(folder, MANIFEST, "folder of samples")
        try:
            self.manifest = SampleManifest.model_validate(storage.read_json(path))
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: not a manifest of samples ({error.errors()[0]['msg']})") from None
        self.folder, self.run = folder, self.manifest.run

    def __len__(self) -> int:
        """Samples in all files."""
        return self.manifest.rows

    def block(self, number: int) -> SampleBlock:
        """File ``number``; :class:`BadFile` where it is not what the manifest says."""
        file = self.manifest.files[number]
        url = storage.join(self.folder, file.name)
        try:
            block = read_block(url, self.run)
            if len(block) != file.rows:
                raise BadFile(f"{url}: {len(block)} samples, the manifest says {file.rows}")
        except BadFile as error:
            raise BadFile(f"{error}; the sampling job with mode=resume sets it aside and makes it anew") from None
        return block

    def blocks(self) -> Iterator[SampleBlock]:
        """All files."""
        return (self.block(number) for number in range(len(self.manifest.files)))


def find_sample_sets(folder: str) -> dict[str, SampleSet]:
    """Sets by the name of their setting: those of a sweep, or the one that ``folder`` is, named ''."""
    path = storage.join(folder, SWEEP)
    names = storage.read_json(path)["settings"] if storage.exists(path) else [""]
    return {name: SampleSet(storage.join(folder, name) if name else folder) for name in names}


def samples_provenance(role: str, folder: str) -> Provenance:
    """A folder of samples, one set or a sweep, by the runs that made it; without a record its manifest names the model."""
    sets = find_sample_sets(folder)
    run = next(iter(sets.values())).run
    identity = hashlib.sha256(" ".join(found.manifest.run_id for found in sets.values()).encode()).hexdigest()
    facts = {"samples": sum(len(found) for found in sets.values()), "model": run.kind, "seed": run.seed}
    record = read_record(folder)
    model = Provenance(role="generator", kind="model", path=run.model, identity=run.model_hash)
    prompts = Provenance(role="prompts", kind="name", path=run.prompts, identity=run.prompts_hash)
    return Provenance(
        role=role,
        kind="samples",
        path=storage.absolute(folder),
        identity=identity,
        facts={**(record.facts if record is not None else {}), **facts},
        inputs=record.inputs if record is not None else (model, prompts),
    )


def sample_id(prompt_id: str, index: int) -> str:
    return f"{prompt_id}/{index}"


def write_block(url: str, block: SampleBlock, run: SampleRun, seconds: float) -> None:
    """Store a file, whole or absent."""
    columns = {
        "sample_id": block.ids,
        "prompt_id": block.prompt_ids,
        "index": block.indices,
        "prompt": block.prompts,
        "category": block.categories,
        "meta": [json.dumps(dict(meta), sort_keys=True) for meta in block.meta],
        "seed": block.seeds,
        "codes": pack_codes(block.codes),
    }
    about = {"run": run.id, "seconds": f"{seconds:.3f}"}
    table = pa.Table.from_pydict(columns, SCHEMA.with_metadata(about))
    storage.write_parquet(url, table, write_page_checksum=True)


def read_block(url: str, run: SampleRun) -> SampleBlock:
    """The samples of a file of ``run``; :class:`BadFile` for one that is missing, damaged or of another run."""
    return _block_of(_table(url, run), url, run)


def check_file(url: str, run: SampleRun, ids: Sequence[str]) -> SampleFile:
    """The manifest's entry of a file; :class:`BadFile` unless it holds just the samples ``ids`` of ``run``."""
    table = _table(url, run)
    found = _block_of(table, url, run)
    if found.ids != list(ids):
        raise BadFile(f"{url}: holds other samples than it should")
    seconds = float(table.schema.metadata[b"seconds"])
    return SampleFile(name=url.rsplit("/", 1)[-1], rows=len(found), seconds=seconds)


def _block_of(table: pa.Table, url: str, run: SampleRun) -> SampleBlock:
    try:
        codes = unpack_codes(table["codes"].to_pylist(), run.num_tokens, run.bits_per_token)
    except UserError as error:
        raise BadFile(f"{url}: damaged ({error})") from None
    ids, prompt_ids, indices, prompts, categories, meta, seeds = (
        table[name].to_pylist() for name in SCHEMA.names if name != "codes"
    )
    return SampleBlock(ids, prompt_ids, indices, prompts, categories, [json.loads(m) for m in meta], seeds, codes)


def _table(url: str, run: SampleRun) -> pa.Table:
    if not storage.exists(url):
        raise BadFile(f"{url}: missing")
    try:
        with storage.open_file(url) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            made_by = (file.schema_arrow.metadata or {}).get(b"run", b"").decode()
            if made_by != run.id:
                raise BadFile(f"{url}: of another run ({made_by or 'none named'}, expected {run.id})")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{url}: damaged ({str(error).splitlines()[0]})") from None
    if not table.schema.equals(SCHEMA):
        raise BadFile(f"{url}: damaged (columns {', '.join(table.schema.names)})")
    return table
