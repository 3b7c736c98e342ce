"""Configuration of an endpoint, as ``serve run instella_ray.serving.app:build`` and ``jobs/serve.py`` read it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..accelerator import Precision
from ..config import Config, InputPath
from ..engine.compilation import Compilation
from ..engine.scheduling import Scheduling
from ..engine.slots import EngineOptions
from ..errors import UserError
from ..models.eight_bit import Quantization
from ..models.sampling import SamplingConfig
from ..resources import Group, Needs
from .safety import SafetyConfig

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RequestLimits(Config):
    """Limits of one request; a request over a limit is refused with an error that names the field."""

    prompt_characters: int = Field(4000, ge=1)
    prompt_tokens: int | None = Field(None, ge=1)
    """Maximum prompt tokens; longer prompts are refused. None: truncated to the limit of text encoder and slots."""
    n: int = Field(16, ge=1)
    """Maximum images per prompt."""
    images: int = Field(64, ge=1)
    """Maximum images per request: n times its prompts, or codes to decode."""
    steps: int = Field(1000, ge=1)
    body_bytes: int = Field(1 << 20, ge=1)
    timeout_s: Finite = Field(300.0, gt=0)
    """Maximum and default deadline of a request, in seconds."""


class Autoscaling(Config):
    """Autoscaling of a stage: range of replicas, target load and delays."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_load: Finite = Field(0.8, gt=0, le=1)
    """Target utilisation of a replica: share of its slots, or of its concurrent calls."""
    upscale_delay_s: Finite = Field(5.0, ge=0)
    downscale_delay_s: Finite = Field(120.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"expected min_replicas ({self.min_replicas}) up to max_replicas ({self.max_replicas})")
        return self


class StageArgs(Config):
    """Replicas and resources of one stage of the graph."""

    replicas: int = Field(1, ge=1)
    """Fixed number of replicas; ignored if ``autoscaling`` is set."""
    autoscaling: Autoscaling | None = None
    num_cpus: float | None = Field(None, ge=0)
    """Logical CPUs per replica of this stage; none means the endpoint's ``num_cpus``."""
    num_gpus: float | None = Field(None, ge=0, le=1)
    """GPU share per replica of this stage; none means the endpoint's ``num_gpus``."""
    queue: int = Field(64, ge=0)
    """Maximum queued images beyond those in replicas; further ones are refused with 429."""

    @property
    def least_replicas(self) -> int:
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas


class ModelArgs(StageArgs):
    """One generator of the endpoint."""

    path: InputPath
    """Model folder of a diffusion or AR generator."""
    defaults: SamplingConfig = SamplingConfig()
    """Defaults of the sampling parameters that a request omits."""
    slots: int = Field(8, ge=1)
    """Maximum images per forward pass of a replica."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, which delays the first start of a replica by about 15 s per batch size and branches on a
    CPU, ``graphs`` for recorded CUDA or HIP graphs, ``compile+graphs`` for graphs of compiled code."""
    quantization: Quantization = "none"
    """``int8`` or ``fp8``: round the large matrices and their inputs to eight bits; faster, at some cost in quality."""
    batch_invariant: bool = True
    """Give an image the same bits whatever else is in the batch, even at the cost of throughput."""
    scheduling: Scheduling = "fifo"
    """``fifo``: in order of arrival, all slots in every step. ``deadline``: requests that can end within three times the
    time they take alone come first, and others may pause. An image is the same under both."""
    prompt_cache_bytes: int = Field(256 << 20, ge=0)
    """Maximum bytes per replica of text keys and values that requests with the same prompt share."""
    longest_step_s: Finite = Field(60.0, gt=0)
    """Seconds without a completed engine step after which a replica is replaced."""

    @property
    def ongoing(self) -> int:
        """Concurrent calls per replica: its slots, as many queued so that a freed slot is refilled at once, and the queue.

        Calls beyond it would wait in Serve's router, which looks for a free replica up to 0.5 s apart.
        """
        return 2 * self.slots + self.queue

    @property
    def capacity(self) -> int:
        """Maximum number of images in progress."""
        return self.most_replicas * 2 * self.slots + self.queue

    def options(self, text_length: int) -> EngineOptions:
        return EngineOptions(
            slots=self.slots,
            text_length=text_length,
            compilation=self.compilation,
            batch_invariant=self.batch_invariant,
            scheduling=self.scheduling,
            prompt_cache_bytes=self.prompt_cache_bytes,
            quantization=self.quantization,
        )


