"""Training suite: throughput relative to a bare loop, time per phase of a step, and packed codes against raw images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from .. import storage
from ..data.formats.codes import CodesManifest
from ..data.formats.shards import Sample, write_webdataset
from ..data.scenes import scene_rows
from ..models.bit import BIT
from ..models.checkpoint import build_model, save_model, weight_hash
from ..models.generator import GeneratorConfig
from ..rendering import Cell, Goal
from ..training.generator import GeneratorRunConfig, complete_config
from ..training.launch import launch
from ..training.settings import TrainConfig, WorkersConfig
from .data import write_codes
from .measure import Spread, ratio
from .report import SuiteResult
from .training_settings import TrainingBench
from .training_tasks import (
    BACKWARD,
    BARE,
    CHECKPOINT,
    DATA,
    FORWARD,
    OPTIMIZER,
    OURS,
    REPORT,
    RESULT,
    SAVED,
    TEXT,
    TOKENIZER,
    MeasuredTask,
    Turns,
)

GOAL = 1.05
"""Largest ratio of seconds per step of this loop to those of the bare loop."""
CODES, IMAGES = "codes", "images"


def run_training(cfg: TrainingBench, repeats: int, threads: int) -> SuiteResult:
    """Measure both loops, a step's phases, and both kinds of data."""
    found: dict[str, list[dict[str, Any]]] = {CODES: [], IMAGES: []}
    with tempfile.TemporaryDirectory() as name:
        runs = TrainingRuns(cfg, Path(name), threads, repeats)
        for _ in range(cfg.turns):
            for source, measured in found.items():
                measured.append(runs.measured(source))
    rows, goal = loop_rows(cfg, found[CODES])
    for source, measured in found.items():
        rows += source_rows(cfg, source, measured)
    rows.append(checkpoint_row([run for measured in found.values() for run in measured]))
    times = {source: [step["all"] for run in measured for step in run["steps"]] for source, measured in found.items()}
    slower = Spread.of(times[IMAGES]).median / Spread.of(times[CODES]).median
    rows.append({"what": "images / codes, seconds a step", "ratio": f"{slower:.3f}"})
    about = {**cfg.model_dump(mode="json"), "weights": runs.weights, "threads": threads, "repeats": repeats}
    return SuiteResult("Training", about, rows, [goal])


def loop_rows(cfg: TrainingBench, runs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Cell]], Goal]:
    """Return the rows of this loop and of the bare one, and their goal, from runs with codes."""
    ours, bare = ([seconds for run in runs for seconds in run[who]] for who in (OURS, BARE))
    images = cfg.global_batch * cfg.steps_a_round
    rates = {who: Spread.of([images / seconds for seconds in times]) for who, times in ((OURS, ours), (BARE, bare))}
    flop, peak = (runs[0][name] for name in ("flop", "peak"))
    flops = rates[OURS].median * flop
    more = ratio(ours, bare)
    rows: list[dict[str, Cell]] = [
        {"what": "this loop", "images/s": rates[OURS].text(), "GFLOP/s": round(flops / 1e9, 1)},
        {"what": "bare loop", "images/s": rates[BARE].text()},
        {"what": "this loop / bare loop, seconds a step", "ratio": more.text(digits=3)},
    ]
    if peak:
        rows[0]["MFU"] = round(flops / peak, 4)
    return rows, Goal("this loop against a bare one, seconds a step", more.median, GOAL, "<=")


