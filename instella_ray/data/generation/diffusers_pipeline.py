"""A text-to-image pipeline of Diffusers that makes one image a prompt, each from a seed of its own. No Ray."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ...accelerator import Precision, compute_dtype, pick_device, precision_of_actors
from ...config import Config
from ...errors import UserError
from .pretrained import fingerprint, loading

ARGUMENTS = ("prompt", "num_inference_steps", "guidance_scale", "height", "width", "generator", "output_type")
"""What a pipeline must take."""


class PipelineConfig(Config):
    """One pipeline and how it is used."""

    pipeline: str
    """Hub name, or local folder; weights are read from safetensors alone."""
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    height: int | None = Field(None, ge=8, multiple_of=8)
    """Px; none means the pipeline's own."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    max_sequence_length: int | None = Field(None, ge=1)
    """Tokens of a prompt that a T5 encoder reads; none means the pipeline's own."""
    precision: Precision = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    batch_size: int = Field(4, ge=1)
    """Images made together; another number changes them by rounding alone."""
    actors: int | None = Field(None, ge=1)
    """None means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 computes on the CPU."""


class DiffusersPipeline:
    """A loaded pipeline; UserError where ``cfg`` names none."""

    def __init__(self, cfg: PipelineConfig) -> None:
        diffusers = _diffusers()
        # Thousands of prompts are longer than CLIP reads; a line for each says nothing.
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        device = pick_device("auto" if cfg.gpus_per_actor else "cpu")
        dtype = compute_dtype(device, precision_of_actors(cfg.precision, cfg.gpus_per_actor))
        with loading("pipeline", cfg.pipeline):
            pipe = diffusers.DiffusionPipeline.from_pretrained(cfg.pipeline, torch_dtype=dtype, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        self.cfg, self.pipe = cfg, pipe.to(device)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | str]:
        """uint8 ``[H, W, 3]`` for each prompt, or a verdict on what came out in its place.

        Noise is drawn on the CPU, from a generator an image: an image is the same on any device, whatever else is
        made with it, up to rounding.
        """
        cfg = self.cfg
        chosen = {"height": cfg.height, "width": cfg.width, "max_sequence_length": cfg.max_sequence_length}
        made = self.pipe(
            prompt=list(prompts),
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **{name: value for name, value in chosen.items() if value is not None},
        )
        flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(prompts)
        return [checked(pixels, bool(flag)) for pixels, flag in zip(made.images, flagged, strict=True)]


def checked(pixels: np.ndarray, flagged: bool) -> np.ndarray | str:
    """Float ``[H, W, 3]`` in [0, 1] as uint8; or a verdict: flagged by the pipeline's own safety checker, or broken."""
    if flagged:
        return "dropped:flagged"
    if not np.isfinite(pixels).all():
        return "quarantined:not_finite"
    image: np.ndarray = (pixels * 255).round().astype(np.uint8)
    return image if image.min() < image.max() else "quarantined:blank"


def check_pipeline(cfg: PipelineConfig) -> str:
    """The fingerprint of a pipeline that is not loaded yet; UserError where ``cfg`` names none that makes images."""
    diffusers, name = _diffusers(), cfg.pipeline
    with loading("pipeline", name):
        class_name = diffusers.DiffusionPipeline.load_config(name).get("_class_name")
        kind = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if kind is None:
        raise UserError(
            f"pipeline '{name}': is a {class_name}, expected a pipeline of Diffusers; other code is not run"
        )
    takes = inspect.signature(kind.__call__).parameters
    if "image" in takes or not takes.keys() >= {*ARGUMENTS}:
        raise UserError(f"pipeline '{name}': a {class_name}, expected one that makes images of prompts alone")
    if cfg.max_sequence_length is not None and "max_sequence_length" not in takes:
        raise UserError(f"pipeline '{name}': a {class_name} has no max_sequence_length, expected none to be set")
    return fingerprint("pipeline", name, "model_index.json")


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise UserError("models: diffusers is not installed (pip install 'instella-ray[synthesize]')") from None
    return diffusers
