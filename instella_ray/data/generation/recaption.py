"""Recaption job: curated shards in, the same images with a long and a short caption out, by a pool of captioners."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from PIL import Image
from pydantic import Field

from ... import storage
from ...accelerator import Precision, pick_device, precision_of_actors
from ...runs import Provenance
from ..formats.images import UndecodableError
from ..formats.metadata import json_object
from ..formats.parts import DROPPED, KEPT, QUARANTINED, Ledger, PartWriter
from ..formats.rows import SCHEMA
from ..formats.shards import write_samples
from ..formats.sources import find_images, shard_sources
from ..job import EXECUTION_KEYS, DataJobConfig, data_job
from ..loading.loader import Prefetcher
from ..provenance import shard_provenance
from ..stages import Pool, Stage
from .captioner import Answer, Captioner, Question, check_captioner, decode_for_captioner
from .pretrained import located, short_name

ROWS = SCHEMA.append(pa.field("verdict", pa.string()))
LONG = Question(
    prompt="Describe this image in detail: its subjects, their attributes and positions, the background, the style and "
    "any text in it. Write one paragraph of plain sentences that state what is there.",
    max_new_tokens=256,
)
SHORT = Question(
    prompt="Describe this image in one short sentence that names its main subject. State only what is there.",
    max_new_tokens=48,
)


class RecaptionConfig(DataJobConfig):
    """Which images are described, by which model, and what it is asked."""

    input: str
    """Curated tars, or parquet with images (a path, glob, folder, commas between); captions need not be there."""
    output: str
    """Folder for the tars, ``quarantine/`` and ``ledger.json``."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Vision-language model: hub name, or local folder."""
    long: Question = LONG
    short: Question = SHORT
    max_pixels: int = Field(28 * 28 * 512, ge=1)
    """Larger images are shrunk to so many pixels first; Qwen2.5-VL reads 28 x 28 of them as one token."""
    precision: Precision = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    batch_size: int = Field(16, ge=1)
    """Images described together, with both questions each."""
    actors: int | None = Field(None, ge=1)
    """Captioners; none means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each captioner; 0 computes on the CPU."""
    rows_per_shard: int = Field(1000, ge=1)
    """Images looked at for one output tar."""


class Recaptioner:
    """Actor that holds the captioner and gives every row its captions and verdict.

    A thread decodes the next images while the model describes these. Decoded images never lie in Ray's blocks: a
    thousand of them would be cut into many small blocks, and so into many small tars.
    """

    def __init__(self, cfg: RecaptionConfig) -> None:
        self.cfg, self.name = cfg, short_name(cfg.model)
        device = pick_device("auto" if cfg.gpus_per_actor else "cpu")
        self.captioner = Captioner(cfg.model, device, precision_of_actors(cfg.precision, cfg.gpus_per_actor))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, size = table.to_pylist(), self.cfg.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        decoded = Prefetcher(lambda n: [self.decoded(row) for row in batches[n]], 0, len(batches), depth=1)
        done = [row for batch, images in zip(batches, decoded, strict=True) for row in self.described(batch, images)]
        return pa.Table.from_pylist(done, ROWS)

    def decoded(self, row: dict[str, Any]) -> Image.Image | str:
        """The image of a row of :data:`.rows.SCHEMA`, or the verdict on what is none."""
        try:
            if problem := _problem(row):
                raise UndecodableError(problem)
            return decode_for_captioner(row["image"], self.cfg.max_pixels)
        except UndecodableError as error:
            return f"{QUARANTINED}:{error}"

    def described(self, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image | str]) -> list[dict[str, Any]]:
        """``rows`` with captions and verdict; ``images`` has a verdict in the place of what is none."""
        good = [image for image in images if not isinstance(image, str)]
        answers = iter(self.captioner.answers(good, (self.cfg.long, self.cfg.short)) if good else [])
        return [
            {**row, "verdict": image} if isinstance(image, str) else self._captioned(row, *next(answers))
            for row, image in zip(rows, images, strict=True)
        ]

    def _captioned(self, row: dict[str, Any], long: Answer, short: Answer) -> dict[str, Any]:
        if missing := [answer for answer in (long, short) if not answer.text]:
            reason = "empty" if missing[0].finished else "unfinished"
            return {**row, "image": None, "verdict": f"{DROPPED}:{reason}_caption"}
        meta = json.loads(row["meta"])
        # What a second captioner is given as the caption is the first one's.
        original = meta.get("caption_original") or row["caption"]
        captions = {"caption_long": long.text, "caption_short": short.text, "captioner": self.name}
        meta |= captions | ({"caption_original": original} if original else {})
        return {**row, "caption": long.text, "meta": json.dumps(meta), "verdict": KEPT}


def _problem(row: dict[str, Any]) -> str | None:
    """The row's own; but an image without a caption is none here, if its metadata is in order."""
    if row["problem"] not in ("no_caption", "bad_caption"):
        problem: str | None = row["problem"]
        return problem
    return None if json_object(row["meta"]) is not None else "bad_metadata"


def recaption_settings(cfg: RecaptionConfig) -> dict[str, Any]:
    """What must be equal for a run to go on; UserError for a model that describes no images."""
    volatile = {*EXECUTION_KEYS, "model", "batch_size", "actors", "gpus_per_actor"}
    weights = {"captioner": short_name(cfg.model), "weights": check_captioner(cfg.model)}
    precision = precision_of_actors(cfg.precision, cfg.gpus_per_actor)
    return {**cfg.model_dump(mode="json", exclude=volatile), **weights, "precision": precision}


def run_recaption(cfg: RecaptionConfig) -> Ledger:
    """Describe ``cfg.input`` into ``cfg.output``; returns the ledger that is also written there.

    UserError when there is no input, the model is none that describes images, the output exists unasked or was made
    by other weights or questions, or nothing is left.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output), "model": located(cfg.model)})
    shards = find_images(cfg.input)
    inputs = (*shard_provenance("shards", cfg.input), Provenance(role="captioner", kind="name", path=cfg.model))
    with data_job(cfg, "recaption", "shards", recaption_settings(cfg), inputs) as job:
        captioner = Stage(partial(Recaptioner, cfg), Pool(cfg.actors, cfg.gpus_per_actor))
        sources = shard_sources(shards, cfg.rows_per_shard)
        job.write(sources, [captioner], PartWriter(cfg.output, ".tar", write_samples))
        ledger = job.close(shards.values())
        job.require_kept(f"input {cfg.input}: no image got its captions")
        return ledger
