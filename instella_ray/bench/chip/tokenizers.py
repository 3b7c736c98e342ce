"""Part: training of the tokenizer's first and third stage."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ...data.formats.shards import write_webdataset
from ...data.scenes import scene_rows
from ...training.adversarial import AdversarialConfig
from ...training.losses import TokenizerLossConfig
from ...training.tokenizer import TokenizerConfig, TokenizerTask
from .rows import Bench
from .steps import TrainingSweep, train_config, trained

IMAGES = 64
"""Different images: all are decoded, and cached, before the measured steps."""


def measure_tokenizer(bench: Bench) -> None:
    """Measure training steps of the first stage, and of the third one, which is adversarial, at each output size.

    FLOP are the tokenizer's; the networks of the losses aren't counted.
    """
    cfg = bench.cfg
    note = "without the FLOP of the losses' networks"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        list(write_webdataset(scene_rows(IMAGES, 0, max(*cfg.image_sizes, cfg.bit.image_size)), name, IMAGES))
        first, third = cfg.tokenizer_micro_batches
        shared = {"model": cfg.bit, "data": f"{name}/*.tar", "loss": TokenizerLossConfig(perceptual=cfg.perceptual)}
        run = TokenizerConfig(**shared, train=train_config(bench, folder, first))
        what = f"tokenizer, stage 1, {cfg.bit.image_size} px, micro-batch {first}"
        TrainingSweep(bench).row(what, run, lambda: trained(bench, TokenizerTask(run), run.train), note=note)
        sweep = TrainingSweep(bench)
        for size in cfg.image_sizes:
            adversarial = AdversarialConfig(discriminator=cfg.discriminator, start_step=1)
            late = TokenizerConfig(
                **shared,
                train=train_config(bench, folder, third),
                output_sizes=(size,),
                freeze_encoder=True,
                adversarial=adversarial,
            )
            what = f"tokenizer, stage 3, {size} px, micro-batch {third}"
            sweep.row(what, late, lambda late=late: trained(bench, TokenizerTask(late), late.train), note=note)  # type: ignore[misc]
