"""Checks of configuration files in Ray Serve's own form."""

from __future__ import annotations

import importlib
import typing
from typing import Any

import pydantic
from ray.serve.schema import ServeDeploySchema

from instella_ray.serving.config import ServeArgs


def models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Pydantic models that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def unknown_keys(data: Any, schema: type[pydantic.BaseModel], where: str = "") -> list[str]:
    """Keys that Serve would ignore in silence, dotted."""
    found = []
    for key, value in data.items():
        field = schema.model_fields.get(key)
        if field is None:
            found.append(where + key)
            continue
        for inner in models_in(field.annotation):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    found += unknown_keys(item, inner, f"{where}{key}.")
    return found


def check_serve_config(data: dict[str, Any]) -> None:
    """AssertionError or UserError for anything that Serve would trip over, or not read."""
    assert unknown_keys(data, ServeDeploySchema) == []
    ServeDeploySchema.model_validate(data)
    for app in data["applications"]:
        module, _, name = app["import_path"].partition(":")
        builder = getattr(importlib.import_module(module), name)
        assert callable(builder)
        ServeArgs.model_validate(app["args"]).check()
