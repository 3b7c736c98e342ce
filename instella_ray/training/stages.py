"""Multi-stage tokenizer training: each stage starts from the previous stage's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from .. import storage
from ..config import validate
from ..errors import UserError
from ..models.folders import checkpoint_step, finished_checkpoints
from .launch import check_free, check_run_dir
from .run_dir import CONFIG, located
from .tokenizer import TokenizerConfig, complete_tokenizer, run_tokenizer, tokenizer_validator
from .validation import validating

log = logging.getLogger(__name__)


class TokenizerStagesConfig(TokenizerConfig):
    """Configuration of a tokenizer run with optional ``stages``; the other settings are shared by all stages."""

    stages: dict[str, dict[str, Any]] = Field({})
    """Overrides of the shared settings by stage name, in training order. A stage's run directory is train.run_dir/NAME.
    Empty means a single run in train.run_dir."""

    @model_validator(mode="after")
    def _every_stage_fits(self) -> TokenizerStagesConfig:
        try:
            self.each()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def each(self) -> dict[str, TokenizerConfig]:
        """Return each stage's configuration by name, without ``start_from``; UserError names an invalid stage."""
        shared = self.model_dump(exclude={"stages"}, exclude_unset=True)
        found = {}
        for name, own in self.stages.items():
            if fixed := {"model", "data", "start_from"} & set(own):
                raise UserError(f"stages.{name}: {min(fixed)} is shared by all stages, expected at the top level")
            if "run_dir" in (own.get("train") or {}):
                raise UserError(f"stages.{name}: train.run_dir cannot be set, it is train.run_dir/{name}")
            merged = _merged(shared, own)
            merged["train"]["run_dir"] = storage.join(self.train.run_dir, name)
            found[name] = validate(TokenizerConfig, merged, f"stages.{name}")
        return found

    def single(self) -> TokenizerConfig:
        """Return the configuration of the single run, for a configuration without stages."""
        return TokenizerConfig.model_validate(self.model_dump(exclude={"stages"}, exclude_unset=True))


def run_stages(cfg: TokenizerStagesConfig) -> str:
    """Train all stages and return the final checkpoint of the last stage, a model folder.

    ``train.resume`` skips finished stages and resumes an interrupted one; auto starts the first one if none has begun. All
    stages are validated before the first one starts; the checkpoints of finished ones are validated too, where validation
    was interrupted.
    """
    if not cfg.stages:
        return run_tokenizer(cfg.single())
    stages = {name: complete_tokenizer(stage) for name, stage in cfg.each().items()}
    run_dir = located(cfg.train.run_dir)
    storage.invalidate_listing(run_dir)
    begun = [name for name in stages if storage.exists(storage.join(run_dir, name, CONFIG))]
    if cfg.train.resume is True and not begun:
        raise UserError(f"run_dir {run_dir}: nothing to resume (no stage has started)")
    if not cfg.train.resume:
        check_free(run_dir)
    previous, names = None, list(stages)
    for name, stage in stages.items():
        resume = "auto" if cfg.train.resume == "auto" else name in begun
        train = stage.train.model_copy(update={"resume": resume, "run_dir": storage.join(run_dir, name)})
        start_from = stage.start_from if previous is None else previous
        stage = stage.model_copy(update={"train": train, "start_from": start_from})
        previous = _finished(stage)
        if previous is None:
            if later := [other for other in begun if names.index(other) > names.index(name)]:
                raise UserError(
                    f"stages.{name}: no checkpoint of step {stage.train.steps}, but stage {later[0]} has started from it"
                )
            previous = run_tokenizer(stage, f"tokenizer, {name}")
        else:
            with validating(tokenizer_validator(stage)):
                log.info("%s: already finished, %s", name, previous, extra={"stage": name})
    assert previous is not None
    return previous


def _finished(stage: TokenizerConfig) -> str | None:
    """Return the final checkpoint of a finished stage, else None; UserError if it was trained with other settings."""
    checkpoints = finished_checkpoints(stage.train.run_dir)
    if not checkpoints or checkpoint_step(checkpoints[-1]) < stage.train.steps:
        return None
    check_run_dir(stage)
    return checkpoints[-1]


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``own`` into ``shared`` recursively; values of ``own`` take precedence."""
    merged = dict(shared)
    for name, value in own.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
