"""Slots of an engine on its device: their tensors, and the passes that advance the images in them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..accelerator import upload
from ..errors import UserError
from ..models.eight_bit import Quantization
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import JointCache, TextKV
from ..models.sampling import SAMPLERS, SamplingConfig, SamplingParams
from .buckets import Passes, agreeing_sizes, bucket_sizes, buckets_of, described, each_by_itself, plan_passes
from .compilation import Compilation, Recorded, check_compilation, compiled
from .draws import Draws
from .modulations import Schedule
from .prompts import PromptProjector
from .scheduling import Scheduling

log = logging.getLogger(__name__)

PERIOD = 3
"""Slots after which the content repeats while the buckets are determined: odd, unlike the tiles of kernels."""


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine."""

    slots: int = 8
    """Maximum number of images processed at once."""
    text_length: int = 128
    """Maximum number of prompt tokens per slot."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs of whole steps, one per bucket, and
    ``compile+graphs`` for both: compiled, then recorded."""
    batch_invariant: bool = True
    """Use only passes of rows that give the same bits on this device. False uses all buckets: faster on some devices, but
    an image may then depend on the other requests in the batch."""
    scheduling: Scheduling = "fifo"
    """``fifo``: every step advances all slots, free ones are assigned in order of submission. ``deadline``: requests
    that can end within :data:`.scheduling.ALLOWANCE` times the time they take alone come first, and the others may
    pause meanwhile. The bits of an image are the same."""
    prompt_cache_bytes: int = 256 << 20
    """Maximum size of the cache of projected prompts; the latest one is kept whatever its size."""
    quantization: Quantization = "none"
    """Rounding of the model's large matrices and their inputs to eight bits (:mod:`..models.eight_bit`)."""


