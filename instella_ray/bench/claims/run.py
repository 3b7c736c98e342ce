"""Runner of the claims: draws the scenes, runs the steps that lack a result, side by side on Ray, and writes the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ... import logs, storage
from ...data.formats.shards import write_webdataset
from ...data.scenes import scene_rows
from ...errors import UserError
from ..report import SuiteResult
from .arms import Step, TrainedTokenizer, arm_config, arm_steps
from .report import verdict_rows, write_page
from .settings import ClaimsBench
from .verdicts import verdict_of

SCENES_PER_SHARD = 2000
WAIT_S = 1.0
"""Longest time between two looks at the tasks of Ray, so that Ctrl-C is noticed (s)."""


def run_claims(cfg: ClaimsBench, folder: str) -> SuiteResult:
    """Run what has no result in ``folder`` yet, and write the page.

    A killed run continues with the same command. Raises UserError for overrides that are no settings of the arms, before
    anything runs.
    """
    check_claims(cfg)
    folder = storage.absolute(folder)
    steps = all_steps(cfg, folder)
    missing = [step for step in steps if step.result() is None]
    draw_scenes(cfg, folder, missing)
    with logs.progress_bar(total=len(steps), initial=len(steps) - len(missing), desc="claims", unit="step") as bar:
        for key in run_here(missing) if cfg.local else run_on_ray(missing):
            bar.set_postfix_str(key, refresh=False)
            bar.update()
    verdicts = [verdict_of(cfg, claim, folder) for claim in cfg.claims]
    page = storage.absolute(cfg.page or storage.join(folder, "claims.md"))
    write_page(page, cfg, verdicts)
    print(f"page: {page}")
    about = cfg.model_dump(mode="json", exclude={"claims", "overrides", "page"})
    return SuiteResult("Claims of the paper", about, verdict_rows(verdicts))


def check_claims(cfg: ClaimsBench) -> None:
    """Raise UserError unless all arms can be configured, and measured at the sizes of ``cfg``."""
    if not cfg.claims:
        raise UserError("claims.claims: expected at least one claim, as in --config bench/claims")
    for claim in cfg.claims:
        if claim.size is not None and claim.size not in cfg.sizes:
            raise UserError(f"claim '{claim.name}': size {claim.size}: expected one of sizes {cfg.sizes}")
        for arm in (claim.proposed, claim.baseline):
            model = arm_config(cfg, claim, arm).tokenizer.model
            if wrong := [size for size in cfg.sizes if size % model.decode_multiple]:
                raise UserError(
                    f"claim '{claim.name}', arm '{arm.name}': sizes {wrong[0]}: not a multiple of {model.decode_multiple}"
                )


def all_steps(cfg: ClaimsBench, folder: str) -> list[Step]:
    """Return the steps of all arms and seeds, each once and after those that it needs, all of a seed together."""
    found: dict[str, Step] = {}
    for seed in cfg.seeds:
        for claim in cfg.claims:
            for arm in (claim.proposed, claim.baseline):
                for step in arm_steps(cfg, folder, claim, arm, seed):
                    found.setdefault(step.key, step)
    return list(found.values())


def draw_scenes(cfg: ClaimsBench, folder: str, steps: Sequence[Step]) -> None:
    """Write the training scenes as WebDataset tars at each size that ``steps`` need, unless they are there."""
    sizes = {step.data_size for step in steps if isinstance(step, TrainedTokenizer)}
    for size in sorted(sizes):
        target, mark = storage.join(folder, f"scenes-{size}"), {"scenes": cfg.scenes}
        done = storage.join(target, "done.json")
        if storage.exists(done) and storage.read_json(done) == mark:
            continue
        with logs.progress_bar(total=cfg.scenes, desc=f"scenes of {size} px", unit="image") as bar:
            for _, count in write_webdataset(scene_rows(cfg.scenes, 0, size), target, SCENES_PER_SHARD):
                bar.update(count)
        storage.write_json(done, mark)


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
    # A task that is lost, for example for lack of memory, resumes nothing that another would not.
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
