"""Synthesize job: generates an image of every prompt by every model, as captioned WebDataset tars."""

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
from ...config import OutputPath
from ...runs import Provenance
from ..formats.parts import KEPT, Ledger, PartWriter
from ..formats.rows import SCHEMA
from ..formats.shards import write_samples
from ..job import DataJobConfig, data_job
from ..prompts import Prompt, PromptFile, prompts_hash, read_prompts
from ..stages import Pool, Stage, row_table
from .diffusers_pipeline import DiffusersPipeline, PipelineConfig, check_pipeline
from .pretrained import located, short_name

ROWS = SCHEMA.append(pa.field("verdict", pa.string()))
# Keys are PROMPT-MODEL: model names without dashes keep them unique and splittable.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class SynthesizeConfig(DataJobConfig):
    """Configuration of the synthesize job: prompts, models and image format."""

    prompts: PromptFile
    """Prompts: a .txt, .jsonl, .parquet (DiffusionDB) or (COCO) .json file, or ``scenes`` for those of the scenes dataset."""
    output: OutputPath
    """Output folder of the tars, ``quarantine/`` and ``ledger.json``."""
    models: dict[ModelName, PipelineConfig] = Field(min_length=1)
    """Pipelines by their name in keys and metadata; they run one after another."""
    distinct: bool = False
    """Take each text once, of files such as DiffusionDB's, which have a row for each of a prompt's images."""
    count: int | None = Field(None, ge=1)
    """Number of prompts to draw; null: all."""
    seed: int = Field(0, ge=0)
    """Seed of the draw of prompts, and of the seeds of the images."""
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    """Format of the image files."""
    quality: int = Field(95, ge=1, le=100)
    """Quality of JPEG and WebP files."""
    prompts_per_shard: int = Field(256, ge=1)
    """Prompts per tar, which is the work to redo if an actor dies."""


class Synthesizer:
    """Actor that runs one pipeline, and generates the images of a chunk of prompts."""

    def __init__(self, cfg: SynthesizeConfig, name: str) -> None:
        self.cfg, self.name, self.model = cfg, name, cfg.models[name]
        self.pipeline = DiffusersPipeline(self.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        (chunk,) = table.to_pylist()
        return pa.Table.from_pylist(list(self.rows(chunk["shard"], chunk["ids"], chunk["texts"])), ROWS)

    def rows(self, shard: str, ids: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield rows of :data:`ROWS`. Batches start at the start of the chunk, so that a repeated run has the same ones."""
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
    """Return the seed of an image (63 bits), which does not depend on other prompts and models."""
    digest = hashlib.sha256(f"{seed}\n{model}\n{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def image_key(prompt_id: str, model: str) -> str:
    """Return the key ``PROMPT-MODEL``, with characters that keys of tars cannot have (dots, slashes) percent-encoded."""
    return f"{quote(prompt_id, safe='').replace('.', '%2E')}-{model}"


def encoded(image: np.ndarray, file_format: str, quality: int) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as the bytes of an image file."""
    buffer = io.BytesIO()
    options = {} if file_format == "png" else {"quality": quality}
    Image.fromarray(image).save(buffer, file_format.upper(), **options)
    return buffer.getvalue()


def chunks(cfg: SynthesizeConfig, prompts: Sequence[Prompt], name: str) -> dict[str, Sequence[Prompt]]:
    """Split the prompts for model ``name`` into shards: label -> prompts."""
    step = cfg.prompts_per_shard
    starts = range(0, len(prompts), step)
    return {f"{name}-{number:06d}": prompts[start : start + step] for number, start in enumerate(starts)}


def synthesize_settings(cfg: SynthesizeConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the settings that a resumed run must share; UserError if a model is not a text-to-image pipeline."""
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
    """Generate images into ``cfg.output``; returns the ledger, which is also written there.

    Raises UserError if there are no prompts, a model is not a text-to-image pipeline, the output exists and ``cfg.mode``
    does not allow it, or it was made with other weights, prompts or settings.
    """
    models = {n: m.model_copy(update={"pipeline": located(m.pipeline)}) for n, m in cfg.models.items()}
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output), "models": models})
    prompts = read_prompts(cfg.prompts, count=cfg.count, seed=cfg.seed, distinct=cfg.distinct)
    prompt_set = Provenance(role="prompts", kind="name", path=cfg.prompts, identity=prompts_hash(prompts))
    pipelines = [
        Provenance(role="diffusers pipeline", kind="name", path=model.pipeline) for model in cfg.models.values()
    ]
    with data_job(cfg, "synthesize", "shards", synthesize_settings(cfg, prompts), (prompt_set, *pipelines)) as job:
        labels: list[str] = []
        for name, model in cfg.models.items():
            of_model = chunks(cfg, prompts, name)
            pool = Pool(model.actors and min(model.actors, len(of_model)), model.gpus_per_actor)
            sources = {label: partial(row_table, _chunk_row(label, chunk)) for label, chunk in of_model.items()}
            writer = PartWriter(cfg.output, ".tar", write_samples)
            job.write(sources, [Stage(partial(Synthesizer, cfg, name), pool)], writer, title=f"synthesize {name}")
            labels += of_model
        ledger = job.close(labels)
        job.require_kept(f"prompts {cfg.prompts}: no image was kept")
        return ledger


def _chunk_row(label: str, chunk: Sequence[Prompt]) -> dict[str, Any]:
    """Return a chunk as one row, so that one actor processes it and its batches are always the same."""
    return {"shard": label, "ids": [p.id for p in chunk], "texts": [p.text for p in chunk]}
