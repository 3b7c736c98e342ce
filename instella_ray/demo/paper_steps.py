"""Every run of the paper's recipes that :mod:`.paper` does, with the small sizes, inputs and models that stand for theirs.

What a step sets is all that differs from the recipe: sizes, steps of training, paths, and metrics whose weights are not here.
Samplers, guidance, temperatures and sampling steps stay the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .paper_inputs import CLIP, PER_CATEGORY, SIZE

Settings = dict[str, Any]
SIZES = [SIZE, SIZE * 3 // 2, SIZE * 2]
"""Sizes that the small tokenizer decodes; the paper's 512, 768 and 1024."""
PROMPTS = 6 * PER_CATEGORY
ON_CPU: Settings = {"gpus_per_actor": 0, "actors": 1}
TEACHERS = ("flux_schnell", "pixart_sigma", "sd35_large")
OTHERS = ("sdv15", "sdxl", "pixart_alpha")
"""Models of Appendix G beside the paper's."""
WITHOUT_IMAGES: Settings = {"show.prompts": 0, "show.extremes": 0}
"""Of reports that would show much the same as that of GenEval: images take an actor each time."""
FEATURES = {"network": "efficientnet_lite0", "weights": None}
"""In place of Inception's, whose file is not here."""


@dataclass(frozen=True)
class RecipeStep:
    """One run of a recipe."""

    recipe: str
    """Its name in ``configs/paper``."""
    output: str
    """Name of the folder that it writes."""
    settings: Settings
    """Dotted keys and values that stand for the recipe's."""

    @property
    def name(self) -> str:
        """The recipe's name, with what sets this run apart from others of it."""
        return f"{self.recipe} ({self.output})"


