"""Part: training of the tokenizer's first and third stage."""

from __future__ import annotations

from ...data.formats.shards import write_webdataset
from ...data.scenes import scene_rows
from ...training.adversarial import AdversarialConfig
from ...training.losses import TokenizerLossConfig
from ...training.tokenizer import TokenizerConfig, TokenizerTask
from .rows import Bench
from .steps import WARMUP, TrainingSweep, train_config, trained


def images(bench: Bench, micro_batch: int) -> str:
    """Write as many images as the first steps need, which the measured ones then find decoded; returns their pattern."""
    folder, count = str(bench.folder / f"images-{micro_batch}"), WARMUP * micro_batch
    largest = max(*bench.cfg.image_sizes, bench.cfg.bit.image_size)
    list(write_webdataset(scene_rows(count, 0, largest), folder, count))
    return f"{folder}/*.tar"


def measure_tokenizer(bench: Bench) -> None:
    """Measure training steps of the first stage, and of the third one, which is adversarial, at each output size.

    FLOP are the tokenizer's; the networks of the losses aren't counted.
    """
    cfg = bench.cfg
    note = "without the FLOP of the losses' networks"
    first, third = cfg.tokenizer_micro_batches
    loss = TokenizerLossConfig(perceptual=cfg.perceptual)
    run = TokenizerConfig(model=cfg.bit, data=images(bench, first), loss=loss, train=train_config(bench, first))
    what = f"tokenizer, stage 1, {cfg.bit.image_size} px, micro-batch {first}"
    TrainingSweep(bench).row(what, run, lambda: trained(bench, TokenizerTask(run), run.train), note=note)
    sweep, data = TrainingSweep(bench), images(bench, third)
    for size in cfg.image_sizes:
        adversarial = AdversarialConfig(discriminator=cfg.discriminator, start_step=1)
        late = TokenizerConfig(
            model=cfg.bit,
            data=data,
            loss=loss,
            train=train_config(bench, third),
            output_sizes=(size,),
            freeze_encoder=True,
            adversarial=adversarial,
        )
        what = f"tokenizer, stage 3, {size} px, micro-batch {third}"
        sweep.row(what, late, lambda late=late: trained(bench, TokenizerTask(late), late.train), note=note)  # type: ignore[misc]
