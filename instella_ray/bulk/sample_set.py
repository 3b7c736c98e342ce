"""Sample sets on disk: a folder of parquet files with packed codes, and a manifest with their provenance.

A sample's bits are a function of the model, its prompt, its index and the settings. The hash of these is the id of the
*run* and is stored in every file, so that a file of another run is detected, like a damaged one.
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
from pydantic import Field

from .. import storage
from ..config import Config
from ..data.formats.codes import pack_codes, unpack_codes
from ..data.formats.metadata import json_text
from ..data.formats.parts import finished_file
from ..data.prompts import Prompt
from ..errors import UserError
from ..models.eight_bit import Quantization
from ..models.sampling import SamplingConfig
from ..packages import installed_versions
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
    """A file of samples is missing, damaged or of another run; the message names it."""


class SampleFile(Config):
    """Manifest entry of one parquet file."""

    name: str
    rows: int
    seconds: float
    """Actor time for sampling it, in seconds."""


class SampleRun(Config):
    """Everything that a sample's bits depend on, except its prompt and index."""

    model: str
    """Model folder at sampling time; not part of the id, which contains the hash."""
    model_hash: str
    kind: str
    """``diffusion`` or ``ar``."""
    tokenizer_hash: str | None
    text_encoder: dict[str, Any] | None
    text_length: int
    """Maximum prompt tokens; longer prompts were truncated."""
    precision: str
    quantization: Quantization = "none"
    num_tokens: int
    bits_per_token: int
    seed: int
    sampling: SamplingConfig
    prompts: str
    """Source of the prompts; not part of the id, which contains the hash."""
    prompts_hash: str
    images_per_prompt: int
    by_prompt: tuple[str, ...] = ()
    """Settings that prompts give themselves, in place of those of ``sampling``: sampling settings and ``size``."""

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all fields except ``model`` and ``prompts``."""
        about = self.model_dump(mode="json", exclude={"model", "prompts"})
        # Sets from before these settings existed keep their id.
        if self.quantization == "none":
            del about["quantization"]
        if not self.sampling.redraw:
            del about["sampling"]["redraw"]
        if not self.by_prompt:
            del about["by_prompt"]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


class SampleManifest(Config):
    """Manifest of a finished folder of samples."""

    run_id: str
    run: SampleRun
    rows: int
    files: tuple[SampleFile, ...]
    hardware: str
    price_per_hour: float | None = None
    """Price of one actor per hour; none if unknown."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of this package and its libraries at sampling time; empty in sets from before they were recorded."""

    @property
    def seconds(self) -> float:
        """Total actor time, in seconds."""
        return sum(file.seconds for file in self.files)

    @property
    def cost(self) -> float | None:
        """Total cost in the currency of the price; none without a price."""
        return None if self.price_per_hour is None else self.seconds / 3600 * self.price_per_hour


@dataclass(frozen=True)
class SampleBlock:
    """Samples of one file, in order."""

    ids: list[str]
    """``PROMPT_ID/INDEX``, unique in the set."""
    prompt_ids: list[str]
    indices: list[int]
    prompts: list[str]
    categories: list[str | None]
    meta: list[dict[str, Any]]
    seeds: list[int]
    """Seed of each sample; a request with this seed gives the same bits."""
    codes: np.ndarray
    """uint8 0/1 ``[N, L, K]``."""

    def __len__(self) -> int:
        return len(self.ids)

    def prompt(self, row: int) -> Prompt:
        """Return the prompt of a sample."""
        return Prompt(self.prompt_ids[row], self.prompts[row], self.categories[row], self.meta[row])


class SampleSet:
    """Reader of a finished folder of samples, file by file."""

    def __init__(self, folder: str) -> None:
        """Read the manifest; raises UserError for a missing or unfinished folder."""
        path = finished_file(folder, MANIFEST, "folder of samples")
        try:
            self.manifest = SampleManifest.model_validate(storage.read_json(path))
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: not a manifest of samples ({error.errors()[0]['msg']})") from None
        self.folder, self.run = folder, self.manifest.run

    def __len__(self) -> int:
        """Number of samples in all files."""
        return self.manifest.rows

    def made_with(self) -> dict[str, Any]:
        """Return hardware and versions of the sampling, and versions of what decodes it here, for an image's metadata."""
        versions = {"sampling": self.manifest.versions, "decoding": library_versions()}
        return {"hardware": self.manifest.hardware, "versions": versions}

    def block(self, number: int) -> SampleBlock:
        """Read file ``number``; raises :class:`BadFile` if it does not match the manifest."""
        file = self.manifest.files[number]
        url = storage.join(self.folder, file.name)
        try:
            block = read_block(url, self.run)
            if len(block) != file.rows:
                raise BadFile(f"{url}: {len(block)} samples, expected {file.rows} as in the manifest")
        except BadFile as error:
            raise BadFile(f"{error}; run the sampling job with mode=resume to replace it") from None
        return block

    def blocks(self) -> Iterator[SampleBlock]:
        """Iterate over the blocks of all files."""
        return (self.block(number) for number in range(len(self.manifest.files)))


def find_sample_sets(folder: str) -> dict[str, SampleSet]:
    """Open the sample sets of ``folder`` by setting name: those of a sweep, or ``folder`` itself with the name ''."""
    path = storage.join(folder, SWEEP)
    names = storage.read_json(path)["settings"] if storage.exists(path) else [""]
    return {name: SampleSet(storage.join(folder, name) if name else folder) for name in names}


def samples_provenance(role: str, folder: str) -> Provenance:
    """Return the provenance of a folder of samples, one set or a sweep, identified by the ids of its runs.

    Inputs come from the folder's run record; without one, they are the model and prompts of its manifest.
    """
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


def library_versions() -> dict[str, str]:
    """Return the versions of what makes samples and images of them."""
    return installed_versions(("instella-ray", "torch", "transformers"))


def sample_id(prompt_id: str, index: int) -> str:
    return f"{prompt_id}/{index}"


def write_block(url: str, block: SampleBlock, run: SampleRun, seconds: float) -> None:
    """Write a file of samples atomically."""
    columns = {
        "sample_id": block.ids,
        "prompt_id": block.prompt_ids,
        "index": block.indices,
        "prompt": block.prompts,
        "category": block.categories,
        "meta": [json_text(dict(meta), sort_keys=True) for meta in block.meta],
        "seed": block.seeds,
        "codes": pack_codes(block.codes),
    }
    about = {"run": run.id, "seconds": f"{seconds:.3f}"}
    table = pa.Table.from_pydict(columns, SCHEMA.with_metadata(about))
    storage.write_parquet(url, table, write_page_checksum=True)


def read_block(url: str, run: SampleRun) -> SampleBlock:
    """Read a file of ``run``; raises :class:`BadFile` if it is missing, damaged or of another run."""
    return _block_of(_table(url, run), url, run)


def check_file(url: str, run: SampleRun, ids: Sequence[str]) -> SampleFile:
    """Return the manifest entry of a file; raises :class:`BadFile` unless it holds exactly ``ids`` of ``run``."""
    table = _table(url, run)
    found = _block_of(table, url, run)
    if found.ids != list(ids):
        raise BadFile(f"{url}: does not hold the expected samples")
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
                raise BadFile(f"{url}: of another run ({made_by or 'no id'}, expected {run.id})")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{url}: damaged ({str(error).splitlines()[0]})") from None
    if not table.schema.equals(SCHEMA):
        raise BadFile(f"{url}: damaged (columns {', '.join(table.schema.names)})")
    return table
