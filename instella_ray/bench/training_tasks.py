"""Instrumented training task: alternates with a bare loop, and times the phases of a step."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from .. import storage
from ..accelerator import compute_dtype
from ..data.loading.loader import CodesBatch, Prefetcher
from ..data.loading.order import BatchPlan
from ..models.diffusion import flip_noise, timesteps, x0_logits
from ..models.generator import DiffusionGenerator
from ..models.text_encoder import TextFeatureCache
from ..training.generator import GeneratorRunConfig, GeneratorTask
from ..training.generator_loss import DiffusionLoss
from ..training.learner import Learner
from ..training.metrics_log import MetricsLog, bf16_peak, peak_memory
from ..training.online import OnlineEncoder
from ..training.optim import EMA
from ..training.trainer import Trainer

OURS, BARE = "ours", "bare"
DATA, TEXT, TOKENIZER, FORWARD, BACKWARD, OPTIMIZER, REPORT = (
    *("waiting for data", "text encoder", "tokenizer", "forward", "backward", "optimizer and EMA", "logging"),
)
CHECKPOINT = "writing a checkpoint"
RESULT, SAVED = "measured.json", "checkpoint.json"
"""Files in the run directory: measurements up to the last step, and seconds of the checkpoint after it."""
PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    TEXT: ((TextFeatureCache, "encode"),),
    TOKENIZER: ((OnlineEncoder, "encode"),),
    FORWARD: ((DiffusionLoss, "forward"),),
    BACKWARD: ((Learner, "backward"),),
    OPTIMIZER: ((Learner, "update"), (EMA, "update")),
    REPORT: ((MetricsLog, "step"),),
    CHECKPOINT: ((Trainer, "save"),),
}
"""Timed functions by phase. :data:`BACKWARD` includes the forward pass, which is subtracted in the report."""


class Turns(NamedTuple):
    """Alternation of the bare loop and this one: a warm-up round and ``rounds`` measured rounds of ``each`` steps."""

    each: int
    rounds: int
    """Measured rounds; 0 disables the bare loop."""

    @property
    def steps(self) -> int:
        """Number of this loop's steps, including the warm-up."""
        return (1 + self.rounds) * self.each


def now(device: torch.device) -> float:
    """Return the time in seconds after all work on ``device`` has completed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class MeasuredTask(GeneratorTask):
    """Generator task that alternates with a bare loop, if ``turns`` has rounds, and then times the phases of each step.

    The measurements are written to :data:`RESULT` at the run's last step, which is not measured. The functions of
    :data:`PHASES` are patched for the lifetime of the process, which runs nothing but such tasks, one after the other; the
    latest one times them. The GPU is synchronized only while they are timed.
    """

    def __init__(self, cfg: GeneratorRunConfig, device: torch.device, turns: Turns) -> None:
        super().__init__(cfg, device)
        self.device, self.turns = device, turns
        self.bare: BareLoop | None = None
        self.rounds: dict[str, list[float]] = {OURS: [], BARE: []}
        self.steps: list[dict[str, float]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.timing, self.since, self.work = False, 0.0, 0.0
        for phase, functions in PHASES.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(phase, _original(getattr(owner, name))))
        Prefetcher.__iter__ = self._waiting(_original(Prefetcher.__iter__))  # type: ignore[method-assign]

    def flops(self, parts: list[dict[str, Any]]) -> float:
        self.work = super().flops(parts)
        return self.work

    def before_step(self, step: int) -> None:
        ended = now(self.device)
        if step > self.turns.steps:
            self.steps.append({**self.seconds, "all": ended - self.since})
        elif self.turns.rounds and step % self.turns.each == 0:
            self._take_turns(step, ended)
        train = self.cfg.train
        if step + 1 == train.steps:
            peak = bf16_peak(self.device, train.precision)
            facts = {"flop": self.work / train.global_batch, "peak": peak, "memory": peak_memory(self.device)}
            storage.write_json(storage.join(train.run_dir, RESULT), {**self.rounds, "steps": self.steps, **facts})
        self.timing = step >= self.turns.steps
        if self.timing or step % self.turns.each == 0:
            self.seconds.clear()
            self.since = now(self.device)

    def _take_turns(self, step: int, ended: float) -> None:
        """Record this loop's round, except the warm-up, and run a round of the bare loop."""
        if self.bare is None:
            self.bare = BareLoop(self)
        elif step > self.turns.each:
            self.rounds[OURS].append(ended - self.since)
        if step == self.turns.steps:
            self.bare = None  # free its memory before the timed steps
            return
        batches = self.bare.batches(range(step, step + self.turns.each))
        began = now(self.device)
        for batch in batches:
            self.bare.step(batch)
        if step:
            self.rounds[BARE].append(now(self.device) - began)

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if not self.timing:
                return function(*given, **named)
            began = now(self.device)
            try:
                return function(*given, **named)
            finally:
                self.seconds[phase] += now(self.device) - began
                if phase == CHECKPOINT:
                    storage.write_json(storage.join(self.cfg.train.run_dir, SAVED), self.seconds[phase])

        return _patch(function, run)

    def _waiting(self, iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def run(batches: Any) -> Iterator[Any]:
            source = iterate(batches)
            while True:
                began = time.perf_counter()
                try:
                    item = next(source)
                except StopIteration:
                    return
                self.seconds[DATA] += time.perf_counter() - began
                yield item

        return _patch(iterate, run)


Patched = TypeVar("Patched", bound=Callable[..., Any])


def _patch(original: Patched, replacement: Callable[..., Any]) -> Patched:
    """Return ``replacement``, from which :func:`_original` returns ``original``."""
    replacement.original = original  # type: ignore[attr-defined]
    return cast(Patched, replacement)


def _original(function: Patched) -> Patched:
    return cast(Patched, getattr(function, "original", function))


class BareLoop:
    """Minimal training loop (forward, backward, clip, AdamW) on a copy of the task's model."""

    def __init__(self, task: GeneratorTask) -> None:
        self.data, self.train = task.data, task.cfg.train
        self.text, self.model = task.text.encoder, copy.deepcopy(task.model)
        asked = self.train.optimizer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), asked.lr, betas=asked.betas, fused=True)
        self.device = next(self.model.parameters()).device
        self.dtype = compute_dtype(self.device, self.train.precision)

    def batches(self, steps: Sequence[int]) -> list[CodesBatch]:
        """Load the batches of ``steps`` into memory."""
        plan = BatchPlan(len(self.data), self.train.global_batch, self.data.order)
        return [self.data.batch(plan.place(step).epoch, plan.samples(step)) for step in steps]

    def step(self, batch: CodesBatch) -> None:
        assert isinstance(self.model, DiffusionGenerator)
        size = self.train.micro_batch_size or self.train.global_batch
        count = len(batch.captions) // size
        for start in range(0, count * size, size):
            codes = torch.from_numpy(batch.codes[start : start + size]).float().to(self.device)
            features, mask = self.text.encode(batch.captions[start : start + size])
            t, u = timesteps(torch.rand(size)).to(self.device), torch.rand(codes.shape).to(self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                z_t = flip_noise(codes, t, u)
                out = self.model(z_t, t, self.model.text_kv(features, mask))
                loss = F.binary_cross_entropy_with_logits(x0_logits(out, z_t, self.model.cfg.target), codes)
            (loss / count).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.train.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