def under(prefix: str, settings: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with a prefix before their keys."""
    return {f"{prefix}.{key}": value for key, value in settings.items()}


class PaperSteps:
    """Runs of all recipes in a folder, with inputs in its ``inputs``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, folder / "inputs"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def model(self, name: str) -> str:
        """Return the path of a stand-in."""
        return str(self.inputs / "models" / name)

    def prompts(self, name: str) -> str:
        return str(self.inputs / "prompts" / name)

    @property
    def tokenizer(self) -> str:
        return self.path("tokenizer/stage3/latest")

    @property
    def clip_score(self) -> Settings:
        """Settings of the CLIP score with the stand-in."""
        return under("metrics.clip_score", {"model": CLIP, "weights": self.model("clip.pt")})

    def all(self) -> list[RecipeStep]:
        """Return the runs in their order."""
        return [*self.data(), *self.training(), *self.table1(), *self.table3(), *self.figure1(), *self.appendix_g()]

    def data(self) -> Iterator[RecipeStep]:
        size = {"filters.resolution.target_size": 2 * SIZE}
        head = self.model("aesthetic-head.safetensors")
        aesthetic = {"model": CLIP, "weights": self.model("clip.pt"), "head": head, **ON_CPU}
        filters = {**size, **under("filters.aesthetic", aesthetic)}
        yield RecipeStep("01-curate", "curated", {**self._folders("inputs/laion/*.tar", "curated"), **filters})
        captioner = {"model": self.model("captioner"), **ON_CPU, "max_pixels": SIZE**2}
        short = {"long.max_new_tokens": 24, "short.max_new_tokens": 12}
        yield RecipeStep("02-recaption", "captioned", {**self._folders("curated", "captioned"), **captioner, **short})
        yield self._synthesis("03-synthesize", "synthetic", "diffusiondb.parquet", TEACHERS)
        yield RecipeStep("04-import-dalle", "dalle", {**self._folders("inputs/dalle/*.tar", "dalle"), **size})

    def training(self) -> Iterator[RecipeStep]:
        yield RecipeStep("05-tokenizer", "tokenizer", self._tokenizer_settings())
        small: Settings = {"size": SIZE, "batch_size": 16, **ON_CPU, "tokenizer": self.tokenizer}
        for data in ("imagenet", "coco"):
            images = {"images": self.path(f"inputs/{data}"), "output": self.path(f"eval-{data}")}
            table = {"preset": f"paper-table2-{data}", "metrics.rfid": FEATURES}
            yield RecipeStep("06-evaluate-table2", f"eval-{data}", {**small, **images, **table})
        for source, folder in (("laion", "captioned"), ("synthetic", "synthetic"), ("dalle", "dalle")):
            settings = {**small, **self._folders(folder, f"codes-{source}"), "source": source}
            yield RecipeStep("07-encode", f"codes-{source}", settings)
        weights = {"codes-laion": 18, "codes-synthetic": 5, "codes-dalle": 1}
        codes = [{"folder": self.path(name), "weight": weight} for name, weight in weights.items()]
        for recipe, output in (("08-diffusion", "diffusion"), ("09-autoregressive", "ar")):
            own: Settings = {"model.width": 32, "model.heads": 1, "codes": codes, "tokenizer": self.tokenizer}
            own |= {"text_encoder.name": self.model("llm"), "train.steps": 20, "train.sharding": "ddp"}
            yield RecipeStep(recipe, output, {**own, **self._train_settings(output, 24)})

    def table1(self) -> Iterator[RecipeStep]:
        # What needs files that are not here is left out, and something else measured in its place, under its own name.
        parts: list[tuple[str, str, Settings]] = [
            ("10-sample-geneval", "11-evaluate-geneval", {"metrics.geneval": None, "metrics.scene_score": {}}),
            ("12-sample-coco", "13-evaluate-clip-score", self.clip_score),
            (
                "14-sample-image-reward",
                "15-evaluate-image-reward",
                {"metrics.image_reward": None, "metrics.bit_usage": {}},
            ),
        ]
        for sample, evaluate, metrics in parts:
            for model, preset in (("diffusion", "paper-table1"), ("ar", "paper-table1-ar")):
                name = f"{evaluate.partition('-evaluate-')[2]}-{model}"
                first = sample == "10-sample-geneval"
                own: Settings = {} if first else {"count": PROMPTS}
                own |= {"sampling.temperature": 0.6} if model == "ar" else {}
                yield self._sampling(sample, name, model, own)
                yield self._evaluation(
                    evaluate, name, {**metrics, **({} if first else WITHOUT_IMAGES), "preset": preset}
                )

    def table3(self) -> Iterator[RecipeStep]:
        fid = under("metrics.fid", {**FEATURES, "reference": self.path("inputs/coco"), "groups": 2})
        for steps, preset in ((20, "paper-table3"), (50, "paper-table3-50")):
            own = {"sampling.num_inference_steps": steps, "count": PROMPTS}
            yield self._sampling("16-sample-table3", f"table3-{steps}", "diffusion", own)
            yield self._evaluation("17-evaluate-table3", f"table3-{steps}", {**fid, **WITHOUT_IMAGES, "preset": preset})

    def figure1(self) -> Iterator[RecipeStep]:
        decode = under("decode", {"tokenizer": self.tokenizer, "size": SIZE, **ON_CPU})
        for recipe, name, model in (
            ("18-sample-figure1", "figure1", "diffusion"),
            ("19-sample-figure1-ar", "figure1-ar", "ar"),
        ):
            step = self._sampling(recipe, name, model, {})
            yield RecipeStep(recipe, step.output, {**step.settings, **decode})

    def appendix_g(self) -> Iterator[RecipeStep]:
        yield self._sampling("20-sample-appendix-g", "appendix-g", "diffusion", {"count": PROMPTS})
        yield self._synthesis(
            "21-synthesize-appendix-g", "synthetic-appendix-g", "benchmark-prompts.json", OTHERS, count=PROMPTS
        )
        yield self._evaluation("22-evaluate-appendix-g", "appendix-g", self.clip_score)
        for name in OTHERS:
            own = {"images": self.path(f"synthetic-appendix-g/{name}-*.tar"), "output": self.path(f"eval-{name}")}
            settings = {**own, **self.clip_score, "size": 2 * SIZE, **ON_CPU}
            yield RecipeStep("22-evaluate-appendix-g", f"eval-{name}", settings)

    def _folders(self, read: str, written: str) -> Settings:
        return {"input": self.path(read), "output": self.path(written)}

    def _synthesis(self, recipe: str, output: str, prompts: str, models: Sequence[str], **further: Any) -> RecipeStep:
        settings: Settings = {"prompts": self.prompts(prompts), "output": self.path(output), **further}
        small = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, **ON_CPU}
        for name in models:
            settings |= under(f"models.{name}", {**small, "pipeline": self.model(name)})
        return RecipeStep(recipe, output, settings)

    def _sampling(self, recipe: str, name: str, model: str, own: Mapping[str, Any]) -> RecipeStep:
        files = {"10": "evaluation_metadata.jsonl", "12": "captions_val2014.json", "16": "captions_val2014.json"}
        files |= {"18": "figure1.jsonl", "19": "figure1-ar.jsonl"}
        settings: Settings = {
            "model": self.path(f"{model}/latest"),
            "output": self.path(f"samples-{name}"),
            "compilation": "none",
        }
        settings |= {
            "prompts": self.prompts(files.get(recipe[:2], "benchmark-prompts.json")),
            **ON_CPU,
            **own,
        }
        return RecipeStep(recipe, f"samples-{name}", under("sample", settings))

    def _evaluation(self, recipe: str, name: str, own: Mapping[str, Any]) -> RecipeStep:
        settings = {"samples": self.path(f"samples-{name}"), "output": self.path(f"eval-{name}")}
        small = {"tokenizer": self.tokenizer, "size": 2 * SIZE, **ON_CPU}
        return RecipeStep(recipe, f"eval-{name}", {**settings, **small, **own})

    def _tokenizer_settings(self) -> Settings:
        side = {"width": 32, "heads": 1, "layers": 3}
        model: Settings = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in side.items()}
        model |= {"image_size": SIZE, "patch_size": 4, "num_tokens": 8, "bits_per_token": 16, "rope_axes": [8, 12, 12]}
        model |= {"downsample_after": [1], "upsample_after": [1]}
        network = {"backbone": "vit_tiny_patch16_224", "weights": "random", "size": 32, "blocks": [2, 5], "width": 16}
        stages: Settings = {
            "stage1.train.steps": 12,
            "stage3.train.global_batch": 8,
            "stage3.adversarial.start_step": 2,
        }
        stages["stage3.adversarial.discriminator"] = network
        for name in ("stage2", "stage3"):
            stages |= under(name, {"train.steps": 4, "train.micro_batch_size": None, "output_sizes": SIZES})
        look = under("loss.perceptual", {"weights": "random", "size": SIZE, "crop": SIZE // 2})
        own = {"data": self.path("inputs/laion/*.tar"), **under("model", model), **under("stages", stages), **look}
        return {**own, **self._train_settings("tokenizer", 8)}

    def _train_settings(self, output: str, batch: int) -> Settings:
        own: Settings = {
            "run_dir": self.path(output),
            "workers": {"cpus": 1},
            "optimizer.warmup_steps": 2,
            "ema_decay": 0.9,
        }
        own |= {"global_batch": batch, "micro_batch_size": None, "held_out": {"samples": 8, "every": 10}}
        own |= {"log_every": 5, "checkpoint_every": 50, "preview_every": 50, "precision": "fp32"}
        return under("train", own)
