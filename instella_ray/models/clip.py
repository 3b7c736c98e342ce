"""CLIP through open_clip: unit vectors of images and of texts, with the weights of a local file or of a tag."""

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
    """A loaded model, in float32 and eval mode."""

    model: str
    """open_clip's name of the architecture."""
    weights: str | None
    """A local file, or open_clip's tag; none is a random network."""
    device: str
    network: Any
    preprocess: Callable[[Image.Image], Tensor]
    """The model's own resize, crop and normalisation: an image to ``[3, H, W]``."""

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors, float32 ``[B, D]``."""
        planes = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with torch.no_grad():
            return self.network.encode_image(planes, normalize=True).float().cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 ``[B, D]``."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        with torch.no_grad():
            return self.network.encode_text(tokens, normalize=True).float().cpu().numpy()

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of the weights' file, or of the tensors where it is not a local one."""
        is_file = self.weights is not None and Path(self.weights).is_file()
        return file_sha256(self.weights) if is_file and self.weights else weight_hash(self.network)

    def preprocessing(self) -> str:
        """What is done to an image, in words."""
        with contextlib.suppress(AttributeError):  # a plain sentence rather than Python's names of functions
            steps = [type(step).__name__ for step in self.preprocess.transforms]  # type: ignore[attr-defined]
            return f"open_clip: {', '.join(steps)}; {self.network.visual.preprocess_cfg}"
        return " ".join(str(self.preprocess).split())

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self.model)


def require_clip(model: str, weights: str | None, *, asker: str, extra: str) -> int:
    """See to it that ``model`` can be loaded on this machine, and return the length of its vectors.

    Weights of a tag that are not here yet are downloaded. UserError names ``asker`` where open_clip (of ``extra``) is
    not installed, or does not know the model or the tag, or cannot fetch it.
    """
    open_clip = extra_import("open_clip", asker, extra)
    if model not in open_clip.list_models():
        raise UserError(f"{asker}: open_clip has no model '{model}'")
    if weights is not None and not Path(weights).is_file():
        if weights not in open_clip.list_pretrained_tags_by_model(model):
            raise UserError(f"{asker}: weights {weights}: neither a local file nor open_clip's tag of {model}")
        try:
            open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, weights))
        except Exception as error:  # of the network, the hub's client, or the disk
            raise _cannot_load(model, weights, asker, error) from None
    return int(open_clip.get_model_config(model)["embed_dim"])


def load_clip(model: str, weights: str | None, *, asker: str, extra: str, device: str = "cpu") -> Clip:
    """open_clip's ``model`` in float32, after :func:`require_clip`."""
    require_clip(model, weights, asker=asker, extra=extra)
    import open_clip

    # By a tag's name open_clip would only warn that OpenAI's weights need another activation than it builds.
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
