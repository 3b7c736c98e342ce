"""Bulk sampler over the step engine: prompts to codes, with different settings in one batch. Independent of Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ..accelerator import Precision, pick_device
from ..engine.engine import Request
from ..engine.events import Finished, Progress
from ..engine.slots import EngineOptions
from ..engine.weights import load_engine, serving_dtype
from ..models.sampling import SamplingConfig, SamplingParams
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .plan import Planned, own_sampling


@dataclass(frozen=True)
class SamplerOptions:
    """Model, text encoder and engine settings of a sampler."""

    model: str
    """Model folder."""
    text_encoder: TextEncoderConfig
    engine: EngineOptions
    precision: Precision = "auto"
    threads: int = 1
    """CPU threads."""
    device: str = "auto"


class Sampler:
    """Sampler of one model: a text encoder and a step engine.

    Bits are identical to those of the endpoint for the same seed and settings: each prompt is encoded separately, and
    the engine's rows do not depend on the other rows of the batch. Where the device gives sizes of batches different bits,
    engines of another number of slots may choose other sizes: :func:`..engine.buckets.plan_passes`.
    """

    def __init__(self, options: SamplerOptions) -> None:
        torch.set_num_threads(options.threads)
        device = pick_device(options.device)
        dtype = serving_dtype(device, options.precision)
        self.encoder = TextEncoder.from_config(options.text_encoder, device=device, dtype=dtype)
        self.engine = load_engine(
            options.model, self.encoder.encode_prompt(""), options.engine, device, options.precision
        )

    def run(self, samples: Sequence[Planned], settings: Mapping[str, SamplingConfig]) -> dict[str, np.ndarray]:
        """Return codes, uint8 0/1 ``[N, L, K]``, of all ``samples`` with each of the ``settings``, by setting name.

        What a prompt's row gives itself (:func:`.plan.own_sampling`) comes before the settings.
        """
        cfg = self.engine.slots.model.cfg
        codes = {name: np.zeros((len(samples), cfg.num_tokens, cfg.bits_per_token), np.uint8) for name in settings}
        for event in self.engine.run(self._requests(samples, settings)):
            if isinstance(event, Finished):
                number, _, name = event.id.partition(" ")
                codes[name][int(number)] = event.codes.numpy()
        return codes

    def run_with_steps(
        self, samples: Sequence[Planned], sampling: SamplingConfig, every: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the number of a sample, its completed steps and the most likely final bits, uint8 0/1 ``[L, K]``.

        Each sample comes after every ``every`` steps, and after the last one with the bits of :meth:`run`. Tokens that an
        autoregressive model has not generated yet are 0.
        """
        total = self.engine.slots.steps(SamplingParams.of(1, **sampling.model_dump()))
        for event in self.engine.run(self._requests(samples, {"": sampling}, every)):
            number = int(event.id.partition(" ")[0])
            if isinstance(event, Finished):
                yield number, total, event.codes.numpy()
            elif isinstance(event, Progress):
                yield number, event.step, event.estimate.numpy()

    def _requests(
        self, samples: Sequence[Planned], settings: Mapping[str, SamplingConfig], preview_every: int = 0
    ) -> Iterator[Request]:
        for text, group in groupby(enumerate(samples), key=lambda numbered: numbered[1].prompt.text):
            features, numbered = self.encoder.encode_prompt(text), list(group)
            # A prompt that does not come again would only take memory in the engine's cache.
            prompt = text if len(numbered) * len(settings) > 1 else None
            for number, sample in numbered:
                for name, sampling in settings.items():
                    own = own_sampling(sample.prompt, sampling)
                    params = SamplingParams.of(1, seed=sample.seed, **own.model_dump())
                    yield Request(f"{number} {name}", features, params, preview_every=preview_every, prompt=prompt)
