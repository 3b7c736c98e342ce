"""Text-to-image pipeline of Diffusers: one image per prompt, with one seed per image. No Ray."""

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
from .pretrained import loading, weights_identity

ARGUMENTS = ("prompt", "num_inference_steps", "guidance_scale", "height", "width", "generator", "output_type")
"""Arguments that a pipeline must accept."""


class PipelineConfig(Config):
    """Configuration of one pipeline."""

    pipeline: str
    """Hub name or local folder; weights are read only from safetensors."""
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    height: int | None = Field(None, ge=8, multiple_of=8)
    """Height (px); null: the default of the pipeline, as for ``width``."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    max_sequence_length: int | None = Field(None, ge=1)
    """Maximum number of prompt tokens for a T5 encoder; null: the default of the pipeline."""
    precision: Precision = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    batch_size: int = Field(4, ge=1)
    """Images per pipeline call; does not change the images, except by rounding."""
    actors: int | None = Field(None, ge=1)
    """Actors that run the pipeline; null: one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs per actor, fractions allowed; 0: run on the CPU."""


class DiffusersPipeline:
    """Loaded pipeline; UserError if ``cfg`` does not name one."""

    def __init__(self, cfg: PipelineConfig) -> None:
        diffusers = _diffusers()
        # Otherwise Diffusers logs a line for each of the many prompts that exceed CLIP's maximum length.
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        device = pick_device("auto" if cfg.gpus_per_actor else "cpu")
        dtype = compute_dtype(device, precision_of_actors(cfg.precision, cfg.gpus_per_actor))
        with loading("pipeline", cfg.pipeline):
            pipe = diffusers.DiffusionPipeline.from_pretrained(cfg.pipeline, torch_dtype=dtype, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        self.cfg, self.pipe = cfg, pipe.to(device)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | str]:
        """Generate uint8 ``[H, W, 3]`` for each prompt, or a verdict if the image is unusable (:func:`checked`).

        Noise is drawn on the CPU from one generator per image, so that an image is the same, up to rounding, on any
        device and in any batch.
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
    """Convert float ``[H, W, 3]`` in [0, 1] to uint8; a verdict instead if flagged as unsafe, not finite or blank."""
    if flagged:
        return "dropped:flagged"
    if not np.isfinite(pixels).all():
        return "quarantined:not_finite"
    image: np.ndarray = (pixels * 255).round().astype(np.uint8)
    return image if image.min() < image.max() else "quarantined:blank"


def check_pipeline(cfg: PipelineConfig) -> str:
    """Return the hash of a pipeline's weights without loading it; UserError if it is not a text-to-image pipeline."""
    diffusers, name = _diffusers(), cfg.pipeline
    with loading("pipeline", name):
        class_name = diffusers.DiffusionPipeline.load_config(name).get("_class_name")
        kind = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if kind is None:
        raise UserError(
            f"pipeline '{name}': is a {class_name}, expected a pipeline of Diffusers, because no other code is run"
        )
    takes = inspect.signature(kind.__call__).parameters
    if "image" in takes or not takes.keys() >= {*ARGUMENTS}:
        raise UserError(f"pipeline '{name}': a {class_name}, expected a text-to-image pipeline")
    if cfg.max_sequence_length is not None and "max_sequence_length" not in takes:
        raise UserError(f"pipeline '{name}': a {class_name} has no max_sequence_length, expected none to be set")
    return weights_identity("pipeline", name, "model_index.json")


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise UserError("models: diffusers is not installed (pip install 'instella-ray[synthesize]')") from None
    return diffusers
