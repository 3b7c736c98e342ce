"""The tokenizer's training stages, one after another, each from the weights that the one before it has learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from pydantic import Field, model_validator

from .. import storage
from ..config import validate
from ..errors import UserError
from .launch import check_free, check_run_dir
from .run_dir import CONFIG, checkpoint_step, finished_checkpoints, located, look_anew
from .tokenizer import TokenizerConfig, complete_tokenizer, run_tokenizer

log = logging.getLogger(__name__)


class TokenizerStagesConfig(TokenizerConfig):
    """A tokenizer run, or several stages of one: what stands beside ``stages`` holds for all of them."""

    stage_type: ClassVar[type[TokenizerConfig]] = TokenizerConfig
    """What a stage's settings are read as."""
    stages: dict[str, dict[str, Any]] = Field({})
    """Settings of each stage that differ from those beside, by its name, in the order of training. A stage's run directory
    is train.run_dir/NAME. Without any there is one run, in train.run_dir itself."""

    @model_validator(mode="after")
    def _every_stage_fits(self) -> TokenizerStagesConfig:
        try:
            self.each()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def each(self) -> dict[str, TokenizerConfig]:
        """The configuration of each stage by its name, complete but for what it starts from; UserError names the stage."""
        shared = self.model_dump(exclude={"stages"}, exclude_unset=True)
        found = {}
        for name, own in self.stages.items():
            if fixed := {"model", "data", "start_from"} & set(own):
                raise UserError(f"stages.{name}: {min(fixed)} is the same for all stages, set it beside them")
            if "run_dir" in (own.get("train") or {}):
                raise UserError(f"stages.{name}: its run_dir is train.run_dir/{name}")
            merged = _merged(shared, own)
            merged["train"]["run_dir"] = storage.join(self.train.run_dir, name)
            found[name] = validate(self.stage_type, merged, f"stages.{name}")
        return found

    def single(self) -> TokenizerConfig:
        """The one run that there is without stages."""
        return self.stage_type.model_validate(self.model_dump(exclude={"stages"}, exclude_unset=True))


def run_stages(
    cfg: TokenizerStagesConfig, beside: Callable[[TokenizerConfig], AbstractContextManager[Any]] = nullcontext
) -> str:
    """Train all stages; returns the last one's final checkpoint, which is a model folder.

    ``train.resume`` skips stages that are finished and goes on with one that has begun. All stages are checked before
    the first one starts. ``beside(stage)`` is open while a stage is trained, or found finished.
    """
    if not cfg.stages:
        with beside(single := cfg.single()):
            return run_tokenizer(single)
    stages = {name: complete_tokenizer(stage) for name, stage in cfg.each().items()}
    run_dir = located(cfg.train.run_dir)
    look_anew(run_dir)
    begun = [name for name in stages if storage.exists(storage.join(run_dir, name, CONFIG))]
    if cfg.train.resume and not begun:
        raise UserError(f"run_dir {run_dir}: nothing to resume (no stage has begun)")
    if not cfg.train.resume:
        check_free(run_dir)
    previous: str | None = None
    for name, stage in stages.items():
        train = stage.train.model_copy(update={"resume": name in begun, "run_dir": storage.join(run_dir, name)})
        start_from = stage.start_from if previous is None else previous
        stage = stage.model_copy(update={"train": train, "start_from": start_from})
        with beside(stage):
            previous = _finished(stage)
            if previous is None:
                previous = run_tokenizer(stage, f"tokenizer, {name}")
            else:
                log.info("%s: finished already, %s", name, previous, extra={"stage": name})
    assert previous is not None
    return previous


def _finished(stage: TokenizerConfig) -> str | None:
    """A stage's final checkpoint, where it was trained to its end; UserError if that was under other settings."""
    checkpoints = finished_checkpoints(stage.train.run_dir)
    if not checkpoints or checkpoint_step(checkpoints[-1]) < stage.train.steps:
        return None
    check_run_dir(stage)
    return checkpoints[-1]


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``shared`` with the values of ``own`` in their places, section by section."""
    merged = dict(shared)
    for name, value in own.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
