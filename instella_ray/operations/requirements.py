"""What a job needs at least, from its configuration."""

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
from ..serving.config import ServeArgs
from ..training.settings import TrainingRun
from ..training.stages import TokenizerStagesConfig
from .claims import Group, Needs, totals

READER: Needs = (Group(1, 1, 0),)
"""The one CPU that a driver's tasks need to get anywhere at all."""


@singledispatch
def least(config: Config) -> Needs:
    """The fewest processes that the job of ``config`` can do its work with.

    A configuration that is not known here is that of a job made of others, whose parts run one after another.
    """
    parts = [getattr(config, name) for name in type(config).model_fields]
    return largest([READER, *(least(part) for part in parts if isinstance(part, Config))])


@least.register
def _(config: TrainingRun) -> Needs:
    # Measuring checkpoints meanwhile needs more, but waits until there is room.
    workers = config.train.workers
    if workers.count == 0:
        return ()  # trained in the job's own process
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
    stages = [config.text, config.decoder, *config.models.values()]
    return tuple(Group(stage.least_replicas, config.cpus(stage), config.gpus(stage)) for stage in stages)


def actors(pools: Iterable[tuple[int | None, float]]) -> Needs:
    """Needs of pools of (actors, GPUs an actor); on CPUs they share what there is, however many they are."""
    return READER + tuple(Group(count or 1, 0, gpus) for count, gpus in pools if gpus)


def largest(needs: Sequence[Needs]) -> Needs:
    """The most demanding of several that are met one after another: by GPUs, then by CPUs."""
    return max(needs, key=lambda groups: (totals(groups)["GPU"], totals(groups)["CPU"]))
