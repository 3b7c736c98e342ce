"""Protocol of a result in words: rows of a report's table, and one line to cite a number with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..rendering import digits, flat, value_text
from .results import Json
from .statistics import JACKKNIFE

LIBRARIES = (
    *("instella-ray", "torch", "torchvision", "ray", "numpy", "scipy", "pillow", "torchmetrics", "torch-fidelity"),
    *("clean-fid", "open-clip-torch", "image-reward", "transformers", "lpips", "efficientnet-lite-pytorch"),
)
"""Packages that may change a number."""
HASH = 8
"""Digits of a sha256 in texts."""
RESULTING = {
    *("interval", "confidence", "groups", "groups_with_a_correct_image", "standard_error", "bias", "rule_of_three"),
    *("features", "images", "reference", "per_prompt", "unit", "distances"),
}
"""Settings of a result that depend on the samples, or that a citation has elsewhere."""


PARTS = ("implementation", "weights", "images", "settings", "reference", "interval")
"""Names of what :func:`protocol` yields."""


def add_citations(settings: Iterable[Json], card: Json) -> None:
    """Add ``citations``, a line by metric, to each of the settings of ``results.json``."""
    for setting in settings:
        found = {name: citation(result, setting, card) for name, result in setting["metrics"].items()}
        setting["citations"] = found


def citation(result: Json, setting: Json, card: Json) -> str:
    """Describe a number with its protocol in one line.

    Value and 95 % interval; what was measured; how it was measured; reference; interval and versions.
    """
    found = dict(protocol(result))
    unit = result["settings"].get("unit", "")
    value = digits(result["value"], unit, significant=4)
    if result["low"] is not None:
        low, high = (digits(result[end], significant=4) for end in ("low", "high"))
        value += f" [{low}, {high}]"
    how = [found["implementation"], *(found[key] for key in ("weights", "images") if key in found)]
    parts = [
        ", ".join([_counted(result, card), *images_protocol(setting, card)]),
        ", ".join([*how, *([found["settings"]] if "settings" in found else [])]),
        *([f"reference {found['reference']}"] if "reference" in found else []),
        *([f"interval: {found['interval']}"] if "interval" in found else []),
        ", ".join(f"{name} {card['versions'][name]}" for name in ("instella-ray", "torch")),
        *(f"caution: {caution}" for caution in result.get("cautions", ())),
    ]
    return f"{result['name']} {value}: {'; '.join(parts)}"


def protocol(result: Json) -> Iterator[tuple[str, str]]:
    """Yield how a number was made: implementation, weights, preprocessing, settings, reference and interval."""
    settings: dict[str, Any] = result["settings"]
    yield "implementation", result["implementation"]
    if result["weights"] or result["weights_hash"]:
        yield "weights", f"{result['weights'] or 'random weights'} (sha256 {str(result['weights_hash'])[:HASH]})"
    if images := settings.get("images"):
        yield "images", _preprocessing(images)
    others = flat({key: value for key, value in settings.items() if key not in RESULTING and value not in (None, "")})
    if text := ", ".join(f"{name} {value}" for name, value in others):
        yield "settings", text
    if reference := settings.get("reference"):
        count = f"{digits(reference['count'])} images, " if reference.get("count") else ""
        yield "reference", f"{reference['source']} ({count}sha256 {str(reference.get('sha256'))[:HASH]})"
    if settings.get("interval") and result["low"] is not None:
        yield "interval", f"{settings['confidence'] * 100:g} %, {settings['interval']}"


def images_protocol(setting: Json, card: Json) -> list[str]:
    """Return how the measured images were made: sampler, seeds, weights."""
    about, found = setting["about"], list[str]()
    if sampling := about.get("sampling"):
        if about["kind"] == "ar":
            found.append("autoregressive")
        else:
            found.append(f"{sampling['num_inference_steps']} steps {sampling['sampler']}")
            found += [f"rho {value_text(sampling['rho'])}"] if sampling["rho"] != 1 else []
            found += [f"redraw {value_text(sampling['redraw'])}"] if sampling.get("redraw") else []
            found += ["final draw"] if sampling["final_draw"] else []
        found += [f"{key} {value_text(sampling[name])}" for key, name in SAMPLING.items()]
        found += [f"{', '.join(about['by_prompt'])} by prompt"] if about.get("by_prompt") else []
        rounded = f", rounded to {about['quantization']}" if about["quantization"] != "none" else ""
        model = f"model {about['model']} (sha256 {about['model_hash'][:HASH]}) in {about['precision']}{rounded}"
        prompts = f"prompts {about['prompts']} (sha256 {about['prompts_hash'][:HASH]})"
        found += [f"seed {about['seed']}", prompts, model]
        if encoder := about.get("text_encoder"):
            found.append(f"text encoder {encoder['name']}")
    if card["tokenizer_hash"]:
        found.append(f"tokenizer {card['tokenizer']} (sha256 {card['tokenizer_hash'][:HASH]})")
    return [*found, *([f"{card['size']} px"] if card["size"] else [])]


SAMPLING = {"guidance": "guidance_scale", "temperature": "temperature"}
"""Names of sampling settings in texts."""


def _counted(result: Json, card: Json) -> str:
    counted, settings = f"{digits(result['count'])} {card['measured_inputs']}", result["settings"]
    if card["measured_inputs"] != "samples":
        return f"{counted} of {card['source']}"
    # The groups of a jackknife are not prompts.
    by_prompt = "groups" in settings and settings.get("interval") != JACKKNIFE
    return f"{counted} of {digits(settings['groups'])} prompts" if by_prompt else counted


def _preprocessing(images: Json) -> str:
    size = f"{images['size']} px {images['filter']}" if images["size"] else "no resize"
    jpeg = f"JPEG quality {images['jpeg_quality']}" if images["format"] == "jpeg" else "no JPEG"
    return f"{size}, {jpeg}"
