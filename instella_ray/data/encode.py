"""Encoding job: encodes curated shards into packed BIT codes, decoding on CPUs, with the tokenizer on an actor pool."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
from pydantic import Field

from .. import storage
from ..accelerator import pick_device
from ..config import InputPath, OutputPath
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, weight_hash
from ..models.folders import find_model
from .formats.codes import MANIFEST, CodesFile, CodesManifest, CodesWriter, pack_codes
from .formats.images import to_tensor
from .formats.parts import PartWriter
from .formats.patterns import Pattern, pattern_text
from .formats.rows import BLOCK_BYTES
from .formats.sources import find_images, shard_sources
from .formats.texts import CAPTION_NAMES, CaptionKeys
from .job import INPUT_KEYS, DataJobConfig, data_job
from .model_provenance import model_provenance
from .provenance import shard_provenance
from .stages import Pool, Stage
from .views import ViewDecoder


class EncodeConfig(DataJobConfig):
    """Configuration of the encoding job: input images, tokenizer, and views per image."""

    input: Pattern
    """Curated WebDataset tars, or other images as for curation: paths, globs or lists of shards, comma-separated."""
    output: OutputPath
    """Output folder of the parquet files, ``manifest.json`` and ``ledger.json``."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in any case, in order of preference."""
    tokenizer: InputPath
    """Model folder of the BIT tokenizer."""
    size: int | None = Field(None, ge=1)
    """Input resolution of the encoder (px); null: the image size of the tokenizer."""
    crops: int = Field(1, ge=1)
    """Square crops per image, evenly spaced along its longer side; 1: the centre crop."""
    flips: bool = False
    """Also encode each crop mirrored. Off by default, because captions may mention left and right."""
    source: str = "laion"
    """Name of this dataset, for mixtures and lineage."""
    rows_per_file: int = Field(1000, ge=1)
    """Input images per parquet file; fewer if their views would exceed 128 MiB."""
    batch_size: int = Field(64, ge=1)
    """Views per encoder call."""
    actors: int | None = Field(None, ge=1)
    """Encoder actors; null: one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs per encoder actor, fractions allowed; 0: encode on the CPU."""


class CodesEncoder:
    """Actor that encodes the column ``views`` of a table into the column ``codes``, a list of packed codes per image."""

    def __init__(self, cfg: EncodeConfig, size: int) -> None:
        self.size, self.batch_size = size, cfg.batch_size
        self.device = pick_device("auto" if cfg.gpus_per_actor else "cpu")
        self.bit = load_expected(cfg.tokenizer, BIT, device=self.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        columns = table["views"].to_pylist()
        pixels = np.frombuffer(b"".join(views or b"" for views in columns), np.uint8)
        packed = self.encode(pixels.reshape(-1, self.size, self.size, 3))
        per_view = 3 * self.size**2
        counts = [len(views or b"") // per_view for views in columns]
        ends = np.cumsum(counts).tolist()
        codes = [packed[end - count : end] for end, count in zip(ends, counts, strict=True)]
        return table.drop_columns("views").append_column("codes", pa.array(codes, pa.list_(pa.binary())))

    def encode(self, pixels: np.ndarray) -> list[bytes]:
        """Encode uint8 ``[N, size, size, 3]`` into N packed codes."""
        packed: list[bytes] = []
        for start in range(0, len(pixels), self.batch_size):
            images = to_tensor(pixels[start : start + self.batch_size].copy()).to(self.device)
            packed += pack_codes(self.bit.encode(images).cpu().numpy())
        return packed


def run_encode(cfg: EncodeConfig) -> CodesManifest:
    """Encode ``cfg.input`` into ``cfg.output``; returns the manifest, which is also written there.

    Raises UserError if the input is missing, the size does not fit the tokenizer, or the output exists and ``cfg.mode``
    does not allow it.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output), "tokenizer": find_model(cfg.tokenizer)})
    shards = find_images(cfg.input, cfg.caption_keys, output=cfg.output)
    bit = load_expected(cfg.tokenizer, BIT)
    size = cfg.size or bit.cfg.image_size
    if size % (multiple := bit.cfg.encode_multiple):
        raise UserError(f"size {size}: not a multiple of {multiple}, as tokenizer {cfg.tokenizer} needs to encode")
    tokenizer_hash = weight_hash(bit)
    volatile = {*INPUT_KEYS, "tokenizer", "batch_size", "actors", "gpus_per_actor"}
    settings = {**cfg.model_dump(mode="json", exclude=volatile), "size": size, "tokenizer_hash": tokenizer_hash}
    provenance = shard_provenance("shards", cfg.input, output=cfg.output)
    inputs = (*provenance, model_provenance("tokenizer", cfg.tokenizer, tokenizer_hash))
    with data_job(cfg, "encode", "codes", settings, inputs, shards) as job:
        decoder = ViewDecoder(size, cfg.crops, cfg.flips)
        rows_per_file = min(cfg.rows_per_file, decoder.rows_within(BLOCK_BYTES))
        encoder = Stage(partial(CodesEncoder, cfg, size), Pool(cfg.actors, cfg.gpus_per_actor))
        writer = PartWriter(cfg.output, ".parquet", CodesWriter(cfg.source))
        sources = shard_sources(
            shards, rows_per_file, caption_keys=cfg.caption_keys, time_limit_s=cfg.shard_time_limit_s
        )
        job.write(sources, [Stage(decoder), encoder], writer)
        job.close(shards.values(), listed=False)
        job.require_kept(f"input {pattern_text(cfg.input)}: nothing to encode")
        files = [CodesFile(name=part.file, rows=part.records) for part in job.folder.parts() if part.file]
        manifest = CodesManifest(
            tokenizer_hash=tokenizer_hash,
            num_tokens=bit.cfg.num_tokens,
            bits_per_token=bit.cfg.bits_per_token,
            rows=sum(file.rows for file in files),
            files=tuple(files),
        )
        # Written last, so that a folder with a manifest is complete.
        storage.write_json(storage.join(cfg.output, MANIFEST), manifest.model_dump(mode="json"))
        return manifest
