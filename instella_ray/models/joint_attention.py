"""Keys and values of [text; image]: text computed once a prompt, seen by every step of both generators.

Text tokens are keys and values only, never queries, and depend on neither the noise nor the timestep. So their
projections are a function of the prompt alone and can be kept over all denoising steps and all AR tokens.
:class:`TextKV` holds them as they come, for training and whole batches; :class:`JointCache` keeps text and image in
one buffer of fixed shape, for engines whose rows come and go.
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

    def join(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [text; image] for ``block``, given those of the image, ``[B, heads, n, D]``."""
        return torch.cat((self.keys[block], k), dim=2), torch.cat((self.values[block], v), dim=2)

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


@dataclass(frozen=True)
class JointCache:
    """Keys and values of [text; image] in place: nothing is concatenated when a step is taken.

    Image positions are written by the step itself: all of them by diffusion, one a row by AR. Rows can be filled,
    moved and looked at through :meth:`first` while the buffers stay where they are, as recorded GPU graphs need.
    """

    keys: list[Tensor]
    """For each block ``[rows, heads, T + L, D]``."""
    values: list[Tensor]
    mask: Tensor
    """True where a text token is real, bool ``[rows, T]``."""

    @classmethod
    def empty(cls, rows: int, text_length: int, tokens: int, like: Sequence[Tensor]) -> JointCache:
        """Room for ``rows`` rows; ``like`` are tensors ``[*, heads, *, D]`` that give each block's shape and dtype."""
        shapes = [(rows, k.shape[1], text_length + tokens, k.shape[3]) for k in like]
        keys, values = ([k.new_zeros(s) for k, s in zip(like, shapes, strict=True)] for _ in range(2))
        return cls(keys, values, torch.zeros(rows, text_length, dtype=torch.bool, device=like[0].device))

    @classmethod
    def of(cls, text: TextKV, tokens: int) -> JointCache:
        """A cache whose rows are those of ``text``, with room for ``tokens`` image tokens."""
        cache = cls.empty(len(text), text.mask.shape[1], tokens, text.keys)
        cache.put(slice(None), text)
        return cache

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def text_length(self) -> int:
        """Text positions of every row."""
        return self.mask.shape[1]

    def put(self, rows: int | slice, text: TextKV) -> None:
        """Write ``text`` (padded to this cache's length, one row for each of ``rows`` or one for all) in place."""
        for buffer, part in zip(self.keys + self.values, text.keys + text.values, strict=True):
            buffer[rows, :, : self.text_length] = part
        self.mask[rows] = text.mask

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for buffer in (*self.keys, *self.values, self.mask):
            buffer[target] = buffer[source]

    def first(self, rows: int) -> JointCache:
        """The first ``rows`` rows, as a view that writes through."""
        return JointCache([k[:rows] for k in self.keys], [v[:rows] for v in self.values], self.mask[:rows])

    def join(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`TextKV.join`; overwrites the image positions."""
        self.keys[block][:, :, self.text_length :] = k
        self.values[block][:, :, self.text_length :] = v
        return self.keys[block], self.values[block]

    def write(self, block: int, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put one image token ``[rows, heads, 1, D]`` at each row's ``position [rows]``; returns the whole buffers."""
        row = torch.arange(len(position), device=position.device)
        self.keys[block][row, :, self.text_length + position] = k[:, :, 0]
        self.values[block][row, :, self.text_length + position] = v[:, :, 0]
        return self.keys[block], self.values[block]


class JointAttention(Attention):
    """Image queries over [text; image] keys; text and image share the key and value projections."""

    def forward(self, y: Tensor, context: TextKV | JointCache, block: int, mask: Tensor) -> Tensor:
        """``y [B, n, width]`` attends to the text of ``context`` at depth ``block`` and to itself.

        ``mask`` bool, broadcastable to ``[B, 1, n, T + n]``, is true where a key is seen.
        """
        k, v = context.join(block, *self.key_value(y))
        return self.attend(self.query(y), k, v, mask)

    def attend_token(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`attend`, for one query a row, ``[B, heads, 1, D]``, whose numbers don't depend on the batch.

        The library's kernel shares a single query's keys among the processor's threads by the number of rows, and sums
        in another order for another batch. Plain products do not, and are faster from some 16 rows on.
        """
        if q.device.type != "cpu" or q.dtype != torch.float32:
            return self.attend(q, k, v, mask)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2))
