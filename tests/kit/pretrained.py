"""A pipeline that takes every image for unsafe."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from instella_ray.demo.stand_ins import save_stable_diffusion


def save_prudish_stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion 1 whose safety checker takes every image for unsafe."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **sizes)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-1)
    reader = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save_stable_diffusion(folder, checker, reader)
