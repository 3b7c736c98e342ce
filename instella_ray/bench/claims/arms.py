"""Arms of claims: their configurations, and the steps that train and measure them, which claims share.

An arm is a chain of steps: a tokenizer, and for metrics of generators codes, a generator and its samples. The key of a step
is a hash of all that its result depends on, so that arms with a common beginning share its steps.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch

from ... import storage
from ...config import load_config, parse_override
from ...data.encode import EncodeConfig, run_encode
from ...data.formats.codes import dead_bits
from ...data.formats.images import to_pixels, to_tensor
from ...data.scene_score import score_images
from ...data.scenes import render, scene_at, scene_prompts
from ...errors import UserError
from ...evaluation.metrics.diversity import bit_distance
from ...models.bit import BIT
from ...models.checkpoint import load_expected
from ...models.folders import latest_checkpoint
from ...pipeline import InstellaPipeline
from ...training.generator import GeneratorRunConfig, PreviewConfig, run_generator
from ...training.losses import bit_summary, psnr
from ...training.run_dir import read_metrics
from ...training.settings import TrainConfig, TrainingRun, WorkersConfig
from ...training.tokenizer import TokenizerConfig, run_tokenizer
from .settings import ClaimArm, ClaimsBench, PaperClaim

HELD_OUT_SEED = 1_000_000
"""Seed of the held-out scenes and of the prompts; training scenes have seed 0."""
BATCH = 60
"""Images that are measured or generated at once."""
SPIKE_WINDOW = 20
"""Steps before a step, to whose median loss its own is compared."""
WORKERS = WorkersConfig(count=0, threads=1)
SET_BY_STEPS: dict[str, Any] = {
    **dict.fromkeys(("data", "codes", "tokenizer", "preview"), True),
    "train": {"run_dir", "seed", "workers", "checkpoint_every", "preview_every"},
}
"""Keys of a run's configuration on which its result does not depend, or that its step sets."""


class ArmConfig(NamedTuple):
    """Configurations of an arm's stages."""

    tokenizer: TokenizerConfig
    generator: GeneratorRunConfig
    sampling: PreviewConfig


def arm_config(bench: ClaimsBench, claim: PaperClaim, arm: ClaimArm) -> ArmConfig:
    """Return the demo's recipes with the overrides of ``bench`` and ``arm``; UserError naming the claim and override."""
    sections: dict[str, list[str]] = {"tokenizer": [], "generator": [], "sampling": []}
    try:
        for item in (*bench.overrides, *arm.overrides):
            section, _, rest = parse_override(item)[0].partition(".")
            if section not in sections or not rest:
                raise UserError(f"--set {item}: expected a key of {', '.join(sections)}")
            sections[section].append(item.partition(".")[2])
        generator, sampling = sections["generator"], sections["sampling"]
        return ArmConfig(
            load_config(TokenizerConfig, "tokenizer/demo", sections["tokenizer"]),
            load_config(GeneratorRunConfig, "generator/demo", generator),
            load_config(PreviewConfig, "generator/demo", sampling, section="preview"),
        )
    except UserError as error:
        raise UserError(f"claim '{claim.name}', arm '{arm.name}': {error}") from None


class Step(ABC):
    """Part of an arm's training and measurement; its result is a JSON file named after its key."""

    kind: ClassVar[str]

    def __init__(self, folder: str, seed: int, settings: Mapping[str, Any], needs: Sequence[Step] = ()) -> None:
        """``settings``: all that the result depends on beside ``needs`` and ``seed``."""
        self.folder, self.seed, self.needs = folder, seed, tuple(needs)
        self.settings = {**settings, "needs": [step.key for step in needs], "seed": seed}
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.key: str = f"{self.kind}-{digest[:12]}"

    @property
    def path(self) -> str:
        """Folder of the step's files; its result is the file of the same name."""
        return storage.join(self.folder, self.key)

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished step, or None."""
        file = f"{self.path}.json"
        storage.invalidate_listing(file)
        return cast(dict[str, Any], storage.read_json(file)["result"]) if storage.exists(file) else None

    def finish(self) -> str:
        """Run the step, write its result, and return its key."""
        before, began = torch.get_num_threads(), time.process_time()
        torch.set_num_threads(1)
        storage.remove_tree(self.path)  # what an interruption has left
        try:
            found = self.run()
        finally:
            torch.set_num_threads(before)
        about = {"settings": self.settings, "cpu_seconds": round(time.process_time() - began, 1), "result": found}
        storage.write_json(f"{self.path}.json", about)
        return self.key

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Compute the result, which becomes JSON; :attr:`path` is free for files."""


