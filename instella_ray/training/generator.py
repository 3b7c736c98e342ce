"""Generator training, diffusion (Eq. 5) or AR (Eq. 7), on packed codes or images with a frozen text encoder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import storage
from ..accelerator import compute_dtype, upload
from ..config import Config, InputPath
from ..data.formats.codes import CodesManifest, CodesReader
from ..data.formats.patterns import Pattern, absolute_pattern
from ..data.loading.image_data import CaptionedImageBatch, CaptionedImageData, require_images
from ..data.loading.loader import CAPTIONS, CaptionChoice, CodesBatch, CodesData, Data, Mixture
from ..data.loading.split import FileData
from ..data.model_provenance import model_provenance, text_encoder_provenance
from ..data.provenance import data_provenance, shard_provenance
from ..errors import UserError
from ..flops import TextEncoderSizes, generator_training, text_encoder_forward
from ..models.bit import BIT, BITConfig
from ..models.card import GeneratorCard
from ..models.checkpoint import Model, load_expected, weight_hash
from ..models.diffusion import TimeDistribution
from ..models.folders import find_model
from ..models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from ..models.sampling import Guidance, SamplingConfig, Temperature
from ..models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatureCache, pad_features
from ..pipeline import InstellaPipeline
from ..runs import Provenance
from .captions import CaptionTokenizer, longest_first
from .distributed import ranks
from .generator_loss import BY_TIME, ARLoss, DiffusionLoss, accuracy_summary
from .generator_validation import GeneratorValidation, GeneratorValidator
from .held_out import complete_held_out, held_out_set, hold_out, shares
from .launch import launch
from .logged import DIFFUSION, GENERATOR, check_keep_best
from .memory import Checkpointing, choose_checkpointing, generator_memory
from .online import OnlineEncoder, require_encodable
from .previews import PreviewInputs
from .settings import TrainingRun
from .start_from import checked_generator, parent_provenance, trained_generator
from .validation import validating

log = logging.getLogger(__name__)

CALIBRATION_CAPTIONS = 512


class PreviewConfig(SamplingConfig):
    """Preview images generated during training, from fixed prompts and seeds."""

    prompts: tuple[str, ...] = ()
    guidance_scale: Guidance = 4.0
    temperature: Temperature = 0.6


class CodesSource(Config):
    """One folder of packed codes of a data mixture."""

    folder: InputPath
    weight: int = Field(1, ge=1)
    """Sampling weight: of as many samples as the sum of all weights, this many come from this folder (LAION : synthetic
    = 3 : 1)."""


class GeneratorRunConfig(TrainingRun):
    """Configuration of a generator run. The model's sizes are filled in from ``tokenizer`` and ``text_encoder``."""

    model: GeneratorConfig
    codes: InputPath | tuple[CodesSource, ...] | None = None
    """Folder of packed codes encoded by ``tokenizer``, or several with weights."""
    images: Pattern | None = None
    """Instead of codes: curated WebDataset tars, whose images ``tokenizer`` encodes on the worker's device during
    training, with different crops in each epoch."""
    tokenizer: InputPath
    """Model folder of the BIT that encodes the data and decodes the previews."""
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    text_cache_bytes: int = Field(1 << 30, ge=0)
    """Maximum bytes of captions' features that each worker keeps on its device; captions beyond them are encoded again."""
    start_from: InputPath | None = None
    """Model folder of the same sizes whose (EMA) weights initialize the model, for fine-tuning: a checkpoint, or imported
    released weights. None means random initialization."""
    short_caption_probability: float = 0.5
    caption_drop_probability: float = 0.1
    """Probability of training a sample without its caption, for classifier-free guidance."""
    timesteps: TimeDistribution = "logit_normal"
    timestep_shift: float = Field(1.0, gt=0)
    """Shift of the training timesteps towards noise, where the prompt decides: 1 leaves them as drawn, 2 doubles the odds
    of noise."""
    calibrate_text: bool = False
    """Whiten the initial text projections on 512 captions, so that word order is learned sooner."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute block activations in the backward pass: larger micro-batches, slower steps (auto, true or false).

    auto recomputes only where the planned memory of a micro-batch does not fit the GPU; never on a CPU."""
    about: str = ""
    """A sentence about what the model draws, for those who use it: the endpoint's page shows it."""
    preview: PreviewConfig = PreviewConfig()
    """Also the examples and the default sampling settings of those who use the model."""
    validation: GeneratorValidation | None = None
    """Evaluation of checkpoints during training; None disables it."""

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> GeneratorRunConfig:
        if (self.codes is None) == (self.images is None):
            raise ValueError("codes, images: expected exactly one of them, the other null")
        return self

    @property
    def card(self) -> GeneratorCard:
        """Card of the trained model."""
        sampling = SamplingConfig(**self.preview.model_dump(include=set(SamplingConfig.model_fields)))
        return GeneratorCard(about=self.about, prompts=tuple(filter(None, self.preview.prompts)), sampling=sampling)

    @property
    def sources(self) -> tuple[CodesSource, ...]:
        """Folders of codes with their weights; empty if ``codes`` is None."""
        return (CodesSource(folder=self.codes),) if isinstance(self.codes, str) else self.codes or ()


