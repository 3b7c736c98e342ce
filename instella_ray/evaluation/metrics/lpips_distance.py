"""LPIPS (Zhang et al. 2018): distance of deep features with weights trained on human judgements, from the ``lpips`` package.

For each layer l, features are normalised over channels, squared differences weighted by the trained heads and averaged
over positions; the distance is the sum over layers, 0 for equal images. The heads come with the package; the trunk is
torchvision's ImageNet network, given as a weights file. Without it the trunk is random and the metric has another name:
it then only tests the code and does not measure perceptual quality.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...errors import UserError
from ...models.checkpoint import weight_hash
from ...models.rng import seeded
from ...storage import file_sha256
from .base import Batch, Info, version_of
from .diversity import Diversity, image_diversity
from .features import local_weights
from .images import ImageSettings, to_planes
from .names import ALEX, VGG
from .samples import SampleMetric

if TYPE_CHECKING:
    from torch import nn

Net = Literal["alex", "vgg"]
TRUNKS = {"vgg": VGG, "alex": ALEX}


@dataclass(frozen=True)
class Lpips:
    """LPIPS network with its identity."""

    name: str
    weights: str | None
    weights_hash: str
    network: nn.Module
    device: str

    def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Compute distances, float64 ``[B]``, between uint8 images ``[B, H, W, 3]``, which are scaled to [-1, 1]."""
        import torch

        with torch.no_grad():
            a, b = (to_planes(x).to(self.device).float() / 127.5 - 1 for x in (images, others))
            return self.network(a, b).flatten().double().cpu().numpy()


def load_lpips(trunk: str | None, *, net: Net = "vgg", device: str = "cpu", seed: int = 0) -> Lpips:
    """Load LPIPS v0.1 over ``net``, with the trunk of a torchvision weights file, or a random one drawn with ``seed``.

    Named ``lpips_vgg`` (``lpips_alex``) only for torchvision's published weights. Raises UserError for a missing or wrong
    file.
    """
    expected = "torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth"
    path = None if trunk is None else local_weights(trunk, "lpips", expected)
    import lpips

    with seeded(seed):
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    if path is None:
        return Lpips(f"lpips_{net}_random_trunk", None, weight_hash(network), network.to(device), device)
    _load_trunk(network, path)
    found = file_sha256(str(path))
    name = f"lpips_{net}" if found.startswith(TRUNKS[net]) else f"lpips_{net}_unverified"
    return Lpips(name, path.name, found, network.to(device), device)


def _load_trunk(network: nn.Module, path: Path) -> None:
    """Load torchvision's ``features.N.weight`` into the package's ``net.sliceM.N.weight``."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"metric lpips: {path}: not a file of tensors ({str(error).splitlines()[0]})") from None
    own = {name: name for name, _ in network.named_parameters() if name.startswith("net.slice")}
    names = {name: re.sub(r"^net\.slice\d+", "features", name) for name in own}
    missing = sorted(set(names.values()) - set(state))
    if missing:
        raise UserError(f"metric lpips: {path}: no {missing[0]}; expected the complete torchvision state dict")
    network.load_state_dict({name: state[theirs] for name, theirs in names.items()}, strict=False)


def _info(model: Lpips, prefix: str, images: ImageSettings, **more: object) -> Info:
    settings = {"images": images.describe(), "heads": "lpips v0.1", "input": "[-1, 1]", **more}
    return Info(prefix + model.name, version_of("lpips"), model.weights, model.weights_hash, settings)


def lpips_distance(model: Lpips, images: ImageSettings = ImageSettings()) -> SampleMetric:
    """Create LPIPS of ``images`` against ``references``."""

    def score(batch: Batch) -> np.ndarray:
        return model(images.prepare(batch.need("images")), images.prepare_originals(batch.need("references")))

    return SampleMetric(_info(model, "", images), score)


def lpips_diversity(model: Lpips, *, images: ImageSettings = ImageSettings(size=256), per_prompt: int = 0) -> Diversity:
    """Create the mean pairwise LPIPS among the images of a prompt."""
    info = _info(model, "diversity_", images, distance="lpips", per_prompt=per_prompt)
    return image_diversity(info, model, images)
