"""Minimum resource needs of jobs, from their configurations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch

from ..bulk.decode import DecodeConfig
from ..bulk.plan import SampleConfig
from ..config import Config
from ..data.curation.job import CurateConfig
from ..data.encode import EncodeConfig
from ..data.generation.recaption import RecaptionConfig
from ..data.generation.synthesize import SynthesizeConfig
from ..evaluation.evaluate import EvaluateConfig
from ..resources import Group, Needs, totals
from ..serving.config import ServeArgs
from ..training.settings import TrainingRun
from ..training.stages import TokenizerStagesConfig

READER: Needs = (Group(1, 1, 0),)
"""Minimum of a data job: one CPU for the driver's tasks."""


@singledispatch
def least(config: Config) -> Needs:
    """Return the fewest processes with which the job of ``config`` can run.

    A configuration without a registered rule is that of a composite job, whose parts run one after another.
    """
    parts = [getattr(config, name) for name in type(config).model_fields]
    return largest([READER, *(least(part) for part in parts if isinstance(part, Config))])


@least.register
def _(config: TrainingRun) -> Needs:
    # Validation during training needs more, but waits until resources are free.
    workers = config.train.workers
    if workers.count == 0:
        return ()  # training runs in the job's process
    return (Group(workers.least, workers.cpus, float(workers.gpu)),)


@least.register
def _(config: TokenizerStagesConfig) -> Needs:
    stages = config.each() or {"": config.single()}
    return largest([least(stage) for stage in stages.values()])


@least.register
def _(config: CurateConfig) -> Needs:
    return actors((section.actors, section.gpus_per_actor) for section in config.filters.of_images().values())


@least.register
def _(config: SynthesizeConfig) -> Needs:
    return largest([actors([(model.actors, model.gpus_per_actor)]) for model in config.models.values()])


@least.register(RecaptionConfig)
@least.register(EncodeConfig)
@least.register(SampleConfig)
@least.register(DecodeConfig)
@least.register(EvaluateConfig)
def _(config: RecaptionConfig | EncodeConfig | SampleConfig | DecodeConfig | EvaluateConfig) -> Needs:
    return actors([(config.actors, config.gpus_per_actor)])


@least.register
def _(config: ServeArgs) -> Needs:
    return config.needs()


def actors(pools: Iterable[tuple[int | None, float]]) -> Needs:
    """Return the needs of pools of (actors, GPUs per actor); CPU actors need nothing extra, as they share CPUs."""
    return READER + tuple(Group(count or 1, 0, gpus) for count, gpus in pools if gpus)


def largest(needs: Sequence[Needs]) -> Needs:
    """Return the largest of several needs that occur one after another: by GPUs, then by CPUs."""
    return max(needs, key=lambda groups: (totals(groups)["GPU"], totals(groups)["CPU"]))
