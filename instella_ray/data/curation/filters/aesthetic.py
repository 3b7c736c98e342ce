"""Aesthetic score filter: a CLIP embedding and LAION's linear head (V1), or the multi-layer head of the improved
predictor (V2), which has no activations and so is an affine map too."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from .... import storage
from ....config import InputPath
from ....errors import UserError
from .base import LONGEST, ImageFilter, Scale, ScoreLimits, Scorer, Scores

if TYPE_CHECKING:
    from torch import Tensor

V2_WIDTHS = [1024, 128, 64, 16]


class Aesthetic(ImageFilter):
    """Keeps images whose rating predicted by LAION's aesthetic predictor, about 1 to 10, is at least ``minimum``."""

    scales: ClassVar[Mapping[str, Scale]] = {"aesthetic": Scale(0, 10)}
    requires: ClassVar[tuple[str, ...]] = ("open_clip",)
    decode_size: ClassVar[int] = 512
    files: ClassVar[tuple[str, ...]] = ("weights", "head")

    model: str = "ViT-L-14"
    """open_clip name of the model; for a local file of OpenAI's weights: ``ViT-L-14-quickgelu``."""
    weights: str = "openai"
    """Local file, or open_clip tag of weights, which may be downloaded."""
    head: InputPath
    """Path or URL of the head for that model: safetensors, or a PyTorch file of plain tensors.

    LAION's are ``sa_0_4_vit_l_14_linear.pth`` (V1) and ``sac+logos+ava1-l14-linearMSE.pth`` (V2).
    """
    minimum: float = 4.5
    """Minimum score; the LAION-Aesthetics subsets are the images above 4.5 (largest), 5, 6 or 6.5."""

    def check(self) -> None:
        super().check()
        from ....models.clip import require_clip

        vector, _ = read_head(self.head, self.label)
        width = require_clip(self.model, self.weights, asker=self.label, extra="curate")
        if len(vector) != width:
            raise UserError(
                f"{self.label}.head {self.head}: for embeddings of size {len(vector)}; expected {width}, of {self.model}"
            )

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"aesthetic": ("aesthetic", ScoreLimits(minimum=self.minimum))}

    def load(self, device: str) -> Scorer:
        from ....models.clip import load_clip

        vector, bias = read_head(self.head, self.label)
        clip = load_clip(self.model, self.weights, asker=self.label, extra="curate", device=device)

        def score(images: Sequence[Image.Image]) -> list[Scores]:
            embeddings = clip.embed_images([middle(image) for image in images])
            return [{"aesthetic": float(value)} for value in embeddings @ vector + bias]

        return score


def middle(image: Image.Image) -> Image.Image:
    """Crop very long images to their middle part: CLIP uses a centre crop, but would first resize the whole image."""
    most = LONGEST * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_head(url: str, asker: str) -> tuple[np.ndarray, float]:
    """Read a head as one affine map: weights float64 ``[D]``, and the bias.

    The shapes determine the version: one layer ``[1, D]`` (V1), or five with the widths :data:`V2_WIDTHS` (V2). Raises
    UserError naming ``asker`` and the file if it is neither, or has values that are not finite.
    """
    found = re.compile(r"(.*?)(weight|bias)")
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _tensors(url, asker).items():
        parts = found.fullmatch(name)
        prefix, kind = parts.groups() if parts else (name, "")
        layers.setdefault(prefix, {})[kind] = tensor.double().numpy()
    ordered = [layers[name] for name in sorted(layers, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
    if not ordered or any(layer.keys() != {"weight", "bias"} for layer in ordered):
        raise _no_head(url, asker)
    width = ordered[0]["weight"].shape[-1] if ordered[0]["weight"].ndim else 0
    widths = [width, *(V2_WIDTHS if len(ordered) > 1 else []), 1]
    expected = [((out, into), (out,)) for into, out in pairwise(widths)]
    if [(layer["weight"].shape, layer["bias"].shape) for layer in ordered] != expected:
        raise _no_head(url, asker)
    matrix, bias = np.eye(width), np.zeros(width)
    for layer in ordered:
        matrix, bias = layer["weight"] @ matrix, layer["weight"] @ bias + layer["bias"]
    if not np.isfinite([*matrix[0], bias[0]]).all():
        raise UserError(f"{asker}.head {url}: has weights that are not finite")
    return matrix[0], float(bias[0])


def _tensors(url: str, asker: str) -> Mapping[str, Tensor]:
    """Read the tensors of a file. Pickles are read with ``weights_only=True``, so that no code in them runs."""
    import safetensors.torch
    import torch

    try:
        data = storage.read_bytes(url)
    except OSError as error:
        raise UserError(f"{asker}.head {url}: cannot be read ({error})") from None
    try:
        if url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious file can raise any exception
        raise UserError(f"{asker}.head {url}: refused, not a file of plain tensors ({type(error).__name__})") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _no_head(url, asker)
    return content


def _no_head(url: str, asker: str) -> UserError:
    deep = "-".join(map(str, V2_WIDTHS))
    return UserError(f"{asker}.head {url}: expected weight and bias of one layer D-1 (V1), or of D-{deep}-1 (V2)")
