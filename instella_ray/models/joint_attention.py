"""Text keys and values: computed once a prompt, seen by every step of both generators.

Text tokens are keys and values only, never queries, and depend on neither the noise nor the timestep. So their
projections are a function of the prompt alone and can be kept over all denoising steps and all AR tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Attention


@dataclass(frozen=True)
class TextKV:
    """Projected text of a batch: one key and one value tensor a block."""

    keys: list[Tensor]
    """For each block ``[B, heads, T, D]``."""
    values: list[Tensor]
    mask: Tensor
    """True where a text token is real, bool ``[B, T]``. A row may be all false (the empty prompt)."""

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, index: Tensor | slice) -> TextKV:
        """The rows at ``index``."""
        return TextKV([k[index] for k in self.keys], [v[index] for v in self.values], self.mask[index])

    def expand(self, batch: int) -> TextKV:
        """One row seen as ``batch`` equal ones, without a copy."""
        keys = [k.expand(batch, -1, -1, -1) for k in self.keys]
        return TextKV(keys, [v.expand(batch, -1, -1, -1) for v in self.values], self.mask.expand(batch, -1))

    def padded(self, length: int) -> TextKV:
        """Padded on the left to ``length`` text positions."""
        extra = length - self.mask.shape[1]
        if extra == 0:
            return self
        pad = torch.nn.functional.pad
        keys = [pad(k, (0, 0, extra, 0)) for k in self.keys]
        return TextKV(keys, [pad(v, (0, 0, extra, 0)) for v in self.values], pad(self.mask, (extra, 0)))

    @staticmethod
    def cat(parts: Sequence[TextKV]) -> TextKV:
        """All rows of ``parts`` in order; shorter texts are padded to the longest."""
        length = max(part.mask.shape[1] for part in parts)
        parts = [part.padded(length) for part in parts]
        layers = range(len(parts[0].keys))
        return TextKV(
            [torch.cat([part.keys[i] for part in parts]) for i in layers],
            [torch.cat([part.values[i] for part in parts]) for i in layers],
            torch.cat([part.mask for part in parts]),
        )


class JointAttention(Attention):
    """Image queries over [text; image] keys; text and image share the key and value projections."""

    def forward(self, y: Tensor, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """``y [B, n, width]`` attends to text keys/values ``[B, heads, T, D]`` and to itself.

        ``mask`` bool, broadcastable to ``[B, 1, n, T + n]``, is true where a key is seen.
        """
        k, v = self.key_value(y)
        return self.attend(self.query(y), torch.cat((text[0], k), dim=2), torch.cat((text[1], v), dim=2), mask)
