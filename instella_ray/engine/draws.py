"""Random numbers of the engine's slots, drawn several steps ahead because each call has a high fixed cost."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import rng

AHEAD = 16
"""Maximum number of draws buffered per slot; limited because those left over when an image ends early are wasted."""
NUMBERS = 16_384
"""Maximum number of random values buffered per slot: for large draws the values, not the calls, dominate the cost."""


def draws_ahead(tokens: int, bits: int, numbers: int = NUMBERS) -> int:
    """Return how many draws of ``tokens x bits`` values are buffered per slot."""
    return max(1, min(AHEAD, numbers // (tokens * bits)))


class Draws:
    """Buffer of consecutive draws for each slot's seed, identical to the values of :func:`..models.rng.uniforms`."""

    def __init__(self, seed: Tensor, tokens: int, bits: int, stream: int, numbers: int = NUMBERS) -> None:
        """``seed [slots]``: the engine's table, updated in place when a slot is assigned; ``numbers``: see NUMBERS."""
        self.seed, self.stream, self.tokens = seed, stream, tokens
        self.ahead = draws_ahead(tokens, bits, numbers)
        self.first = torch.zeros_like(seed)
        """Index of the first buffered draw of each slot, ``[slots]``."""
        self.table = torch.zeros(len(seed), self.ahead, tokens, bits, device=seed.device)
        self._slot, self._next = (torch.arange(n, device=seed.device) for n in (len(seed), self.ahead))
        self._left = 0

    @property
    def row_tables(self) -> list[Tensor]:
        """Tensors with one row per slot."""
        return [self.first, self.table]

    def start(self, slot: int) -> Tensor:
        """Buffer the draws of a slot's new seed from draw 0 on; return draw 0, ``[tokens, bits]``."""
        self._fill(slice(slot, slot + 1), torch.zeros_like(self.first[:1]))
        return self.table[slot, 0]

    def due(self) -> bool:
        """Count a step and return whether :meth:`fill` must precede it: since its last call, all draws were taken."""
        self._left = (self._left or self.ahead) - 1
        return self._left == self.ahead - 1

    def fill(self, draw: Tensor) -> None:
        """Buffer the draws of the first slots, given the index ``draw [n]`` of each one's next draw.

        All in one call, those included that started later and still have draws.
        """
        self._fill(slice(len(draw)), draw)

    def take(self, draw: Tensor) -> Tensor:
        """Return the draws ``draw [n]`` of the first slots, ``[n, tokens, bits]``.

        A slot's index advances by at most one from step to step. Slots without a request get arbitrary values.
        """
        return self.table[self._slot[: len(draw)], (draw - self.first[: len(draw)]).clamp(0, self.ahead - 1)]

    def _fill(self, rows: slice, first: Tensor) -> None:
        _, ahead, tokens, bits = self.table.shape
        draw = (first[:, None] + self._next).flatten()
        numbers = rng.uniforms(self.seed[rows].repeat_interleave(ahead), draw, tokens, bits, stream=self.stream)
        self.first[rows] = first
        self.table[rows] = numbers.unflatten(0, (-1, ahead))
