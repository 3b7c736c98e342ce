"""Endpoints and times for simulations: everything takes no time but what a test is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from instella_ray.planning.simulation.serving import ServingConfig
from instella_ray.planning.simulation.stage_time import StageTime


def seconds(value: float | dict[int, float]) -> StageTime:
    return StageTime(seconds=value if isinstance(value, dict) else {1: value}, source="a test")


def serving(
    folder: Path,
    load: dict[str, Any],
    *,
    app: dict[str, Any] | None = None,
    kind: dict[str, Any] | None = None,
    variation: float = 0.0,
    hop_s: float = 0.0,
    **times: float | dict[int, float],
) -> ServingConfig:
    """One generator ``g``, images of 64 px; ``times`` of ingress, text, admit, step, decode and file, 0 unless given."""
    path = folder / "endpoint.yaml"
    settings: dict[str, Any] = {"slots": 4, "queue": 100_000, **(app or {})}
    path.write_text(yaml.safe_dump({"app": {"tokenizer": "t", "models": {"g": {"path": "g", **settings}}}}))
    of = {name: seconds(times.get(name, 0.0)) for name in ("ingress", "text", "admit", "step", "decode", "file")}
    return ServingConfig.model_validate(
        {
            "endpoint": str(path),
            "times": {
                **of,
                **{name: {key: of[name]} for name, key in (("step", "g"), ("decode", "64x64"), ("file", "64x64"))},
                "hop_s": hop_s,
                "variation": variation,
            },
            "load": {"mix": [{"model": "g", "steps": (1, 1), "size": "64x64", **(kind or {})}], **load},
        }
    )