class TrainedTokenizer(Step):
    """Tokenizer, trained and measured on held-out scenes."""

    kind = "tokenizer"

    def __init__(self, bench: ClaimsBench, folder: str, cfg: TokenizerConfig, seed: int) -> None:
        self.cfg, self.sizes, self.held_out = cfg, bench.sizes, bench.held_out
        self.count, self.drawn_size = bench.scenes, max(cfg.model.image_size, *cfg.sizes)
        """Number of training scenes, and the size at which they are drawn (px)."""
        self.data = storage.join(scenes_folder(folder, self.count, self.drawn_size), "*.tar")
        scenes = {"scenes": bench.scenes, "held_out": bench.held_out, "sizes": list(bench.sizes)}
        super().__init__(folder, seed, {**_dump(cfg), **scenes})

    def run(self) -> dict[str, Any]:
        train = _train(self.cfg.train, self.path, self.seed)
        cfg = self.cfg.model_copy(update={"data": self.data, "train": train})
        bit = load_expected(run_tokenizer(cfg, self.key), BIT)
        losses = [row["loss"] for row in read_metrics(self.path)]
        warmup = train.optimizer.warmup_steps // train.log_every
        return {**measure_tokenizer(bit, self.sizes, self.held_out), "largest_spike": largest_spike(losses, warmup)}


class EncodedScenes(Step):
    """Codes of the training scenes."""

    kind = "codes"

    def __init__(self, tokenizer: TrainedTokenizer) -> None:
        super().__init__(tokenizer.folder, tokenizer.seed, {}, [tokenizer])
        self.tokenizer = tokenizer

    def run(self) -> dict[str, Any]:
        places = {
            "input": self.tokenizer.data,
            "output": self.path,
            "tokenizer": latest_checkpoint(self.tokenizer.path),
        }
        return {"rows": run_encode(EncodeConfig(**places, source="scenes", local=True)).rows}


class TrainedGenerator(Step):
    """Generator, trained on the codes of a tokenizer."""

    kind = "generator"

    def __init__(self, codes: EncodedScenes, cfg: GeneratorRunConfig) -> None:
        super().__init__(codes.folder, codes.seed, _dump(cfg), [codes])
        self.codes, self.cfg = codes, cfg

    def run(self) -> dict[str, Any]:
        facts = {
            "codes": self.codes.path,
            "tokenizer": latest_checkpoint(self.codes.tokenizer.path),
            "train": _train(self.cfg.train, self.path, self.seed),
        }
        run_generator(self.cfg.model_copy(update=facts))
        return {"loss": read_metrics(self.path)[-1]["loss"]}


class GeneratedSamples(Step):
    """Images of a generator, scored."""

    kind = "samples"

    def __init__(self, bench: ClaimsBench, generator: TrainedGenerator, sampling: PreviewConfig) -> None:
        self.generator, self.sampling = generator, sampling.model_dump(exclude={"prompts"})
        self.prompts, self.each = bench.prompts_per_category, bench.images_per_prompt
        images = {"prompts_per_category": self.prompts, "images_per_prompt": self.each}
        settings = {**sampling.model_dump(mode="json", exclude_defaults=True, exclude={"prompts"}), **images}
        super().__init__(generator.folder, generator.seed, settings, [generator])

    def run(self) -> dict[str, Any]:
        checkpoint = latest_checkpoint(self.generator.path)
        tokenizer = latest_checkpoint(self.generator.codes.tokenizer.path)
        pipe = InstellaPipeline.from_pretrained(
            checkpoint, tokenizer=tokenizer, device="cpu", precision="fp32", batch_size=BATCH
        )
        expected = scene_prompts(self.prompts, HELD_OUT_SEED)
        captions = [each.caption for each in expected]
        out = pipe(captions, num_images_per_prompt=self.each, seed=0, output_type="np", **self.sampling)
        table = score_images([each for each in expected for _ in range(self.each)], out.images)
        codes = out.codes.reshape(len(expected), self.each, -1)
        distances = [bit_distance(each) for each in codes]
        return {"scene_score": table["overall"], "categories": table, "diversity": float(np.mean(distances))}