class Slots(ABC):
    """Slot table: tensors with one row per slot, which keep their addresses; :mod:`.kinds` implements the two generators.

    Rows of the network's batch are interleaved: row 2i is slot i with its prompt, row 2i + 1 slot i without a prompt. A
    pass in which no request has guidance leaves out the rows without a prompt. No method waits for the device.
    """

    model: DiffusionGenerator | ARGenerator
    draws: Draws

    def __init__(self, model: DiffusionGenerator | ARGenerator, empty_prompt: Tensor, options: EngineOptions) -> None:
        """Allocate the slots; :meth:`prepare` must follow.

        ``empty_prompt``: features ``[layers, T, width]`` of the unconditional prompt (T may be 0). Raises UserError for
        ``slots`` below 1, an empty prompt longer than ``text_length``, and graphs without a GPU.
        """
        check_compilation(options.compilation)
        self.options, self.count = options, options.slots
        weight, cfg = model.x_embedder.weight, model.cfg
        if self.count < 1:
            raise UserError(f"slots {self.count}: expected at least 1")
        self.sizes = bucket_sizes(self.count)
        self.device = weight.device
        self.position = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        self.params = SamplingParams.of(self.count).map(lambda value: value.to(self.device))
        self.simplified = [False] * self.count
        """Whether the image in each slot has the sampler ``simplified``; known without asking the device."""
        self.z = weight.new_zeros(self.count, cfg.num_tokens, cfg.bits_per_token)
        self.project = PromptProjector(model, options.text_length, options.prompt_cache_bytes)
        self._unconditional = self.project(empty_prompt)
        self.cache = JointCache.empty(2 * self.count, options.text_length, cfg.num_tokens, self._unconditional.keys)
        self.network = compiled(self._network, options.compilation)
        self.advance: Callable[..., None] = self._advance
        self.draw_ahead: Callable[..., None] = self._draw_ahead

    @torch.no_grad()
    def prepare(self) -> None:
        """Determine the buckets, with noise in all slots, which must be free, and record their graphs.

        As all other computations, within :func:`..accelerator.sampling_on`.
        """
        options, sizes = self.options, self.sizes
        self._fill_with_noise()
        self.passes: Passes = each_by_itself(sizes)
        if options.batch_invariant:
            groups = agreeing_sizes(self.forward, sizes, PERIOD)
            # A pass computes the tokens for which its step draws.
            self.passes = plan_passes(groups, sizes, self.draws.tokens)
        self.buckets = buckets_of(self.passes)
        log.info("buckets of %d slots: %s", self.count, described(self.passes))
        if len(self.buckets[2]) == 1 < self.count:
            log.warning("only one bucket: every step, also of a single image, costs as much as %d images", self.count)
        if "graphs" in options.compilation:
            self.advance = Recorded(self._advance, list(self.passes))
            self.draw_ahead = Recorded(self._draw_ahead, [(rows,) for rows in sizes])
        # Rows with a prompt are overwritten when a slot is assigned; rows without a prompt never change.
        self.cache.put(slice(None), self._unconditional)

    @torch.no_grad()
    def admit(self, slot: int, numbers: Mapping[str, float], text: TextKV) -> None:
        """Start an image in ``slot`` with the sampling parameters ``numbers`` and a projected prompt."""
        # Filled, because a number that is assigned to an element is copied to it from the host, which waits.
        self.position[slot].fill_(0)
        self.simplified[slot] = numbers["sampler"] == SAMPLERS["simplified"]
        for name, number in numbers.items():
            getattr(self.params, name)[slot].fill_(number)
        self.cache.put(2 * slot, text)
        self._start(slot)

    @torch.no_grad()
    def step(self, rows: int, branches: int, schedules: Sequence[Schedule], occupied: int) -> None:
        """Advance the images in the first ``rows`` slots, a bucket of ``branches``, by one step.

        ``schedules`` are those of the images in these slots; ``occupied``: number of slots with an image.
        """
        self._load(schedules)
        if self.draws.due():
            self.draw_ahead(next(size for size in self.sizes if size >= max(rows, occupied)))
        self.advance(rows, branches)

    @torch.no_grad()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the rows of the slots ``sources`` to those of ``targets``; both may hold the same slots."""
        source, target = (upload(torch.tensor(slots), self.device) for slots in (sources, targets))
        for table in (self.position, self.z, *self._row_tables(), *vars(self.params).values()):
            table[target] = table[source]
        moved = [self.simplified[slot] for slot in sources]
        for slot, value in zip(targets, moved, strict=True):
            self.simplified[slot] = value
        for branch in range(2):
            self.cache.move(2 * source + branch, 2 * target + branch)

    @torch.no_grad()
    def forward(self, rows: int, branches: int) -> Tensor:
        """Run the network on the first ``rows`` slots, ``[branches * rows, ..., K]``, as :data:`.buckets.Forward`."""
        outputs, first = [], 0
        for count in self.passes.get((rows, branches), (rows,)):
            slots = slice(first, first + count)
            # Rows of both branches of each slot, or those with a prompt.
            cached = self.cache.view(slice(2 * slots.start, 2 * slots.stop, 2 // branches))
            outputs.append(self.network(branches, cached, *self._inputs(slots)))
            first += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _advance(self, rows: int, branches: int) -> None:
        """Run the network, and sample the next ``z`` of the first ``rows`` slots from its outputs."""
        self._sample(rows, *self.forward(rows, branches).unflatten(0, (rows, branches)).unbind(1))
        self.position[:rows] += 1

    def _draw_ahead(self, rows: int) -> None:
        self.draws.fill(self._draw(rows))

    def _fill_with_noise(self) -> None:
        """Fill the slots with noise, every ``PERIOD``-th one with the same."""
        cfg, noise = self.model.cfg, torch.Generator().manual_seed(0)
        rows = [slot % PERIOD for slot in range(self.count)]
        self.z.copy_((torch.rand(PERIOD, *self.z.shape[1:], generator=noise) < 0.5)[rows])
        steps = SamplingConfig().num_inference_steps
        position = [row % min(cfg.num_tokens, steps) for row in rows]
        self.position.copy_(torch.tensor(position))
        texts = [
            self.project(torch.randn(cfg.layers, self.options.text_length, cfg.text_width, generator=noise))
            for _ in range(PERIOD)
        ]
        for slot, row in enumerate(rows):
            self.cache.put(2 * slot, texts[row])
        self._load([(steps, 1.0, done) for done in position])

    @abstractmethod
    def steps(self, params: SamplingParams) -> int:
        """Return the total number of steps of a request."""

    @abstractmethod
    def estimate(self, slot: int) -> Tensor:
        """Return the most likely final bits of a slot after its last step, 0/1 ``[L, K]``."""

    @abstractmethod
    def _load(self, schedules: Sequence[Schedule]) -> None:
        """Fill the tables that depend on the next step of the first slots; compiled code and graphs read them."""

    @abstractmethod
    def _start(self, slot: int) -> None:
        """Initialize a newly occupied slot."""

    @abstractmethod
    def _inputs(self, slots: slice) -> tuple[Tensor, ...]:
        """Return the rows of the network's inputs, without the cache."""

    @abstractmethod
    def _network(self, branches: int, cache: JointCache, *inputs: Tensor) -> Tensor:
        """Run the network on rows of the slots; a function of nothing else, so that it may be compiled."""

    @abstractmethod
    def _draw(self, rows: int) -> Tensor:
        """Return the index of each slot's next draw, ``[rows]``."""

    @abstractmethod
    def _sample(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        """Update the ``z`` of the first ``rows`` slots from the network's outputs; no ``uncond``: no row has guidance."""

    def _row_tables(self) -> list[Tensor]:
        """Additional tensors with one row per slot."""
        return self.draws.row_tables
