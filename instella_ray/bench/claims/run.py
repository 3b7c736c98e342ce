"""Runner of the claims: draws the scenes, runs the steps that lack a result, side by side on Ray, and writes the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ... import logs, storage
from ...data.formats.shards import write_webdataset
from ...data.scenes import scene_rows
from ...errors import UserError
from ..report import SuiteResult
from .arms import Step, TrainedTokenizer, Trial, plan_trials, scenes_folder
from .report import verdict_rows, write_page
from .settings import ClaimsBench
from .verdicts import verdicts_of

SCENES_PER_SHARD = 2000
WAIT_S = 1.0
"""Longest time between two looks at the tasks of Ray, so that Ctrl-C is noticed (s)."""


def run_claims(cfg: ClaimsBench, folder: str) -> SuiteResult:
    """Run what has no result in ``folder`` yet; the page is written anew after each step, from the results so far.

    A killed run continues with the same command. Raises UserError for overrides that are no settings of the arms, before
    anything runs.
    """
    if not cfg.claims:
        raise UserError("claims.claims: expected at least one claim, as in --config bench/claims")
    folder = storage.absolute(folder)
    page = storage.absolute(cfg.page or storage.join(folder, "claims.md"))
    trials = plan_trials(cfg, folder)
    steps = all_steps(trials)
    missing = [step for step in steps if step.result() is None]
    draw_scenes(cfg, folder, missing)
    with logs.progress_bar(total=len(steps), initial=len(steps) - len(missing), desc="claims", unit="step") as bar:
        for key in run_here(missing) if cfg.local else run_on_ray(missing):
            bar.set_postfix_str(key, refresh=False)
            bar.update()
            write_page(page, cfg, verdicts_of(cfg, trials))
    verdicts = verdicts_of(cfg, trials)
    write_page(page, cfg, verdicts)
    print(f"page: {page}")
    about = cfg.model_dump(mode="json", exclude={"claims", "overrides", "page"})
    return SuiteResult("Claims of the paper", about, verdict_rows(verdicts))


def all_steps(trials: Sequence[Trial]) -> list[Step]:
    """Return the steps of all trials, each once and after those that it needs."""
    found = {step.key: step for trial in trials for step in (*trial.proposed, *trial.baseline)}
    return list(found.values())


def draw_scenes(cfg: ClaimsBench, folder: str, steps: Sequence[Step]) -> None:
    """Write the training scenes as WebDataset tars at each size that ``steps`` need, unless they are there."""
    for size in sorted({step.drawn_size for step in steps if isinstance(step, TrainedTokenizer)}):
        target = scenes_folder(folder, cfg.scenes, size)
        done = f"{target}.json"
        if storage.exists(done):
            continue
        with logs.progress_bar(total=cfg.scenes, desc=f"scenes of {size} px", unit="image") as bar:
            for _, count in write_webdataset(scene_rows(cfg.scenes, 0, size), target, SCENES_PER_SHARD):
                bar.update(count)
        storage.write_json(done, {"scenes": cfg.scenes})


def run_here(steps: Sequence[Step]) -> Iterator[str]:
    """Run ``steps`` one after the other in this process; yields the key of each when it is done."""
    for step in steps:
        yield step.finish()


def run_on_ray(steps: Sequence[Step]) -> Iterator[str]:
    """Run ``steps`` as tasks of one CPU each; yields the key of each when it is done."""
    if not steps:
        return
    import ray

    from ...data.ray_data import init_ray

    init_ray(log_to_driver=False)
    # A step begins anew in any case, so one that is lost with its process is tried again.
    task = ray.remote(num_cpus=1, max_retries=1)(_finish)
    refs: dict[str, ray.ObjectRef[str]] = {}
    for step in steps:
        refs[step.key] = task.remote(step, *(refs[need.key] for need in step.needs if need.key in refs))
    pending = list(refs.values())
    try:
        while pending:
            done, pending = ray.wait(pending, timeout=WAIT_S)
            yield from ray.get(done)
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)


def _finish(step: Step, *_needed: str) -> str:
    """Run ``step``; the further arguments are those of its needs, on whose tasks Ray lets it wait."""
    return step.finish()
