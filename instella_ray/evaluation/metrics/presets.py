"""Evaluation protocols and published results of the paper, to compare with measured results.

From "Instella-T2I: Pushing the Limits of 1D Discrete Latent Space Image Generation": Tables 1 to 3, Appendix D.1 (sampling)
and D.2 (metrics). None of these values were measured by this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import UserError
from .names import STANDARDS

Sampler = Literal["posterior", "simplified"]
"""Samplers of the paper's Alg. 1 and Alg. 2."""


@dataclass(frozen=True)
class Published:
    """A published result of the paper."""

    metric: str
    """Name of the corresponding :class:`.base.MetricResult`."""
    value: float
    source: str
    """Table and row."""
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of the images (Appendix D.1)."""

    sampler: Sampler
    guidance: float
    """Guidance scale (alpha)."""
    temperature: float
    """Temperature (tau)."""
    steps: int
    rho: float = 1.0
    """Exponent of the timestep grid."""


@dataclass(frozen=True)
class MetricProtocol:
    """How the paper measured a metric, as far as it says so."""

    images: Mapping[str, Any]
    """Preprocessing: fields of :class:`.images.ImageSettings`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Other settings of the result: the text that the value must contain, in any case."""

    def differences(self, name: str, result: Mapping[str, Any]) -> list[str]:
        """Return what differs in the JSON of a result of the metric ``name``, one text each; its weights come first."""
        settings, weights = result["settings"], (result["weights"], result["weights_hash"])
        standard = STANDARDS.get(name)
        found = standard.differences(name, *weights, settings) if standard else []
        images = settings.get("images") or {}
        for key, expected in self.images.items():
            if images.get(key) != expected:
                found.append(f"images.{key} of {name} {_text(images.get(key))}, the paper's {_text(expected)}")
        for key, expected in self.settings.items():
            if expected.lower() not in str(settings.get(key)).lower():
                found.append(f"{key} of {name} {_text(settings.get(key))}, the paper's {expected}")
        return found


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


PIXELS = {"size": None, "format": "pixels"}
PROTOCOLS = {
    "fid": MetricProtocol({"size": 256, "filter": "lanczos", "format": "pixels"}, {"network_input": "clean-fid"}),
    "rfid": MetricProtocol(PIXELS),
    "psnr": MetricProtocol(PIXELS),
    "ssim": MetricProtocol(PIXELS),
    "clip_score": MetricProtocol({"size": 256, "format": "pixels"}),
    "image_reward": MetricProtocol(PIXELS),
    "geneval": MetricProtocol(PIXELS),
}
"""The paper's protocol by metric (Appendix D.2, and the evaluation code that it cites); weights are in :data:`STANDARDS`."""


@dataclass(frozen=True)
class Preset:
    """Protocol and published results of one table."""

    name: str
    sampling: Sampling | None
    """Sampling settings; None for a tokenizer, or if the paper does not give them."""
    size: int
    """Pixels a side of the images."""
    model: str | None = None
    """Kind of the generator; None for a tokenizer."""
    prompts: Mapping[str, int] = field(default_factory=dict)
    """Default number of prompts by metric."""
    images_per_prompt: Mapping[str, int] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()


def _table1(row: str, geneval: tuple[float, ...], clip: float, reward: float) -> tuple[Published, ...]:
    tasks = ("single_object", "two_object", "counting", "colors", "color_attr", "position")
    names = [*(f"geneval/{task}" for task in tasks), "geneval", "clip_score", "image_reward"]
    values = [*geneval, clip, reward]
    return tuple(Published(n, v, f"Table 1, {row}", "higher") for n, v in zip(names, values, strict=True))


def _table2(data: str, rfid: float, psnr: float, ssim: float) -> tuple[Published, ...]:
    source = f"Table 2, BIT (397M, 128 tokens), {data}"
    return (
        Published("rfid", rfid, source, "lower"),
        Published("psnr", psnr, source, "higher"),
        Published("ssim", ssim, source, "higher"),
    )


