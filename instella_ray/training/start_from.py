"""Trained weights that a new run starts from: another run's checkpoint, or imported released weights."""

from __future__ import annotations

import logging
from typing import TypeVar

from ..data.model_provenance import model_provenance
from ..errors import UserError
from ..models.bit import BIT, BITConfig
from ..models.checkpoint import Model, ModelConfig, load_expected, load_model, read_checkpoint_config, weight_hash
from ..models.folders import find_model
from ..models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig
from ..models.text_encoder import TextEncoderConfig
from ..runs import Provenance
from .run_dir import local_folder

INITIAL = {"position_std", "zero_init"}
"""Settings of a generator that matter to random initialization only."""
M = TypeVar("M", bound=Model)
log = logging.getLogger(__name__)


def trained_tokenizer(folder: str, expected: BITConfig) -> BIT:
    """Load the (EMA) weights of a tokenizer; UserError if ``folder`` holds none, or one of other sizes."""
    with local_folder(folder) as here:
        return _fitting(load_expected(here, BIT), expected, folder)


def trained_generator(folder: str, expected: GeneratorConfig) -> DiffusionGenerator | ARGenerator:
    """Load the (EMA) weights of a generator; UserError if ``folder`` holds none, or one of another kind or size."""
    if folder.endswith((".pt", ".safetensors")):
        how = "python -m instella_ray.models.published imports released weights"
        raise UserError(f"start_from {folder}: a file, expected a model folder; {how}")
    with local_folder(folder) as here:
        model = load_model(here)
    if isinstance(model, BIT):
        raise UserError(f"start_from {folder}: holds a tokenizer, expected a generator")
    return _fitting(model, expected, folder)


def _fitting(model: M, expected: ModelConfig, folder: str) -> M:
    """Return ``model``; UserError if its sizes are not those of ``expected``."""
    for name in type(expected).model_fields:
        found, asked = getattr(model.cfg, name), getattr(expected, name)
        if found != asked and name not in INITIAL:
            raise UserError(f"start_from {folder}: its model.{name} is {found!r}, this run's is {asked!r}")
    return model


def parent_provenance(folder: str) -> Provenance:
    """Return the provenance of the weights that a run starts from."""
    with local_folder(folder) as here:
        parent = model_provenance("parent", here)
    return parent.model_copy(update={"path": folder})


def checked_generator(folder: str, expected: GeneratorConfig, tokenizer: str, text_encoder: TextEncoderConfig) -> str:
    """Return the absolute path of the model folder of :func:`trained_generator`, whose errors it raises.

    Warns if the generator was trained on another tokenizer's codes, or another text encoder's features. Both are allowed: a
    tokenizer whose decoder alone was trained further has the same codes and another hash.
    """
    found = find_model(folder)
    trained_generator(found, expected)
    with local_folder(found) as here:
        config = read_checkpoint_config(here)
    if config.get("tokenizer_hash") != weight_hash(tokenizer):
        log.warning(
            "start_from %s: not trained on codes of the tokenizer %s, whose bits may mean something else",
            found,
            tokenizer,
        )
    if (name := (config.get("text_encoder") or {}).get("name")) != text_encoder.name:
        log.warning("start_from %s: trained with the text encoder %s, this run's is %s", found, name, text_encoder.name)
    return found
