"""Recaption job: writes the images of curated shards with new long and short captions, by a pool of captioners."""

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
from ...config import OutputPath
from ...runs import Provenance
from ..formats.images import UndecodableError
from ..formats.metadata import json_object
from ..formats.parts import DROPPED, KEPT, QUARANTINED, Ledger, PartWriter, verdict_of
from ..formats.patterns import Pattern, pattern_text
from ..formats.rows import SCHEMA
from ..formats.shards import write_samples
from ..formats.sources import find_images, shard_sources
from ..formats.texts import CAPTION_NAMES, CaptionKeys
from ..job import INPUT_KEYS, DataJobConfig, data_job
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
    """Configuration of the recaption job: input images, model and questions."""

    input: Pattern
    """Curated tars, or other images as for curation: paths, globs or lists, comma-separated; without captions too."""
    output: OutputPath
    """Output folder of the tars, ``quarantine/`` and ``ledger.json``."""
    caption_keys: CaptionKeys = CAPTION_NAMES
    """Names of captions in KEY.json and of columns with captions, in any case, in order of preference."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Vision-language model: hub name or local folder."""
    long: Question = LONG
    short: Question = SHORT
    max_pixels: int = Field(28 * 28 * 512, ge=1)
    """Maximum number of pixels, to which larger images are shrunk; Qwen2.5-VL encodes 28 x 28 pixels as one token."""
    precision: Precision = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    batch_size: int = Field(16, ge=1)
    """Images per batch; each is captioned for both questions."""
    actors: int | None = Field(None, ge=1)
    """Captioner actors; null: one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs per captioner actor, fractions allowed; 0: run on the CPU."""
    rows_per_shard: int = Field(1000, ge=1)
    """Input images per output tar."""


class Recaptioner:
    """Actor that runs the captioner, and adds captions and a verdict to every row.

    A thread decodes the next batch while the model captions the current one. Images are decoded here rather than in an
    earlier stage, because decoded images would be split into many small Ray blocks, and so into many small tars.
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
        """Decode the image of a row of :data:`..formats.rows.SCHEMA`; a verdict instead if that fails."""
        if problem := _problem(row):
            return verdict_of(problem)
        try:
            return decode_for_captioner(row["image"], self.cfg.max_pixels)
        except UndecodableError as error:
            return f"{QUARANTINED}:{error}"

    def described(self, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image | str]) -> list[dict[str, Any]]:
        """Return ``rows`` with captions and verdicts; ``images`` are the results of :meth:`decoded`."""
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
        # After recaptioning twice, the original caption is that of the metadata.
        original = meta.get("caption_original") or row["caption"]
        captions = {"caption_long": long.text, "caption_short": short.text, "captioner": self.name}
        meta |= captions | ({"caption_original": original} if original else {})
        return {**row, "caption": long.text, "meta": json.dumps(meta), "verdict": KEPT}


def _problem(row: dict[str, Any]) -> str | None:
    """Return the problem of a row, ignoring a missing caption unless the metadata is invalid."""
    if row["problem"] not in ("no_caption", "bad_caption"):
        problem: str | None = row["problem"]
        return problem
    return None if json_object(row["meta"]) is not None else "bad_metadata"


def recaption_settings(cfg: RecaptionConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must share; UserError if the model is not a captioner."""
    volatile = {*INPUT_KEYS, "model", "batch_size", "actors", "gpus_per_actor"}
    weights = {"captioner": short_name(cfg.model), "weights": check_captioner(cfg.model)}
    precision = precision_of_actors(cfg.precision, cfg.gpus_per_actor)
    return {**cfg.model_dump(mode="json", exclude=volatile), **weights, "precision": precision}


def run_recaption(cfg: RecaptionConfig) -> Ledger:
    """Recaption ``cfg.input`` into ``cfg.output``; returns the ledger, which is also written there.

    Raises UserError if the input is missing, the model is not a captioner, the output exists and ``cfg.mode`` does not
    allow it, it was made with other weights or questions, or no image is kept.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output), "model": located(cfg.model)})
    shards = find_images(cfg.input, cfg.caption_keys, output=cfg.output)
    provenance = shard_provenance("shards", cfg.input, output=cfg.output)
    inputs = (*provenance, Provenance(role="captioner", kind="name", path=cfg.model))
    with data_job(cfg, "recaption", "shards", recaption_settings(cfg), inputs, shards) as job:
        captioner = Stage(partial(Recaptioner, cfg), Pool(cfg.actors, cfg.gpus_per_actor))
        sources = shard_sources(
            shards, cfg.rows_per_shard, caption_keys=cfg.caption_keys, time_limit_s=cfg.shard_time_limit_s
        )
        job.write(sources, [captioner], PartWriter(cfg.output, ".tar", write_samples))
        ledger = job.close(shards.values())
        job.require_kept(f"input {pattern_text(cfg.input)}: no image was captioned")
        return ledger
