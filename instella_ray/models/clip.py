"""CLIP image and text embeddings with open_clip, with weights from a local file or an open_clip tag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..packages import extra_import
from ..storage import file_sha256
from .checkpoint import weight_hash


@dataclass(frozen=True)
class Clip:
    """CLIP model in float32 and eval mode."""

    model: str
    """open_clip's name of the architecture."""
    weights: str | None
    """Local file or open_clip tag; none means random weights."""
    device: str
    network: Any
    preprocess: Callable[[Image.Image], Tensor]
    """The model's resize, crop and normalization: an image to ``[3, H, W]``."""

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return normalized image embeddings, float32 ``[B, D]``."""
        planes = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with torch.no_grad():
            return self.network.encode_image(planes, normalize=True).float().cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return normalized text embeddings, float32 ``[B, D]``."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        with torch.no_grad():
            return self.network.encode_text(tokens, normalize=True).float().cpu().numpy()

    @property
    def text_limit(self) -> int:
        """Number of tokens, start and end included, to which texts are cut."""
        return int(self._tokenizer.context_length)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Return whether each text has more tokens than :attr:`text_limit`: one more place changes its tokens then."""
        limit = self.text_limit
        short, longer = (self._tokenizer(["", *texts], context_length=length) for length in (limit, limit + 1))
        changed = (longer[1:, :limit] != short[1:]).any(1) | (longer[1:, limit] != longer[0, limit])
        return [bool(yes) for yes in changed]

    @cached_property
    def weights_hash(self) -> str:
        """Sha256 of a local weights file, or of the tensors for a tag or random weights."""
        is_file = self.weights is not None and Path(self.weights).is_file()
        return file_sha256(self.weights) if is_file and self.weights else weight_hash(self.network)

    def preprocessing(self) -> str:
        """Describe the image preprocessing in one line."""
        with contextlib.suppress(AttributeError):  # step names are more readable than the repr of functions
            steps = [type(step).__name__ for step in self.preprocess.transforms]  # type: ignore[attr-defined]
            return f"open_clip: {', '.join(steps)}; {self.network.visual.preprocess_cfg}"
        return " ".join(str(self.preprocess).split())

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self.model)


def require_clip(model: str, weights: str | None, *, asker: str, extra: str) -> int:
    """Check that ``model`` can be loaded on this machine and return its embedding dimension.

    Downloads the weights of a tag if needed. UserError, prefixed with ``asker``, if open_clip (of ``extra``) is not
    installed, does not know the model or the tag, or cannot download it.
    """
    open_clip = extra_import("open_clip", asker, extra)
    if model not in open_clip.list_models():
        raise UserError(f"{asker}: open_clip has no model '{model}'")
    if weights is not None and not Path(weights).is_file():
        if weights not in open_clip.list_pretrained_tags_by_model(model):
            raise UserError(f"{asker}: weights {weights}: expected a local file or an open_clip tag of {model}")
        try:
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, weights))
        except Exception as error:  # errors of the network, the hub's client or the disk
            raise _cannot_load(model, weights, asker, error) from None
    return int(open_clip.get_model_config(model)["embed_dim"])


def load_clip(model: str, weights: str | None, *, asker: str, extra: str, device: str = "cpu") -> Clip:
    """Load open_clip's ``model`` in float32 after :func:`require_clip`; UserError if that fails."""
    require_clip(model, weights, asker=asker, extra=extra)
    import open_clip

    # open_clip only warns if a tag's weights need QuickGELU (OpenAI's), and builds the model without it.
    tag = open_clip.get_pretrained_cfg(model, weights) if weights else {}
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, weights, device=device, force_quick_gelu=tag.get("quick_gelu", False)
        )
    except Exception as error:
        raise _cannot_load(model, weights, asker, error) from None
    network.eval().requires_grad_(False)
    return Clip(model, weights, device, network, preprocess)


def _cannot_load(model: str, weights: str | None, asker: str, error: Exception) -> UserError:
    return UserError(f"{asker}: cannot load {model} from {weights} ({str(error).partition(chr(10))[0]})")