def source_rows(cfg: TrainingBench, source: str, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    """Return the rows of the timed steps from one kind of data, and of their phases."""
    steps = [step for run in runs for step in run["steps"]]
    rate = Spread.of([cfg.global_batch / step["all"] for step in steps])
    memory = max(run["memory"] for run in runs) / 1e9
    row: dict[str, Cell] = {"what": f"from {source}, timed", "images/s": rate.text(), "memory GB": round(memory, 2)}
    return [row, *_split(source, steps)]


def checkpoint_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    """Return the row of the seconds that writing a checkpoint took."""
    return {"what": CHECKPOINT, "ms": Spread.of([run["saved"] for run in runs]).text(1000, 0)}


def _split(source: str, steps: Sequence[Mapping[str, float]]) -> list[dict[str, Cell]]:
    """Create a row per phase, with milliseconds and share of a step."""
    rows: list[dict[str, Cell]] = []
    for phase in (DATA, TEXT, TOKENIZER, FORWARD, BACKWARD, OPTIMIZER, REPORT, "all else"):
        seconds = [_seconds(step, phase) for step in steps]
        if any(seconds):
            share = sum(seconds) / sum(step["all"] for step in steps)
            row: dict[str, Cell] = {"what": f"  {source}: {phase}", "ms": Spread.of(seconds).text(1000, 1)}
            rows.append(row | {"share of a step": f"{share:.1%}"})
    return rows


def _seconds(step: Mapping[str, float], phase: str) -> float:
    if phase == "all else":
        return step["all"] - sum(value for name, value in step.items() if name not in ("all", FORWARD))
    inner = step[FORWARD] if phase == BACKWARD else 0.0  # the timed backward call includes the forward pass
    return step.get(phase, 0.0) - inner


class TrainingRuns:
    """Training runs of one model with shared data in one folder."""

    def __init__(self, cfg: TrainingBench, folder: Path, threads: int, repeats: int) -> None:
        """Write models and data; ``repeats``: measured rounds of a run."""
        self.cfg, self.folder, self.threads, self.repeats = cfg, folder, threads, repeats
        self.timed = repeats * cfg.steps_a_round
        # Enough that no run repeats a sample, whose text features would be cached.
        samples = cfg.global_batch * ((1 + repeats) * cfg.steps_a_round + self.timed + 1)
        # Where a worker of Ray trains, this process takes no memory of its GPU.
        device = torch.device("cuda" if cfg.gpu and not cfg.ray else "cpu")
        self.text = cfg.text or cfg.random_text.saved(folder / "text", device)  # type: ignore[union-attr]
        torch.manual_seed(0)
        bit = BIT(cfg.tokenizer)
        (folder / "bit").mkdir()
        save_model(folder / "bit", bit)
        captions: list[str] = []
        list(write_webdataset(self._samples(samples, captions), str(folder / IMAGES), 1000))
        shape = {"num_tokens": cfg.tokenizer.num_tokens, "bits_per_token": cfg.tokenizer.bits_per_token}
        manifest = CodesManifest(tokenizer_hash=weight_hash(bit), **shape, rows=0, files=())
        write_codes(folder / CODES, captions, manifest)
        self.count = 0
        sizes = self._config(CODES, 1).model.model_dump()
        with torch.device("meta"):
            self.weights = sum(p.numel() for p in build_model(sizes).parameters())

    def _samples(self, count: int, captions: list[str]) -> Iterator[Sample]:
        """Yield scene images with unique captions, which are appended to ``captions``."""
        for number, (key, image, caption, _) in enumerate(scene_rows(count, 0, self.cfg.tokenizer.image_size)):
            words = islice(cycle(caption.split()), max(0, self.cfg.caption_words - 2))
            captions.append(" ".join(["number", str(number), *words]))
            yield key, image, captions[-1], {}

    def measured(self, source: str) -> dict[str, Any]:
        """Run training, delete its directory, and return the measurements; from codes in turns with the bare loop."""
        self.count += 1
        turns = Turns(self.cfg.steps_a_round, self.repeats if source == CODES else 0)
        cfg = self._config(source, turns.steps + self.timed + 1)
        launch(cfg, lambda device: MeasuredTask(cfg, device, turns), description=f"training from {source}")
        result, saved = (storage.read_json(storage.join(cfg.train.run_dir, name)) for name in (RESULT, SAVED))
        storage.remove_tree(cfg.train.run_dir)
        return {**result, "saved": saved}

    def _config(self, source: str, steps: int) -> GeneratorRunConfig:
        cfg, folder = self.cfg, self.folder
        data = {CODES: {"codes": str(folder / CODES)}, IMAGES: {"images": str(folder / IMAGES)}}[source]
        run = GeneratorRunConfig(
            model=GeneratorConfig(width=cfg.width, heads=cfg.heads),
            tokenizer=str(folder / "bit"),
            text_encoder=self.text,
            short_caption_probability=0.0,
            caption_drop_probability=0.0,
            train=TrainConfig(
                run_dir=str(folder / f"run{self.count}"),
                steps=steps,
                global_batch=cfg.global_batch,
                micro_batch_size=cfg.micro_batch_size,
                log_every=1,
                checkpoint_every=steps,
                preview_every=steps,
                workers=WorkersConfig(count=int(cfg.ray), threads=self.threads, gpu=cfg.gpu, max_failures=0),
            ),
            **data,
        )
        return complete_config(run)
