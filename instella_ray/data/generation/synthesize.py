"""Synthesize job: an image of every prompt by every model, as captioned WebDataset tars."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from ... import storage
from ...accelerator import precision_of_actors
from ...runs import Provenance
from ..formats.parts import KEPT, Ledger, PartWriter
from ..formats.rows import SCHEMA
from ..formats.shards import write_samples
from ..job import DataJobConfig, data_job
from ..prompts import Prompt, prompts_hash, read_prompts
from ..stages import Pool, Stage, row_table
from .diffusers_pipeline import DiffusersPipeline, PipelineConfig, check_pipeline
from .pretrained import located, short_name

ROWS = SCHEMA.append(pa.field("verdict", pa.string()))
# A key is PROMPT-MODEL: without a dash in its second half it can be parted again, and no two are the same.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class SynthesizeConfig(DataJobConfig):
    """Which prompts become images, by which models."""

    prompts: str
    """A .txt, .jsonl, .parquet (DiffusionDB) or (COCO) .json file; ``scenes`` are the procedural set's own."""
    output: str
    """Folder for the tars, ``quarantine/`` and ``ledger.json``."""
    models: dict[ModelName, PipelineConfig] = Field(min_length=1)
    """By the name that keys and metadata give them. They run one after another."""
    count: int | None = Field(None, ge=1)
    """Draw so many of the prompts; none means all."""
    seed: int = Field(0, ge=0)
    """Of the draw of prompts and of every image's own seed."""
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    """Of the image files."""
    quality: int = Field(95, ge=1, le=100)
    """Of JPEG and WebP."""
    prompts_per_shard: int = Field(256, ge=1)
    """Images of one tar, and what is lost at most when an actor dies."""


class Synthesizer:
    """Actor that holds one pipeline and makes the images of a chunk of prompts."""

    def __init__(self, cfg: SynthesizeConfig, name: str) -> None:
        self.cfg, self.name, self.model = cfg, name, cfg.models[name]
        self.pipeline = DiffusersPipeline(self.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        (chunk,) = table.to_pylist()
        return pa.Table.from_pylist(list(self.rows(chunk["shard"], chunk["ids"], chunk["texts"])), ROWS)

    def rows(self, shard: str, ids: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows of :data:`ROWS`. Batches are cut from the chunk's start, so that a second run makes the same ones."""
        seeds = [image_seed(self.cfg.seed, prompt_id, self.name) for prompt_id in ids]
        for start in range(0, len(ids), self.model.batch_size):
            now = range(start, min(start + self.model.batch_size, len(ids)))
            for row, made in zip(now, self.pipeline([texts[i] for i in now], [seeds[i] for i in now]), strict=True):
                place = {"shard": shard, "row": row, "last": row == len(ids) - 1, "caption": texts[row]}
                yield {**place, **self._finished(ids[row], seeds[row], made)}

    def _finished(self, prompt_id: str, seed: int, made: np.ndarray | str) -> dict[str, Any]:
        meta = {
            "prompt_id": prompt_id,
            "model": self.name,
            "pipeline": short_name(self.model.pipeline),
            "seed": seed,
            "num_inference_steps": self.model.num_inference_steps,
            "guidance_scale": self.model.guidance_scale,
        }
        image, verdict = None, made
        if not isinstance(made, str):
            meta |= {"width": made.shape[1], "height": made.shape[0]}
            image, verdict = encoded(made, self.cfg.format, self.cfg.quality), KEPT
        return {"key": image_key(prompt_id, self.name), "meta": json.dumps(meta), "image": image, "verdict": verdict}


def image_seed(seed: int, prompt_id: str, model: str) -> int:
    """An image's own seed, 63 bits: whatever other prompts and models there are, and whatever made it before."""
    digest = hashlib.sha256(f"{seed}\n{model}\n{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def image_key(prompt_id: str, model: str) -> str:
    """``PROMPT-MODEL``; what a tar's member cannot have in its name (dots, slashes) is written as in a URL."""
    return f"{quote(prompt_id, safe='').replace('.', '%2E')}-{model}"


def encoded(image: np.ndarray, file_format: str, quality: int) -> bytes:
    """File bytes of uint8 ``[H, W, 3]``."""
    buffer = io.BytesIO()
    options = {} if file_format == "png" else {"quality": quality}
    Image.fromarray(image).save(buffer, file_format.upper(), **options)
    return buffer.getvalue()


def chunks(cfg: SynthesizeConfig, prompts: Sequence[Prompt], name: str) -> dict[str, Sequence[Prompt]]:
    """What model ``name`` has to make, by the label of the shard that holds it."""
    step = cfg.prompts_per_shard
    starts = range(0, len(prompts), step)
    return {f"{name}-{number:06d}": prompts[start : start + step] for number, start in enumerate(starts)}


def synthesize_settings(cfg: SynthesizeConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must be equal for a run to go on; UserError for a model that makes no images of prompts."""
    settings = cfg.model_dump(mode="json", include={"seed", "format", "quality", "prompts_per_shard"})
    settings |= {"prompts_hash": prompts_hash(prompts), "models": sorted(cfg.models)}
    for name, model in cfg.models.items():
        about = model.model_dump(mode="json", exclude={"pipeline", "batch_size", "actors", "gpus_per_actor"})
        about |= {
            "precision": precision_of_actors(model.precision, model.gpus_per_actor),
            "weights": check_pipeline(model),
        }
        about |= {"pipeline": short_name(model.pipeline)}
        settings |= {f"models.{name}.{key}": value for key, value in about.items()}
    return settings


def run_synthesize(cfg: SynthesizeConfig) -> Ledger:
    """Make images into ``cfg.output``; returns the ledger that is also written there.

    UserError for prompts that hold none, models that are none, and an output that exists unasked or was made by other
    weights, prompts or settings.
    """
    models = {n: m.model_copy(update={"pipeline": located(m.pipeline)}) for n, m in cfg.models.items()}
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output), "models": models})
    prompts = read_prompts(cfg.prompts, count=cfg.count, seed=cfg.seed)
    asked = Provenance(role="prompts", kind="name", path=cfg.prompts, identity=prompts_hash(prompts))
    pipelines = [
        Provenance(role="diffusers pipeline", kind="name", path=model.pipeline) for model in cfg.models.values()
    ]
    with data_job(cfg, "synthesize", "shards", synthesize_settings(cfg, prompts), (asked, *pipelines)) as job:
        labels: list[str] = []
        for name, model in cfg.models.items():
            of_model = chunks(cfg, prompts, name)
            pool = Pool(model.actors and min(model.actors, len(of_model)), model.gpus_per_actor)
            sources = {label: partial(row_table, _chunk_row(label, chunk)) for label, chunk in of_model.items()}
            writer = PartWriter(cfg.output, ".tar", write_samples)
            job.write(sources, [Stage(partial(Synthesizer, cfg, name), pool)], writer, title=f"synthesize {name}")
            labels += of_model
        ledger = job.close(labels)
        job.require_kept(f"prompts {cfg.prompts}: no image came of them")
        return ledger


def _chunk_row(label: str, chunk: Sequence[Prompt]) -> dict[str, Any]:
    """A chunk as one row, which an actor makes whole: its batches are cut from its start alone."""
    return {"shard": label, "ids": [p.id for p in chunk], "texts": [p.text for p in chunk]}
