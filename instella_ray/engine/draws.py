"""Random numbers of the slots, drawn some steps ahead: generating them costs by the call more than by the number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import rng

AHEAD = 16
"""Draws that a slot holds at most. Those of an image that ends early are lost, so not too many."""
NUMBERS = 16_384
"""Numbers that a slot holds at most: where a draw has many, it is they that cost, and none should be lost."""


class Draws:
    """For each slot some consecutive draws of its own seed; the very numbers that :func:`.rng.uniforms` gives."""

    def __init__(self, seed: Tensor, tokens: int, bits: int, stream: int, numbers: int = NUMBERS) -> None:
        """``seed [slots]`` is the engine's own table, which it writes when a slot is given; ``numbers``: see NUMBERS."""
        self.seed, self.stream = seed, stream
        self.ahead = max(1, min(AHEAD, numbers // (tokens * bits)))
        self.first = torch.zeros_like(seed)
        """The first draw that each slot holds."""
        self.table = torch.zeros(len(seed), self.ahead, tokens, bits, device=seed.device)
        self._slot, self._next = (torch.arange(n, device=seed.device) for n in (len(seed), self.ahead))
        self._left = 0

    @property
    def row_tables(self) -> list[Tensor]:
        """Tensors with a row a slot."""
        return [self.first, self.table]

    def start(self, slot: int) -> Tensor:
        """A new seed's draws from 0 on; returns draw 0, ``[tokens, bits]``."""
        self._fill(slice(slot, slot + 1), torch.zeros_like(self.first[:1]))
        return self.table[slot, 0]

    def take(self, draw: Tensor) -> Tensor:
        """Draw ``draw [rows]`` of the first slots, ``[rows, tokens, bits]``.

        Each slot's draws must be consecutive from call to call. Slots without a request get some numbers or other.
        """
        rows = len(draw)
        if self._left == 0:
            # All at once, also those that joined since and still have some.
            self._fill(slice(rows), draw)
            self._left = self.ahead
        self._left -= 1
        return self.table[self._slot[:rows], (draw - self.first[:rows]).clamp(0, self.ahead - 1)]

    def _fill(self, rows: slice, first: Tensor) -> None:
        _, ahead, tokens, bits = self.table.shape
        draw = (first[:, None] + self._next).flatten()
        numbers = rng.uniforms(self.seed[rows].repeat_interleave(ahead), draw, tokens, bits, stream=self.stream)
        self.first[rows] = first
        self.table[rows] = numbers.unflatten(0, (-1, ahead))
