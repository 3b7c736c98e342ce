"""Keys and values of prompts, projected once for all requests with the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..accelerator import upload
from ..errors import UserError
from ..lru import LRUCache
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import TextKV


class PromptProjector:
    """Projector of text features by a generator, with a cache by prompt of ``limit`` bytes."""

    def __init__(self, model: DiffusionGenerator | ARGenerator, length: int, limit: int) -> None:
        """``length``: text positions of a slot. The weights of ``model`` must not change afterwards."""
        self.model, self.length = model, length
        self.cache: LRUCache[str, TextKV] = LRUCache(lambda text: text.nbytes, limit)

    def __call__(self, features: Tensor, prompt: str | None = None) -> TextKV:
        """Project ``features [layers, T, width]`` to one row of T text positions; ``prompt`` is the key of the cache.

        Raises UserError for more positions than a slot has.
        """
        if prompt is None:
            return self._project(features)
        return self.cache.get(prompt, lambda: self._project(features).clone())

    @torch.no_grad()
    def _project(self, features: Tensor) -> TextKV:
        """Project after padding to the slot's length: for a fixed shape, so that every prompt's bits are its own."""
        layers, count, width = features.shape
        weight, start = self.model.x_embedder.weight, self.length - count
        if start < 0:
            raise UserError(f"text_length {self.length}: the empty prompt alone has {count} tokens")
        padded = torch.zeros(layers, 1, self.length, width, dtype=weight.dtype, device=weight.device)
        mask = torch.zeros(1, self.length, dtype=torch.bool, device=weight.device)
        padded[:, 0, start:] = upload(features, weight.device)
        mask[:, start:] = True
        return self.model.text_kv(padded, mask).last(count)
