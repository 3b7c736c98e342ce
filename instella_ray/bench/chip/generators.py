"""Parts: training of generators by micro-batch, compiled, and sharded at one rank; and the whole training loop."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import torch

from ...accelerator import compute_dtype
from ...data.formats.codes import CodesManifest
from ...models import rng
from ...models.bit import BIT
from ...models.checkpoint import save_model, weight_hash
from ...models.generator import DiffusionGenerator
from ...models.text_encoder import TextFeatureCache
from ...training.generator import GeneratorRunConfig, GeneratorTask
from ...training.generator_loss import DiffusionLoss
from ...training.learner import Learner, ZeroLearner
from ...training.trainer import LEARNERS
from ..data import write_codes
from ..training import CODES, IMAGES, TrainingRuns, checkpoint_row, loop_rows, source_rows
from ..training_settings import TrainingBench
from .rows import Bench, ChipRow
from .steps import WARMUP, TrainingSteps, TrainingSweep, timed_steps, train_config, trained


class GeneratorRuns:
    """Diffusion generator, frozen text encoder and packed codes; every measurement begins with new weights."""

    def __init__(self, bench: Bench, largest: int) -> None:
        """Write codes, enough that no caption comes twice up to the micro-batch ``largest``; load the text encoder."""
        self.bench = bench
        cfg, folder = bench.cfg, bench.folder
        torch.manual_seed(0)
        with bench.device:
            bit = BIT(cfg.bit)
        (folder / "bit").mkdir()
        save_model(folder / "bit", bit)
        sizes = {"num_tokens": cfg.bit.num_tokens, "bits_per_token": cfg.bit.bits_per_token}
        manifest = CodesManifest(tokenizer_hash=weight_hash(bit), **sizes, rows=0, files=())
        (folder / "codes").mkdir()
        words = " ".join(["1"] * (cfg.text_length - 1))
        write_codes(
            folder / "codes",
            [f"{number} {words}" for number in range(largest * (WARMUP + cfg.training_steps))],
            manifest,
        )
        self.text = cfg.text.saved(folder / "text", bench.device)
        self.task = GeneratorTask(self.run(1), bench.device, self._model())

    def run(self, micro_batch: int, *, checkpointing: bool = False, compiled: bool = False) -> GeneratorRunConfig:
        """Return the configuration of a run."""
        return GeneratorRunConfig(
            model=self.bench.cfg.generator("diffusion"),
            codes=str(self.bench.folder / "codes"),
            tokenizer=str(self.bench.folder / "bit"),
            text_encoder=self.text,
            short_caption_probability=0.0,
            caption_drop_probability=0.0,
            gradient_checkpointing=checkpointing,
            train=train_config(self.bench, micro_batch, compiled=compiled),
        )

    def renew(self, *, checkpointing: bool = False) -> DiffusionGenerator:
        """Give the task a new model, and an empty cache of text features; returns the model."""
        model = self._model()
        model.gradient_checkpointing = checkpointing
        self.task.model, self.task.step_module = model, DiffusionLoss(model)
        self.task.text = TextFeatureCache(self.task.text.encoder)
        return model

    def _model(self) -> DiffusionGenerator:
        with self.bench.device:  # where the random weights of a large one take less time
            return DiffusionGenerator(self.bench.cfg.generator("diffusion"))

    def row(
        self, sweep: TrainingSweep, micro_batch: int, *, checkpointing: bool = False, compiled: bool = False
    ) -> None:
        """Add a row to ``sweep``."""
        run = self.run(micro_batch, checkpointing=checkpointing, compiled=compiled)

        def measure() -> TrainingSteps:
            self.renew(checkpointing=checkpointing)
            return trained(self.bench, self.task, run.train)

        names = [f"micro-batch {micro_batch}", *["checkpointing"] * checkpointing, *["compiled"] * compiled]
        sweep.row("diffusion, " + ", ".join(names), run, measure, aims=compiled and not checkpointing)


def measure_training(bench: Bench) -> None:
    """Measure training steps of a diffusion generator by micro-batch, with and without gradient checkpointing."""
    cfg = bench.cfg
    runs = GeneratorRuns(bench, max(*cfg.micro_batches, *cfg.checkpointed_micro_batches))
    sweep = TrainingSweep(bench, smallest_first=True)
    for size in cfg.micro_batches:
        runs.row(sweep, size)
    for size in cfg.checkpointed_micro_batches:
        runs.row(sweep, size, checkpointing=True)


def measure_compiled_training(bench: Bench) -> None:
    """Measure training steps with ``train.compile``, and without, at the same micro-batch."""
    runs = GeneratorRuns(bench, bench.cfg.micro_batch)
    sweep = TrainingSweep(bench)
    for checkpointing in (False, True):
        for compiled in (False, True):
            runs.row(sweep, bench.cfg.micro_batch, checkpointing=checkpointing, compiled=compiled)


def measure_sharding(bench: Bench) -> None:
    """Measure the same step with each learner at one rank, where there is nothing to share: what sharding costs."""
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed requires
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    size = bench.cfg.micro_batch
    runs = GeneratorRuns(bench, size)
    sweep, run = TrainingSweep(bench), runs.run(size)
    for name, learner in LEARNERS.items():
        what = f"diffusion, {name}, micro-batch {size}"
        if learner is ZeroLearner and importlib.util.find_spec("deepspeed") is None:
            bench.emit(ChipRow(what, note="not measured: DeepSpeed is not installed"))
            continue

        def measure(learner: type[Learner] = learner) -> TrainingSteps:
            return _learned(bench, runs, learner)

        sweep.row(what, run, measure, note="captions cached, no EMA")
    torch.distributed.destroy_process_group()


def _learned(bench: Bench, runs: GeneratorRuns, kind: type[Learner]) -> TrainingSteps:
    """Train with one kind of learner, without the trainer, which shards nothing at one rank."""
    task, train, model = runs.task, runs.run(bench.cfg.micro_batch).train, runs.renew()
    dtype = compute_dtype(bench.device, train.precision)
    parameters = sum(p.numel() for p in model.parameters())
    learner = kind(task.step_module, model, train.optimizer, bench.device, dtype)
    batch = task.data.batch(0, np.arange(train.global_batch))

    def steps() -> Iterator[float]:
        for step in range(train.steps):
            seeds = rng.sample_seeds(train.seed, step, torch.arange(train.global_batch))
            (inputs,) = task.micro_batches(batch, train.global_batch, seeds)
            learner.backward(inputs, 1, True)
            learner.update(step, train.steps)
            yield task.flops([inputs])

    return timed_steps(bench, steps(), parameters)


def measure_loop(bench: Bench) -> None:
    """Measure the training suite at full size: against a bare loop, a step's phases, codes and images, a checkpoint."""
    cfg = bench.cfg
    suite = TrainingBench(
        width=cfg.width,
        heads=cfg.heads,
        text=None,
        random_text=cfg.text,
        tokenizer=cfg.bit,
        caption_words=cfg.text_length,
        global_batch=cfg.micro_batch,
        micro_batch_size=cfg.micro_batch,
        steps_a_round=cfg.loop_steps,
        turns=1,
        gpu=bench.device.type == "cuda",
        ray=False,
    )
    runs = TrainingRuns(suite, bench.folder, cfg.threads, cfg.repeats)
    for source in (CODES, IMAGES):
        measured = [runs.measured(source)]
        rows = source_rows(suite, source, measured)
        if source == CODES:
            rows = [*loop_rows(suite, measured)[0], *rows, checkpoint_row(measured)]
        for row in rows:
            figures = (f"{name} {value}" for name, value in row.items() if name != "what")
            bench.emit(ChipRow(str(row["what"]).strip(), note=", ".join(figures)))
