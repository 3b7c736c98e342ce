"""Provenance of models in run records: a checkpoint carries the lineage of its training data and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic

from .. import storage
from ..errors import UserError
from ..models.checkpoint import CONFIG, read_checkpoint_config, weight_hash
from ..models.text_encoder import TextEncoderConfig
from ..runs import Provenance, RunRecord

LINEAGE = "lineage"
"""Section of ``config.yaml`` in a model folder."""


def model_provenance(role: str, folder: str | Path, identity: str | None = None) -> Provenance:
    """Return the provenance of a local model folder, with the lineage in its config.

    ``identity`` is its weight hash; None computes it. Raises UserError for a lineage section that is not valid.
    """
    section = read_checkpoint_config(folder)
    about = section.get(LINEAGE) or {}
    try:
        return Provenance(
            role=role,
            kind="model",
            path=storage.absolute(str(folder)),
            identity=identity or weight_hash(folder),
            facts={"model": section["model"].get("kind"), **{k: v for k, v in about.items() if k != "inputs"}},
            inputs=about.get("inputs", ()),
        )
    except (pydantic.ValidationError, AttributeError, TypeError):
        raise UserError(f"{Path(folder) / CONFIG}: the section {LINEAGE} is not one that training writes") from None


def text_encoder_provenance(cfg: TextEncoderConfig) -> Provenance:
    """Return the provenance of a text encoder, which is identified by name."""
    facts = {name: value for name in ("gguf_file", "layers") if (value := getattr(cfg, name)) is not None}
    return Provenance(role="text encoder", kind="name", path=cfg.name, facts=facts)


def lineage_section(record: RunRecord, step: int) -> dict[str, Any]:
    """Build the lineage section of a checkpoint saved after ``step`` steps of a run."""
    facts = {name: value for name, value in record.facts.items() if name != "status"}
    return {**facts, "step": step, "inputs": [provenance.model_dump(mode="json") for provenance in record.inputs]}
