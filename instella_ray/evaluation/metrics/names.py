"""Names of metrics that stand for published weights: a result with any other weights has another name.

:class:`.base.Info` applies the rule to every metric, also when a stored state is read, and :mod:`..results` to recorded
results. Weights are known by the sha256 of their file. For weights without a published checksum the name of the release
counts, under which their library downloads them (or finds them in its cache); a local file of these is unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .image_reward_worker import RELEASE, VOCABULARY


@dataclass(frozen=True)
class Standard:
    """What the name of a metric stands for."""

    stand_in: str
    """Name of the same computation with any other weights, without its ending ``_unverified``."""
    hashes: tuple[str, ...] = ()
    """First digits of the sha256 of the published weights files."""
    releases: tuple[str, ...] = ()
    """Weights in results that their library downloaded by this name."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Texts that the settings of these names contain: further weights."""

    def differences(
        self, name: str, weights: str | None, weights_hash: str | None, settings: Mapping[str, Any]
    ) -> list[str]:
        """Return what differs in a result of the metric ``name``, one text each."""
        found = []
        if weights not in self.releases and not (weights_hash or "").startswith(self.hashes):
            known = [f"sha256 {digits}..." for digits in self.hashes] + list(self.releases)
            found.append(f"weights of {name} {weights or 'random'}, not the published file ({' or '.join(known)})")
        for key, expected in self.settings.items():
            if expected not in str(settings.get(key)):
                found.append(f"{key} of {name} {settings.get(key) or 'none'}, not the published {expected}")
        return found


INCEPTION = ("6726825d",)
"""FID's network: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``."""
VGG, ALEX = ("397923af",), ("7be5be79", "4df8aa71")
"""LPIPS' trunks: torchvision's ``vgg16-397923af.pth`` and both of its alexnet-owt files."""
MASK2FORMER = ("c9d0c4f2",)
"""GenEval's detector: ``mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth``."""
COLOR_CLASSIFIER = {"color_classifier": "ViT-L-14 openai"}
"""GenEval's classifier of colours."""

STANDARDS = {
    **{
        name: Standard(f"{stand_in}_inception", INCEPTION)
        for name, stand_in in (
            ("fid", "frechet"),
            ("rfid", "rfrechet"),
            ("kid", "kernel"),
            *((name, name) for name in ("precision", "recall", "f_score", "density", "coverage")),
        )
    },
    **{
        f"{prefix}lpips_{net}": Standard(f"{prefix}lpips_{net}", hashes)
        for prefix in ("", "diversity_")
        for net, hashes in (("vgg", VGG), ("alex", ALEX))
    },
    "cmmd": Standard("cmmd_vit_l_14_336", releases=("ViT-L-14-336, openai",)),
    "clip_score": Standard("clip_score_vit_bigg_14", releases=("ViT-bigG-14, laion2b_s39b_b160k",)),
    "image_reward": Standard("image_reward", releases=(RELEASE,), settings={"vocabulary": VOCABULARY}),
    "geneval": Standard("geneval_rules_mask2former_swin_s", MASK2FORMER, settings=COLOR_CLASSIFIER),
}
"""What names of metrics stand for; those of other networks' metrics name the network instead."""
RELEASES = {name.rpartition(", ")[2] for standard in STANDARDS.values() for name in standard.releases}


def earned_name(name: str, weights: str | None, weights_hash: str | None, settings: Mapping[str, Any]) -> str:
    """Return ``name`` (of a metric, or ``METRIC/PART``) if a result was measured with what it stands for, else another."""
    metric, slash, part = name.partition("/")
    standard = STANDARDS.get(metric)
    if standard is None or not standard.differences(name, weights, weights_hash, settings):
        return name
    return f"{standard.stand_in}_unverified{slash}{part}"


def file_label(path: str) -> str:
    """Return the name of a local weights file for results, never that of a release."""
    name = Path(path).name
    return f"file {name}" if name in RELEASES else name
