"""FID and rFID, and Frechet distances over other features, which have other names.

FID (Heusel et al. 2017) is the Frechet distance over InceptionV3's 2048 pooled features, here torch-fidelity's with its
TensorFlow 1 resize. The paper's evaluation code (Kang et al. 2023) crops the centre square, resizes to 256 px with
Lanczos and uses clean-fid's antialiased resize to 299 px: the first two steps are the default here, the last is the
features' ``resize="clean"``. rFID compares reconstructions with their originals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Info
from .features import Features, inception
from .frechet import GROUPS, Frechet, Gaussian
from .images import ImageSettings

PAPER_IMAGES = ImageSettings(size=256, filter="lanczos")


def frechet(
    features: Features,
    *,
    reference: Gaussian | None = None,
    expected: Mapping[str, Any] | None = None,
    reconstruction: bool = False,
    images: ImageSettings = PAPER_IMAGES,
    groups: int = GROUPS,
) -> Frechet:
    """Create the Frechet distance over ``features``: to ``reference``, or of reconstructions to their originals.

    ``expected``: description of a reference that is attached later (:meth:`.gaussian.Gaussian.describe`).
    Named ``fid`` (``rfid``) for FID's network with its published weights, else ``frechet_...`` (``rfrechet_...``).
    """
    name = "fid" if features.name == "inception" else f"frechet_{features.name}"
    settings = {"features": features.name, **features.settings, "images": images.describe(), "groups": groups}
    if reference is not None or expected is not None:
        settings["reference"] = reference.describe() if reference is not None else expected
    info = Info(
        f"r{name}" if reconstruction else name,
        features.implementation,
        features.weights,
        features.weights_hash,
        settings,
    )
    return Frechet(info, features, reference=reference, images=images)


def fid(
    weights: str, reference: Gaussian | None = None, *, device: str = "cpu", images: ImageSettings = PAPER_IMAGES
) -> Frechet:
    """Create FID with a local Inception weights file.

    Without a reference it computes one (:meth:`.frechet.Frechet.gaussian`).
    """
    return frechet(inception(weights, device=device), reference=reference, images=images)


def rfid(weights: str, *, device: str = "cpu", images: ImageSettings = ImageSettings()) -> Frechet:
    """Create rFID of ``images`` against ``references``, without resizing by default."""
    return frechet(inception(weights, device=device), reconstruction=True, images=images)
