"""ImageReward's official network, for an isolated environment (:mod:`instella_ray.evaluation.image_reward_actor`) or here.

It needs the package image-reward and transformers 4, which conflicts with this project's. Apart from numpy and Pillow, its
packages are imported only when it is made.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

RELEASE = "ImageReward-v1.0"
HUB = "THUDM/ImageReward"
WEIGHTS, MED_CONFIG = "ImageReward.pt", "med_config.json"
TEXT_LIMIT = 35
"""Number of tokens, start and end included, to which the network cuts prompts."""
VOCABULARY = "bert-base-uncased"
VOCABULARY_HASH = "07eced375cec144d"
"""First digits of the sha256 of the published ``vocab.txt`` of bert-base-uncased."""
PACKAGES = ("torch", "torchvision", "transformers", "timm", "fairscale")
"""Packages whose versions may change a score."""


class OfficialReward:
    """Official network in eval mode, with local files, or without them those of the release, by the hub's client.

    Raises ValueError for a file that is none of tensors or lacks parameters.
    """

    def __init__(
        self,
        weights: str | None = None,
        med_config: str | None = None,
        vocabulary: str | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        import torch

        package = importlib.import_module("ImageReward.ImageReward")
        self.path, self.is_release = weights or _hub_file(WEIGHTS), weights is None
        with _tokenizer_from(vocabulary):
            self.network = package.ImageReward(med_config=med_config or _hub_file(MED_CONFIG), device=device)
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.path}: not a file of tensors ({str(error).splitlines()[0]})") from None
        loaded = self.network.load_state_dict(state, strict=False)
        if loaded.missing_keys:
            raise ValueError(f"{self.path}: no {loaded.missing_keys[0]}; expected {WEIGHTS}")
        self.network.to(device).eval()
        self.vocabulary = vocabulary

    def about(self) -> dict[str, Any]:
        """Return implementation, weights and settings, as plain data."""
        versions, name = {package: metadata.version(package) for package in PACKAGES}, os.path.basename(self.path)
        return {
            "implementation": f"image-reward {metadata.version('image-reward')}",
            "weights": RELEASE if self.is_release else f"file {name}" if name == RELEASE else name,
            "weights_hash": _file_sha256(self.path),
            "settings": {
                "network_input": "224 px, bicubic, centre crop",
                "text_limit": TEXT_LIMIT,
                "vocabulary": self._vocabulary(),
                "environment": versions,
            },
        }

    def scores(self, prompts: Sequence[str], images: Sequence[np.ndarray]) -> list[float]:
        """Score each image, uint8 ``[H, W, 3]``, given its prompt."""
        import torch

        with torch.no_grad():
            pairs = zip(prompts, images, strict=True)
            return [float(self.network.score(prompt, Image.fromarray(image))) for prompt, image in pairs]

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Return whether each prompt has more tokens than :data:`TEXT_LIMIT`."""
        return [len(tokens) > TEXT_LIMIT for tokens in self.network.blip.tokenizer(list(prompts))["input_ids"]]

    def _vocabulary(self) -> str:
        """Return the vocabulary's name on the hub, or the file's sha256; the published file has the name."""
        if self.vocabulary is None:
            return VOCABULARY
        digest = _file_sha256(os.path.join(self.vocabulary, "vocab.txt"))
        return VOCABULARY if digest.startswith(VOCABULARY_HASH) else f"vocab.txt (sha256 {digest})"


@contextmanager
def _tokenizer_from(folder: str | None) -> Iterator[None]:
    """Let the package, which knows the hub's name alone, read BERT's vocabulary from a local folder."""
    module: Any = importlib.import_module("ImageReward.models.BLIP.blip")
    published = module.BertTokenizer
    if folder is not None:
        module.BertTokenizer = SimpleNamespace(from_pretrained=lambda name: published.from_pretrained(folder))
    try:
        yield
    finally:
        module.BertTokenizer = published


def _hub_file(name: str) -> str:
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo_id=HUB, filename=name))


def _file_sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