DIFFUSION = _table1("Instella Diff (1.2B, 1024 px)", (0.99, 0.78, 0.66, 0.85, 0.45, 0.12, 0.64), 0.332, 0.900)
AUTOREGRESSIVE = _table1("Instella AR (0.8B, 1024 px)", (0.96, 0.43, 0.40, 0.80, 0.14, 0.08, 0.46), 0.313, 0.538)

CLIP_NOTE = (
    "D.2 says 'ViT-G/14' at 256 px on 30K prompts of MSCOCO 2014. Here: open_clip ViT-bigG-14. The evaluation code cited for "
    "FID (Kang et al. 2023) uses that name for open_clip's ViT-g-14 and prepends 'A photo depicts ' to each prompt"
)
FID_PROMPTS_NOTE = (
    "the paper calls the column FID-30K (Table 3) but says 3K prompts in D.2, and 'val2024' for val2014: the number of "
    "prompts is a setting, 30,000 by default"
)
FID_RESIZE_NOTE = (
    "the cited evaluation code crops the centre square, resizes to 256 px with Lanczos, and then uses clean-fid's "
    "antialiased resize for Inception, here network_resize=clean"
)

DRAW_NOTE = "the paper draws the bits of the last step (final_draw), its released code thresholds them: here both count"
UNSTATED = {"seconds_per_image": "the paper does not say on which hardware and in which batch it was measured"}
"""Published values whose protocol is not known, and why, by metric."""


def _table3(steps: int, fid: float, seconds: float) -> Preset:
    source = f"Table 3, Diffusion BIT (1B), {steps} steps"
    return Preset(
        "paper-table3" if steps == 20 else f"paper-table3-{steps}",
        Sampling("simplified", 4.0, 0.6, steps),
        1024,
        "diffusion",
        prompts={"fid": 30_000},
        images_per_prompt={"fid": 1},
        published=(
            Published("fid", fid, source, "lower"),
            Published("seconds_per_image", seconds, source, "lower"),
        ),
        notes=(
            FID_PROMPTS_NOTE,
            FID_RESIZE_NOTE,
            DRAW_NOTE,
            "the row with 20 steps is paper-table3, that with 50 paper-table3-50",
            "the image size of Table 3 is not stated; 1024 px as in Table 1",
        ),
    )


TABLE1 = Preset(
    "paper-table1",
    Sampling("posterior", 7.5, 0.75, 100),
    1024,
    "diffusion",
    prompts={"geneval": 553, "clip_score": 30_000, "image_reward": 100},
    images_per_prompt={"geneval": 4, "clip_score": 1, "image_reward": 1},
    published=DIFFUSION,
    notes=(CLIP_NOTE, DRAW_NOTE, "the paper does not say how Instella AR was sampled: its row is paper-table1-ar"),
)
TABLE1_AR = Preset(
    "paper-table1-ar",
    None,
    1024,
    "ar",
    prompts=TABLE1.prompts,
    images_per_prompt=TABLE1.images_per_prompt,
    published=AUTOREGRESSIVE,
    notes=(CLIP_NOTE, "sampling settings of the autoregressive model are not given in the paper"),
)
TABLE2_IMAGENET = Preset("paper-table2-imagenet", None, 512, published=_table2("ImageNet 512x512", 1.32, 22.25, 0.704))
TABLE2_COCO = Preset("paper-table2-coco", None, 512, published=_table2("MS-COCO 512x512", 7.14, 21.59, 0.69))
TABLE3 = _table3(20, 16.33, 0.38)
TABLE3_50 = _table3(50, 15.10, 1.32)
PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (TABLE1, TABLE1_AR, TABLE2_IMAGENET, TABLE2_COCO, TABLE3, TABLE3_50)
}


def preset(name: str) -> Preset:
    """Return the preset ``name``; raises UserError that lists the known presets."""
    if name not in PRESETS:
        raise UserError(f"preset '{name}': expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