def arm_steps(bench: ClaimsBench, folder: str, claim: PaperClaim, cfg: ArmConfig, seed: int) -> list[Step]:
    """Return the steps of an arm in their order; the last one's result has the claim's metric."""
    tokenizer = TrainedTokenizer(bench, folder, cfg.tokenizer, seed)
    if not claim.generates:
        return [tokenizer]
    codes = EncodedScenes(tokenizer)
    generator = TrainedGenerator(codes, cfg.generator)
    return [tokenizer, codes, generator, GeneratedSamples(bench, generator, cfg.sampling)]


class Trial(NamedTuple):
    """Both arms of a claim, with one seed."""

    claim: PaperClaim
    seed: int
    proposed: list[Step]
    baseline: list[Step]


def plan_trials(bench: ClaimsBench, folder: str) -> list[Trial]:
    """Return the trials of all claims, those of a seed together.

    UserError unless all arms can be configured, and measured at the sizes of ``bench``.
    """
    found = []
    for claim in bench.claims:
        if claim.size is not None and claim.size not in bench.sizes:
            raise UserError(f"claim '{claim.name}': size {claim.size}: expected one of sizes {bench.sizes}")
        configs = [arm_config(bench, claim, arm) for arm in (claim.proposed, claim.baseline)]
        for multiple in (cfg.tokenizer.model.decode_multiple for cfg in configs):
            if wrong := [size for size in bench.sizes if size % multiple]:
                raise UserError(f"claim '{claim.name}': sizes {wrong[0]}: not a multiple of {multiple}")
        for seed in bench.seeds:
            proposed, baseline = (arm_steps(bench, folder, claim, cfg, seed) for cfg in configs)
            found.append(Trial(claim, seed, proposed, baseline))
    return sorted(found, key=lambda trial: bench.seeds.index(trial.seed))


def scenes_folder(folder: str, count: int, size: int) -> str:
    """Return the folder of ``count`` training scenes of ``size`` pixels among the results in ``folder``."""
    return storage.join(folder, f"scenes-{count}-{size}")


def measure_tokenizer(bit: BIT, sizes: Sequence[int], count: int) -> dict[str, Any]:
    """Measure reconstructions of ``count`` held-out scenes from hard bits: PSNR at each output size, score and bits."""
    side = bit.cfg.image_size
    scenes = [scene_at(HELD_OUT_SEED, index) for index in range(count)]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    codes, restored = [], []
    for start in range(0, count, BATCH):
        part = scenes[start : start + BATCH]
        with torch.inference_mode():
            codes.append(bit.encode(_images(part, side)))
            restored.append(to_pixels(bit.decode(codes[-1], side, side)))
            for size, values in found.items():
                values += psnr(bit.decode(codes[-1], size, size), _images(part, size)).tolist()
    share = torch.cat(codes).float().mean(0)
    return {
        "psnr": {str(size): float(np.mean(values)) for size, values in found.items()},
        "reconstruction_score": score_images([scene.expect for scene in scenes], np.concatenate(restored))["overall"],
        "bit_entropy": float(bit_summary(share)["bit_entropy"]),
        "dead_bits": float(dead_bits(share).float().mean()),
    }


def largest_spike(losses: Sequence[float], warmup: int) -> float:
    """Return the largest of ``losses`` after ``warmup``, each relative to the median of the :data:`SPIKE_WINDOW` before it.

    1.0 for too few losses.
    """
    places = range(max(warmup, SPIKE_WINDOW), len(losses))
    ratios = [losses[i] / statistics.median(losses[i - SPIKE_WINDOW : i]) for i in places]
    return max(ratios, default=1.0)


def _images(scenes: Sequence[Any], size: int) -> torch.Tensor:
    return to_tensor(np.stack([render(scene, size) for scene in scenes]))


def _dump(cfg: TrainingRun) -> dict[str, Any]:
    """Return what a run's result depends on; without defaults, so that a new key does not make it another run."""
    return cfg.model_dump(mode="json", exclude_defaults=True, exclude=SET_BY_STEPS)


def _train(train: TrainConfig, run_dir: str, seed: int) -> TrainConfig:
    """Return ``train`` as one thread of the calling process does it, with one checkpoint, at the end."""
    facts = {"run_dir": run_dir, "seed": seed, "workers": WORKERS}
    return train.model_copy(update={**facts, "checkpoint_every": train.steps, "preview_every": train.steps})