class DecoderArgs(StageArgs):
    """Decoder stage."""

    file_threads: int = Field(2, ge=1)
    """Threads per replica that check and write image files while the next ones are decoded; each writes about 100 PNG or 20
    WebP of 1024 px a second. More need ``num_cpus`` as well."""


class ServeArgs(Config):
    """Endpoint: one tokenizer, one text encoder and any number of generators over the tokenizer's codes."""

    tokenizer: InputPath
    """Model folder of the BIT."""
    models: dict[str, ModelArgs]
    """Generators by the name used in requests; the first is the default."""
    text_length: int = Field(128, ge=1)
    """Maximum number of prompt tokens per slot."""
    sizes: tuple[int, ...] = Field((512, 768, 1024), min_length=1)
    """Permitted edges of images (px); the first is the default."""
    limits: RequestLimits = RequestLimits()
    ingress_replicas: int = Field(2, ge=1)
    """Processes that answer HTTP requests; with two, one answers while the other is replaced. Each admits its share of the
    images of a model, and at least ``limits.images``."""
    text: StageArgs = StageArgs()
    """Text encoder stage."""
    decoder: DecoderArgs = DecoderArgs()
    safety: SafetyConfig | None = None
    """Safety checker applied to every image; requires the extra ``safety``. None: no check."""
    api_keys_file: InputPath | None = None
    """File of API keys, in addition to the variable INSTELLA_API_KEYS: one per line, or a YAML or JSON list of entries with
    ``name``, ``sha256``, ``requests_per_minute``, ``concurrent_images`` and ``models`` (`instella-ray api-key` makes one).
    It is read again when it changes. No keys: loopback only."""
    num_cpus: float = Field(1.0, ge=0)
    """Logical CPUs reserved per replica."""
    threads: int = Field(1, ge=1)
    """CPU threads per replica."""
    num_gpus: float = Field(0.0, ge=0, le=1)
    """GPU share per replica, at most 1, as it computes on one GPU; 0 computes on CPUs."""
    precision: Precision = "auto"
    """Precision of weights and arithmetic; auto is bf16 on GPUs."""

    def gpus(self, stage: StageArgs) -> float:
        return self.num_gpus if stage.num_gpus is None else stage.num_gpus

    def cpus(self, stage: StageArgs) -> float:
        return self.num_cpus if stage.num_cpus is None else stage.num_cpus

    def share(self, images: int) -> int:
        """Return how many of ``images`` one replica of the ingress admits."""
        return max(self.limits.images, -(-images // self.ingress_replicas))

    def needs(self) -> Needs:
        """Return the fewest replicas of the stages, with the resources of each."""
        stages = [self.text, self.decoder, *self.models.values()]
        return tuple(Group(stage.least_replicas, self.cpus(stage), self.gpus(stage)) for stage in stages)

    def check(self) -> None:
        """Raise UserError for contradictory settings."""
        if not self.models:
            raise UserError("models: expected at least one generator")
        for name, model in self.models.items():
            if self.limits.images > model.capacity:
                raise UserError(
                    f"limits.images {self.limits.images}: models.{name} admits at most {model.capacity} images at once "
                    "(replicas * 2 * slots + queue), so the largest request could never be admitted"
                )
            if "graphs" in model.compilation and not self.gpus(model):
                raise UserError(
                    f"models.{name}.compilation {model.compilation}: needs a GPU, expected num_gpus above 0"
                )
            if model.defaults.num_inference_steps > self.limits.steps:
                raise UserError(
                    f"models.{name}.defaults.num_inference_steps: more than limits.steps {self.limits.steps}"
                )