class GeneratorTask:
    """Training task of a generator, for a complete ``cfg``; implements :class:`.trainer.TrainingTask`.

    The text encoder runs on ``device``.
    """

    def __init__(
        self, cfg: GeneratorRunConfig, device: torch.device, model: DiffusionGenerator | ARGenerator | None = None
    ) -> None:
        """Open the data and load the frozen networks; ``model`` None: a new one, built on the CPU from the run's seed."""
        torch.manual_seed(cfg.train.seed)
        self.cfg = cfg
        self.tokenizer_hash = weight_hash(cfg.tokenizer)
        self.encoder: OnlineEncoder | None = None
        captions = CaptionChoice(cfg.short_caption_probability, cfg.caption_drop_probability)
        # The frozen networks: always float32 on a CPU, so that their outputs do not depend on the CPU model.
        dtype = torch.float32 if device.type == "cpu" else compute_dtype(device, cfg.train.precision)
        if cfg.images is not None:
            self.encoder = OnlineEncoder(cfg.tokenizer, device, dtype)
        decoders = cfg.train.workers.decoders
        weights = [source.weight for source in cfg.sources] or [1]

        def load(data: Pattern, seed: int = cfg.train.seed) -> FileData:
            if self.encoder is not None:
                return CaptionedImageData(data, self.encoder.size, seed, captions, decoders=decoders)
            return CodesData(CodesReader(str(data), tokenizer_hash=self.tokenizer_hash), seed, captions)

        given = [cfg.images] if cfg.images is not None else [source.folder for source in cfg.sources]
        sources = [load(each, seed) for seed, each in enumerate(given, cfg.train.seed)]
        self.sources, held_out = hold_out(sources, weights, cfg.train.held_out, load)
        mixed = len(self.sources) > 1
        self.data: Data = Mixture(self.sources, weights, cfg.train.seed) if mixed else self.sources[0]
        self.device = device
        encoder = TextEncoder.from_config(cfg.text_encoder, device=device, dtype=dtype)
        self.text = TextFeatureCache(encoder, cfg.text_cache_bytes)
        self.captions = CaptionTokenizer(self.text.encoder, quiet=ranks()[0] > 0)
        self.encoded: Counter[int] = Counter()
        """Number of the current step's captions that the text encoder has processed, by length with padding."""
        self.text_sizes: TextEncoderSizes | None = None
        if model is None:
            model = build_generator(cfg.model)
            if cfg.start_from is not None:
                model.load_state_dict(trained_generator(cfg.start_from, cfg.model).state_dict())
        model.gradient_checkpointing = self._checkpointing(device)
        self.model: Model = model
        self.discriminator = None
        self.step_module: nn.Module
        if isinstance(model, ARGenerator):
            self.step_module = ARLoss(model)
        else:
            self.step_module = DiffusionLoss(model, cfg.timesteps, cfg.timestep_shift)
        self.held_out = held_out_set(
            cfg.train.held_out, held_out, self.step_module, self._held_out_inputs, self._reduced
        )

    def _checkpointing(self, device: torch.device) -> bool:
        """Resolve the configured gradient checkpointing for ``device``, and log the choice on rank 0."""
        cfg, (rank, world) = self.cfg, ranks()
        without = generator_memory(
            *(cfg.model, TextEncoderSizes.of(self.text.encoder.model), cfg.text_encoder.max_length, cfg.train),
            world=world,
            bf16=compute_dtype(device, cfg.train.precision) == torch.bfloat16,
            tokenizer=self.encoder.bit.cfg if self.encoder else None,
        )
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        chosen, reason = choose_checkpointing(cfg.gradient_checkpointing, without, memory)
        if rank == 0:
            log.info("%s gradient checkpointing (%s)", "with" if chosen else "without", reason)
        return chosen

    def batch(self, step: int, epoch: int, samples: np.ndarray) -> CodesBatch | CaptionedImageBatch:
        """Load the batch with its captions' tokens."""
        found: CodesBatch | CaptionedImageBatch = self.data.batch(epoch, samples)
        return found._replace(tokens=self.captions(found.captions))

    def micro_batches(self, batch: CodesBatch | CaptionedImageBatch, size: int, seeds: Tensor) -> list[dict[str, Any]]:
        """Split as :meth:`.trainer.TrainingTask.micro_batches`; several micro-batches have captions of similar length."""
        tokens = self.captions(batch.captions) if batch.tokens is None else batch.tokens
        order = longest_first(tokens) if len(tokens) > size else np.arange(len(tokens))
        before, parts = self.text.encoded.copy(), []
        for rows in np.split(order, range(size, len(order), size)):
            features, mask = self.text.encode([batch.captions[i] for i in rows], [tokens[i] for i in rows])
            codes = self._codes(batch, rows)
            parts.append({"codes": codes, "features": features, "mask": mask, "seeds": seeds[torch.from_numpy(rows)]})
        self.encoded = self.text.encoded - before
        return parts

    def _codes(self, batch: CodesBatch | CaptionedImageBatch, rows: np.ndarray) -> Tensor:
        """Return codes 0/1, float32 ``[B, L, K]`` on the device, of the given rows."""
        if isinstance(batch, CodesBatch):
            return upload(torch.from_numpy(batch.codes[rows]), self.device).float()
        assert self.encoder is not None
        return self.encoder.encode(batch.pixels[rows])

    def begin(self, batch: CodesBatch | CaptionedImageBatch) -> None:
        """Calibrate the text projections on captions spread over the data set, if configured, unless they are trained."""
        if not self.cfg.calibrate_text or self.cfg.start_from is not None:
            return
        captions: set[str] = set()
        for source in self.sources:
            count = min(CALIBRATION_CAPTIONS // len(self.sources), len(source))
            captions.update(source.column(np.linspace(0, len(source) - 1, count).astype(int), CAPTIONS[0]))
        prompts = sorted(captions)
        features, mask = self.text.encode(prompts, self.text.encoder.tokenize(prompts).ids)
        assert not isinstance(self.model, BIT)
        device = next(self.model.parameters()).device
        self.model.calibrate_text(features.to(device), mask.to(device))

    def before_step(self, step: int) -> None:
        """Do nothing: only the learning rate is scheduled."""

    def flops(self, parts: list[dict[str, Any]]) -> float:
        """Return the FLOP of the generator, of online encoding, and of the captions that the text encoder processed."""
        if self.text_sizes is None:
            self.text_sizes = TextEncoderSizes.of(self.text.encoder.model)
        text = sum(text_encoder_forward(self.text_sizes, length) * count for length, count in self.encoded.items())
        learning = [generator_training(self.cfg.model, p["features"].shape[2]).model * len(p["codes"]) for p in parts]
        each = self.encoder.flops if self.encoder else 0.0
        return text + sum(learning) + each * sum(len(p["codes"]) for p in parts)

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the means, with bit accuracy by timestep for diffusion."""
        return self._reduced(means)

    def _reduced(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        by_time = means.pop(BY_TIME, None)
        return means if by_time is None else means | accuracy_summary(by_time)

    def _held_out_inputs(self, batch: CodesBatch | CaptionedImageBatch, seeds: Tensor) -> dict[str, Any]:
        # Not from the cache: what stands beside a caption in a batch changes its features' last digits.
        # Truncated captions are counted where they are trained on.
        features, mask = pad_features(self.text.encoder.rows(self.text.encoder.tokenize(batch.captions).ids))
        return {
            "codes": self._codes(batch, np.arange(len(batch.captions))),
            "features": features,
            "mask": mask,
            "seeds": seeds,
        }

    def preview_inputs(self) -> PreviewInputs:
        return PreviewInputs(self.cfg.preview.prompts)

    def preview(self, model: Model, inputs: PreviewInputs) -> np.ndarray:
        """Generate one image per prompt."""
        assert not isinstance(model, BIT)
        prompts = list(inputs.labels)
        bit = load_expected(self.cfg.tokenizer, BIT, device=next(model.parameters()).device)
        pipe = InstellaPipeline(model, bit, self.text.encoder, batch_size=len(prompts))
        sampling = self.cfg.preview.model_dump(exclude={"prompts"})
        return np.stack(pipe(prompts, seed=range(len(prompts)), output_type="np", **sampling).images)

    def keys(self, batch: CodesBatch | CaptionedImageBatch) -> list[str]:
        return batch.keys

    def saved(self) -> None:
        """Forget the text features: their last digits depend on what was encoded with them, and a resumed run has none."""
        self.text.clear()

    def close(self) -> None:
        """Log how many captions were truncated."""
        self.captions.close()

    def extra(self) -> Mapping[str, Any]:
        encoder = self.cfg.text_encoder.model_dump(mode="json")
        card = self.cfg.card.model_dump(mode="json")
        return {"text_encoder": encoder, "tokenizer_hash": self.tokenizer_hash, "card": card}


def open_codes(cfg: GeneratorRunConfig) -> list[CodesReader]:
    """Open a reader of each source; UserError for codes of another tokenizer, or without sources."""
    if not cfg.sources:
        raise UserError("codes: expected a folder of packed codes, or a list of {folder, weight}")
    return [CodesReader(source.folder, tokenizer_hash=weight_hash(cfg.tokenizer)) for source in cfg.sources]


def generator_config(model: GeneratorConfig, codes: CodesManifest | BITConfig, text: TextEncoder) -> GeneratorConfig:
    """Return ``model`` with the sizes of the codes and the text encoder; UserError if it sets different ones."""
    facts = {
        "num_tokens": codes.num_tokens,
        "bits_per_token": codes.bits_per_token,
        "layers": text.num_layers,
        "text_width": text.width,
    }
    if model.text_layers == "last" and "layers" in model.model_fields_set:
        facts["layers"] = model.layers  # any number of blocks can read one layer
    for name, value in facts.items():
        if name in model.model_fields_set and getattr(model, name) != value:
            raise UserError(f"model.{name} = {getattr(model, name)}: codes and text encoder require {value}")
    return model.model_copy(update=facts)


def try_text_encoder(cfg: TextEncoderConfig) -> TextEncoder:
    """Load the text encoder for inspection, in bfloat16; UserError if it cannot be loaded."""
    return TextEncoder.from_config(cfg, dtype=torch.bfloat16)


def complete_config(cfg: GeneratorRunConfig) -> GeneratorRunConfig:
    """Return ``cfg`` with the model's sizes filled in and absolute paths, as workers need it.

    UserError for codes of another tokenizer, shards without images, a text encoder that cannot be loaded, sizes that do
    not match them, weights to start from that do not fit, or a ``keep_best`` metric that is not logged.
    """
    cfg = cfg.model_copy(update={"tokenizer": find_model(cfg.tokenizer)})
    folders = None
    codes: CodesManifest | BITConfig

    def check_data(data: Pattern) -> None:
        if cfg.images is not None:
            require_images(data)
        else:
            CodesReader(str(data), tokenizer_hash=weight_hash(cfg.tokenizer))

    if cfg.images is None:
        readers = open_codes(cfg)
        codes = readers[0].manifest
        shares(cfg.train.held_out, [len(reader) for reader in readers], [source.weight for source in cfg.sources])
        folders = tuple(s.model_copy(update={"folder": storage.absolute(s.folder)}) for s in cfg.sources)
    else:
        codes = require_encodable(cfg.images, cfg.tokenizer)
    facts: dict[str, Any] = {
        "model": generator_config(cfg.model, codes, try_text_encoder(cfg.text_encoder)),
        "codes": folders,
        "images": cfg.images and absolute_pattern(cfg.images),
        "text_encoder": cfg.text_encoder.absolute(),
        "train": cfg.train.model_copy(update={"held_out": complete_held_out(cfg.train.held_out, check_data)}),
    }
    check_keep_best(cfg.train, DIFFUSION if facts["model"].kind == "diffusion" else GENERATOR)
    if cfg.start_from is not None:
        facts["start_from"] = checked_generator(cfg.start_from, facts["model"], cfg.tokenizer, facts["text_encoder"])
    return cfg.model_copy(update=facts)


def run_generator(cfg: GeneratorRunConfig) -> str:
    """Train on ``cfg.train.workers`` and return the final checkpoint's folder, a model folder."""
    cfg = complete_config(cfg)  # validates before anything is written and any worker starts
    description = f"{cfg.model.kind} generator"
    inputs = generator_inputs(cfg)
    validator = None
    if cfg.validation is not None:
        in_process = cfg.train.workers.count == 0
        validator = GeneratorValidator(cfg.validation, cfg.train.run_dir, cfg.tokenizer, here=in_process)
    with validating(validator):
        return launch(
            cfg,
            lambda device: GeneratorTask(cfg, device),
            description=description,
            job="train_generator",
            inputs=inputs,
        )


def generator_inputs(cfg: GeneratorRunConfig) -> tuple[Provenance, ...]:
    """Return the provenance of the data, models and weights to start from of a complete configuration."""
    made = (data_provenance("codes", source.folder) for source in cfg.sources)
    data = tuple(made) if cfg.images is None else shard_provenance("shards", cfg.images)
    if cfg.train.held_out is not None and (other := cfg.train.held_out.data) is not None:
        codes = cfg.images is None
        data += (data_provenance("held_out", str(other)),) if codes else shard_provenance("held_out", other)
    parent = () if cfg.start_from is None else (parent_provenance(cfg.start_from),)
    return (*data, model_provenance("tokenizer", cfg.tokenizer), text_encoder_provenance(cfg.text_encoder), *parent)
