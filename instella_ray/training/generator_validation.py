"""Validation of a generator during training: samples fixed prompts with each checkpoint and evaluates the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..bulk.plan import SampleConfig
from ..bulk.sample import run_sample
from ..data.prompts import SCENES, PromptFile, read_prompts
from ..errors import UserError
from ..evaluation.evaluate import EvaluateConfig, run_evaluate
from ..evaluation.metric_settings import MetricsConfig, choose
from ..evaluation.results import Evaluation
from ..models.bit import BITConfig
from ..models.checkpoint import parse_model, read_checkpoint_config
from ..models.sampling import SamplingConfig
from .validation import Numbers, ValidationSchedule, Validator, numbers, require_best_by
from .validation_report import EVALUATION


class GeneratorValidation(ValidationSchedule):
    """Prompts, sampling and metrics of a generator's validation."""

    prompts: PromptFile = SCENES
    """Prompts, as in jobs/sample.py."""
    count: int | None = Field(240, ge=1)
    images_per_prompt: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    sampling: SamplingConfig = SamplingConfig(guidance_scale=4.0, temperature=0.6)
    text_length: int = Field(128, ge=1)
    size: int | None = Field(None, ge=16)
    """Pixels a side of the images; none means the tokenizer's image size."""
    metrics: MetricsConfig | None = None
    """Metrics, as in jobs/evaluate.py."""
    best_by: str = "scene_score"
    """Metric that selects the best checkpoint."""
    batch_size: int = Field(16, ge=1)
    actors: int | None = Field(1, ge=1)
    gpus_per_actor: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _best_by_is_measured(self) -> GeneratorValidation:
        scenes = ["scene_score"] if self.prompts == SCENES else []
        require_best_by(self.best_by, list(self.metrics.sections()) if self.metrics else scenes)
        return self


def check_validation(cfg: GeneratorValidation, tokenizer: str, *, here: bool) -> None:
    """Raise UserError for what would otherwise fail at the first checkpoint: prompts, metrics, or the size of the images."""
    read_prompts(cfg.prompts, count=cfg.count, seed=cfg.seed)
    offers = {"codes", "prompts", "meta", "images"} | ({"groups"} if cfg.images_per_prompt != 1 else set())
    if "geneval" in choose(cfg.metrics, frozenset(offers), scenes=cfg.prompts == SCENES) and here:
        raise UserError("validation.metrics.geneval: the detector runs on Ray, which workers.count 0 does not use")
    if cfg.size is not None:
        bit = parse_model(read_checkpoint_config(tokenizer)["model"])
        if isinstance(bit, BITConfig) and cfg.size % bit.decode_multiple:
            raise UserError(
                f"validation.size {cfg.size}: not a multiple of {bit.decode_multiple}, as the tokenizer decodes"
            )


class GeneratorValidator(Validator):
    """Validator that runs the sampling job and the evaluation job on each checkpoint."""

    def __init__(self, cfg: GeneratorValidation, run_dir: str, tokenizer: str, *, here: bool) -> None:
        """``here``: run both jobs in this process, like ``--local``. Raises UserError as :func:`check_validation`."""
        super().__init__(cfg, run_dir)
        check_validation(cfg, tokenizer, here=here)
        self.cfg, self.tokenizer = cfg, tokenizer
        self.spread: dict[str, Any] = {"actors": cfg.actors, "gpus_per_actor": cfg.gpus_per_actor, "local": here}
        """Execution options of both jobs."""

    def measure(self, model: str, folder: Path) -> Numbers:
        cfg = self.cfg
        places = {"model": model, "output": str(folder / "samples"), "mode": "resume"}
        asked = ("prompts", "count", "images_per_prompt", "seed", "sampling", "text_length", "batch_size")
        run_sample(SampleConfig(**places, **{name: getattr(cfg, name) for name in asked}, **self.spread))
        evaluation = EvaluateConfig(
            samples=places["output"],
            tokenizer=self.tokenizer,
            output=str(folder / EVALUATION),
            mode="resume",
            size=cfg.size,
            metrics=cfg.metrics,
            batch_size=cfg.batch_size,
            **self.spread,
        )
        run_evaluate(evaluation)
        (setting,) = Evaluation(evaluation.output).settings.values()
        return numbers(setting["metrics"].items())
