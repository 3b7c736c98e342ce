"""Modulations of diffusion schedules: they depend on the timestep alone, so they are computed once and not in each pass.

Without them in the pass, its matrix products have a multiple of the latent's tokens as rows, never the batch's size: the
smallest buckets become usable, and a pass reads a third fewer weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lru import LRUCache
from ..models.generator import DiffusionGenerator
from ..models.sampling import grid_time

CHUNK = 16
"""Consecutive steps computed at once. Fixed, because the last digits of a matrix product depend on its number of rows."""
LIMIT = 256 << 20
"""Maximum size of the cache in bytes."""

Schedule = tuple[int, float, int]
"""Step count and rho of an image, and its next step."""
Key = tuple[int, float, int]
"""Step count, rho and number of the chunk."""
Chunk = tuple[Tensor, ...]
"""Modulations ``[vectors, width]`` of each step."""


class ScheduleModulations:
    """Modulations of each slot's current step, computed in chunks and cached by step count and rho.

    Chunks bound the memory of long schedules: at the paper's size one takes 13 MB in float32. A client that varies rho
    evicts the chunks of others, and costs at most one computation of a chunk for each ``CHUNK`` steps of its images.
    """

    def __init__(self, model: DiffusionGenerator, slots: int, limit: int = LIMIT) -> None:
        """Cache up to ``limit`` bytes, and the chunks in use. The weights of ``model`` must not change afterwards."""
        self.model = model
        with torch.no_grad():
            self.table = model.modulations(model.x_embedder.weight.new_zeros(slots))
        """Modulations of the next pass, ``[slots, vectors, width]``, at a fixed address."""
        # A chunk is a tuple of rows, because indexing a tensor would take longer than looking it up.
        self.chunks: LRUCache[Key, Chunk] = LRUCache(lambda chunk: sum(row.nbytes for row in chunk), limit)
        self.in_use: dict[Key, Chunk] = {}
        """Chunks of the last pass, kept whatever the limit: otherwise many slots could evict each other's every step."""

    @torch.no_grad()
    def load(self, schedules: Sequence[Schedule]) -> None:
        """Write the modulations of each slot's next step to the first rows of the table."""
        keys = [(count, rho, step // CHUNK) for count, rho, step in schedules]
        self.in_use = {key: self.in_use.get(key) or self._chunk(key) for key in dict.fromkeys(keys)}
        rows = [self.in_use[key][step % CHUNK] for key, (_, _, step) in zip(keys, schedules, strict=True)]
        torch.stack(rows, out=self.table[: len(rows)])

    def _chunk(self, key: Key) -> Chunk:
        return self.chunks.get(key, lambda: self._compute(*key))

    def _compute(self, count: int, rho: float, chunk: int) -> Chunk:
        device, dtype = self.table.device, self.table.dtype
        step = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, device=device)
        # Tensors on the device, because numbers might take another path through the power and end in other digits.
        counts, rhos = torch.full_like(step, count), torch.full((CHUNK,), rho, device=device)
        return self.model.modulations(grid_time(step, counts, rhos).to(dtype)).unbind()
