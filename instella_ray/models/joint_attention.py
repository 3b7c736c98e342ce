"""Joint text-image attention and its KV caches.

Text tokens are keys and values only, never queries, and depend on neither the noise nor the timestep. Their projections
are therefore computed once per prompt and reused in all denoising steps and for all AR tokens. :class:`TextKV` holds them
for training and whole batches; :class:`JointCache` holds text and image in one buffer of fixed shape, for continuous
batching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Attention


@dataclass(frozen=True)
class TextKV:
    """Text keys and values of a batch, one tensor each per block."""

    keys: list[Tensor]
    """For each block ``[B, heads, T, D]``."""
    values: list[Tensor]
    mask: Tensor
    """Bool ``[B, T]``, true at real text tokens. A row may be all false (the empty prompt)."""

    def __len__(self) -> int:
        return len(self.mask)

    def of_block(self, block: int) -> TextKV:
        """Select one block's keys and values."""
        return TextKV([self.keys[block]], [self.values[block]], self.mask)

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate the text of the only block with image keys and values ``[B, heads, n, D]``."""
        (keys,), (values,) = self.keys, self.values
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)

    def rows(self, index: Tensor | slice) -> TextKV:
        """Select the rows at ``index``."""
        return TextKV([k[index] for k in self.keys], [v[index] for v in self.values], self.mask[index])

    def last(self, count: int) -> TextKV:
        """Select the last ``count`` text positions."""
        start = self.mask.shape[1] - count
        keys, values = ([part[:, :, start:] for part in parts] for parts in (self.keys, self.values))
        return TextKV(keys, values, self.mask[:, start:])

    def clone(self) -> TextKV:
        """Copy all tensors."""
        return TextKV([k.clone() for k in self.keys], [v.clone() for v in self.values], self.mask.clone())

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(part.nbytes for part in (*self.keys, *self.values, self.mask))

    def expand(self, batch: int) -> TextKV:
        """Expand a single row to ``batch`` rows without copying."""
        keys = [k.expand(batch, -1, -1, -1) for k in self.keys]
        return TextKV(keys, [v.expand(batch, -1, -1, -1) for v in self.values], self.mask.expand(batch, -1))

    def padded(self, length: int) -> TextKV:
        """Left-pad to ``length`` text positions."""
        extra = length - self.mask.shape[1]
        if extra == 0:
            return self
        pad = torch.nn.functional.pad
        keys = [pad(k, (0, 0, extra, 0)) for k in self.keys]
        return TextKV(keys, [pad(v, (0, 0, extra, 0)) for v in self.values], pad(self.mask, (extra, 0)))

    @staticmethod
    def cat(parts: Sequence[TextKV]) -> TextKV:
        """Concatenate the rows of ``parts``; shorter texts are padded to the longest."""
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
    """Preallocated keys and values of [text; image], so that steps do not concatenate.

    Each step writes image positions: diffusion all of them, AR one per row. Rows can be written, moved and viewed
    (:meth:`view`) while the buffers keep their addresses, as CUDA graphs require. Each block has buffers of its own: compiled
    code would copy one that is common to all for every block that writes to it.
    """

    keys: list[Tensor]
    """For each block ``[rows, heads, T + L, D]``."""
    values: list[Tensor]
    mask: Tensor
    """Bool ``[rows, T]``, true at real text tokens."""

    @classmethod
    def empty(cls, rows: int, text_length: int, tokens: int, like: Sequence[Tensor]) -> JointCache:
        """Allocate ``rows`` zero rows; ``like`` are tensors ``[*, heads, *, D]`` with each block's shape and dtype."""
        shapes = [(rows, k.shape[1], text_length + tokens, k.shape[3]) for k in like]
        keys, values = ([k.new_zeros(s) for k, s in zip(like, shapes, strict=True)] for _ in range(2))
        return cls(keys, values, torch.zeros(rows, text_length, dtype=torch.bool, device=like[0].device))

    @classmethod
    def of(cls, text: TextKV, tokens: int) -> JointCache:
        """Build a cache with the rows of ``text`` and ``tokens`` image positions."""
        cache = cls.empty(len(text), text.mask.shape[1], tokens, text.keys)
        cache.put(slice(None), text)
        return cache

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def text_length(self) -> int:
        """Number of text positions per row."""
        return self.mask.shape[1]

    def put(self, rows: int | slice, text: TextKV) -> None:
        """Write ``text`` in place, padded to this cache's length; it has one row per row of ``rows``, or one for all."""
        start = self.text_length - text.mask.shape[1]
        for buffer, part in zip(self.keys + self.values, text.keys + text.values, strict=True):
            buffer[rows, :, :start] = 0
            buffer[rows, :, start : self.text_length] = part
        self.mask[rows, :start] = False
        self.mask[rows, start:] = text.mask

    def move(self, source: int | Tensor, target: int | Tensor) -> None:
        """Copy the row ``source`` to the row ``target``, or rows ``[n]`` to rows ``[n]``, which may be the same ones."""
        for buffer in (*self.keys, *self.values, self.mask):
            buffer[target] = buffer[source]

    def view(self, rows: slice) -> JointCache:
        """Return a view of ``rows``; writes change this cache."""
        return JointCache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.mask[rows])

    def of_block(self, block: int) -> JointCache:
        """Select one block's buffers; writes change this cache."""
        return JointCache([self.keys[block]], [self.values[block]], self.mask)

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write image keys and values to all image positions of the only block; returns those of [text; image]."""
        (keys,), (values,) = self.keys, self.values
        keys[:, :, self.text_length :] = k
        values[:, :, self.text_length :] = v
        return keys, values

    def write(self, block: int, position: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one image token ``[rows, heads, 1, D]`` at each row's ``position [rows]``; returns the whole buffers."""
        row = torch.arange(len(position), device=position.device)
        self.keys[block][row, :, self.text_length + position] = k[:, :, 0]
        self.values[block][row, :, self.text_length + position] = v[:, :, 0]
        return self.keys[block], self.values[block]


class JointAttention(Attention):
    """Attention of image queries to [text; image] keys; text and image share the key and value projections."""

    def forward(self, y: Tensor, context: TextKV | JointCache, mask: Tensor) -> Tensor:
        """Attend from ``y [B, n, width]`` to the text of one block, ``context``, and to ``y``; returns ``[B, n, width]``.

        ``mask`` bool, broadcastable to ``[B, 1, n, T + n]``, is true for visible keys.
        """
        k, v = context.join(*self.key_value(y))
        return self.attend(self.query(y), k, v, mask)

    def attend_token(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attend as :meth:`attend` with one query per row, ``[B, heads, 1, D]``, independently of the batch size.

        PyTorch's CPU kernel splits the keys of a single query among threads depending on the number of rows, so that its
        summation order changes with the batch size. Plain matrix products avoid that, and are faster from about 16 rows.
        """
        if q.device.type != "cpu" or q.dtype != torch.float32:
            return self.attend(q, k, v, mask)
        # Flattened before the products: of rows that are not adjacent in memory the copy has the layout of the rows.
        rows, (keys, values) = q.flatten(0, 1), (x.flatten(0, 1) for x in (k, v))
        scores = (rows @ keys.transpose(1, 2)).unflatten(0, q.shape[:2]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out = (weights.flatten(0, 1) @ values).unflatten(0, q.shape[:2])
        return self.o_proj(out.transpose(1, 2).flatten(2))
