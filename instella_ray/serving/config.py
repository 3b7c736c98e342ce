"""How an endpoint is laid out: what ``serve run instella_ray.serving.app:build`` and ``jobs/serve.py`` read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..accelerator import Precision
from ..config import Config
from ..engine.buckets import Compilation
from ..engine.engine import EngineOptions
from ..errors import UserError
from ..models.sampling import SamplingConfig
from .safety import SafetyConfig

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RequestLimits(Config):
    """What one request may ask for; more is refused with an answer that names the field."""

    prompt_characters: int = Field(4000, ge=1)
    prompt_tokens: int | None = Field(None, ge=1)
    """Longer prompts are refused. None: they are cut to what the text encoder and the slots have room for."""
    n: int = Field(16, ge=1)
    """Images a prompt."""
    images: int = Field(64, ge=1)
    """Images a request: n times its prompts, or codes to decode."""
    steps: int = Field(1000, ge=1)
    body_bytes: int = Field(1 << 20, ge=1)
    timeout_s: Finite = Field(300.0, gt=0)
    """The longest deadline a request may set, and the deadline of one that sets none."""


class Autoscaling(Config):
    """Between how many replicas a stage moves, and how fast."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_load: Finite = Field(0.8, gt=0, le=1)
    """Share of a replica's places that should be taken: of its slots, or of the calls it works on at once."""
    upscale_delay_s: Finite = Field(5.0, ge=0)
    downscale_delay_s: Finite = Field(120.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"expected min_replicas ({self.min_replicas}) up to max_replicas ({self.max_replicas})")
        return self


class StageArgs(Config):
    """One stage of the graph."""

    replicas: int = Field(1, ge=1)
    """Fixed number of replicas, where there is no ``autoscaling``."""
    autoscaling: Autoscaling | None = None
    num_cpus: float | None = Field(None, ge=0)
    """As the endpoint's own, for this stage alone."""
    num_gpus: float | None = Field(None, ge=0)
    queue: int = Field(64, ge=0)
    """Images that may wait beside those that replicas work on; the next one is refused with 429."""

    @property
    def least_replicas(self) -> int:
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas


class ModelArgs(StageArgs):
    """One generator behind the endpoint."""

    path: str
    """Model folder of a diffusion or AR generator."""
    defaults: SamplingConfig = SamplingConfig()
    """What a request gets where it says nothing."""
    slots: int = Field(8, ge=1)
    """Images that share a forward pass."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs."""
    batch_invariant: bool = True
    """Give an image the same bits in any company, even where that costs speed."""
    longest_step_s: Finite = Field(60.0, gt=0)
    """A replica whose engine has not come round for so long is replaced."""

    @property
    def ongoing(self) -> int:
        """Calls that a replica holds: its slots, and as many that take over without a trip through the handle."""
        return 2 * self.slots

    @property
    def capacity(self) -> int:
        """Images that may be under way."""
        return self.most_replicas * self.ongoing + self.queue

    def options(self, text_length: int) -> EngineOptions:
        return EngineOptions(self.slots, text_length, self.compilation, self.batch_invariant)


class ServeArgs(Config):
    """An endpoint: one tokenizer, one text encoder, any number of generators over its codes."""

    tokenizer: str
    """Model folder of the BIT."""
    models: dict[str, ModelArgs]
    """Generators by the name that requests use; the first is the default."""
    text_length: int = Field(128, ge=1)
    """Prompt tokens that a slot has room for."""
    sizes: tuple[int, ...] = Field((512, 768, 1024), min_length=1)
    """Edges (px) that images may have; the first is the default."""
    limits: RequestLimits = RequestLimits()
    text: StageArgs = StageArgs()
    """The text encoder's replicas."""
    decoder: StageArgs = StageArgs()
    """The decoder's replicas."""
    safety: SafetyConfig | None = None
    """Look at every image before it leaves; needs the extra ``safety``."""
    api_keys_file: str | None = None
    """File with one key a line, beside those of the variable INSTELLA_API_KEYS. No keys: loopback only."""
    num_cpus: float = Field(1.0, ge=0)
    """Logical CPUs a replica reserves."""
    threads: int = Field(1, ge=1)
    """Threads a replica computes with on the CPU."""
    num_gpus: float = Field(0.0, ge=0)
    """GPU share of each replica."""
    precision: Precision = "auto"
    """Of weights and arithmetic; auto is bf16 on GPUs."""

    def gpus(self, stage: StageArgs) -> float:
        return self.num_gpus if stage.num_gpus is None else stage.num_gpus

    def cpus(self, stage: StageArgs) -> float:
        return self.num_cpus if stage.num_cpus is None else stage.num_cpus

    def check(self) -> None:
        """UserError for settings that contradict each other."""
        if not self.models:
            raise UserError("models: expected at least one generator")
        for name, model in self.models.items():
            if self.limits.images > model.capacity:
                raise UserError(
                    f"limits.images {self.limits.images}: models.{name} has room for {model.capacity} images "
                    "under way (replicas * 2 * slots + queue), so the largest request could never be let in"
                )
            if model.compilation == "graphs" and not self.gpus(model):
                raise UserError(f"models.{name}.compilation graphs: needs a GPU, expected num_gpus above 0")
            if model.defaults.num_inference_steps > self.limits.steps:
                raise UserError(
                    f"models.{name}.defaults.num_inference_steps: more than limits.steps {self.limits.steps}"
                )
