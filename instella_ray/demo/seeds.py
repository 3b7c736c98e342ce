"""Demos of several seeds, and the table of their results."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .. import storage
from ..data.scenes import CATEGORIES
from ..errors import UserError
from ..evaluation.statistics import wilson
from ..rendering import Cell
from .recipe import KINDS, DemoConfig
from .state import STATE, DemoState, Mode


class DemoResult(NamedTuple):
    """Results of a finished demo."""

    seed: int
    seconds: float
    psnr: float
    """Of held-out images, in dB."""
    scores: dict[str, dict[str, float]]
    """Scene scores of each kind of generator by category, and ``overall``."""
    prompts: int
    """Prompts per category."""

    def lowest(self, kind: str) -> str:
        """Return the category with the lowest score."""
        return min(CATEGORIES, key=lambda name: self.scores[kind][name])


def parse_seeds(text: str) -> list[int]:
    """Parse ``0-4`` or ``0,2,5-7`` to seeds in the given order; UserError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"seeds '{text}': expected numbers and ranges, such as 0-4 or 0,2,5")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds '{text}': a seed is given twice")
    return seeds


def run_seeds(demo: DemoConfig, seeds: Sequence[int], flags: Sequence[str], mode: Mode = "new") -> None:
    """Run the demo of each seed in ``demo.folder/seed-N``, in a process of its own with the further ``flags``.

    Finished demos are kept and interrupted ones resumed, unless ``mode`` is ``fresh``. UserError for folders of other
    demos, before the first one starts. Raises SystemExit with the exit code of a demo that fails.
    """
    if storage.exists(demo.path(STATE)):
        raise UserError(f"folder {demo.folder}: contains a demo; expected another folder for those of several seeds")
    todo: list[list[str]] = []
    for seed in seeds:
        each = demo.model_copy(update={"folder": demo.path(f"seed-{seed}"), "seed": seed})
        begun = not storage.is_empty(each.folder)
        state = DemoState(each, "fresh" if mode == "fresh" else "resume" if begun else "new")
        if mode == "fresh" or not state.finished:
            how = ["--fresh"] if mode == "fresh" else ["--resume"] * begun
            todo.append([*flags, "--folder", each.folder, "--seed", str(seed), *how])
    for arguments in todo:
        # A process of its own: a demo starts and ends its own Ray.
        if code := _run([sys.executable, "-m", "instella_ray", "demo", *arguments]):
            raise SystemExit(code)


def _run(command: Sequence[str]) -> int:
    """Run ``command`` and return its exit code, however long it takes to end after Ctrl-C, which reaches it too."""
    process = subprocess.Popen(command)
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_results(demo: DemoConfig, seeds: Sequence[int]) -> list[DemoResult]:
    """Read the results of :func:`run_seeds`."""
    return [read_result(demo.path(f"seed-{seed}")) for seed in seeds]


def read_result(folder: str) -> DemoResult:
    """Read the results of the finished demo of scenes in ``folder``."""
    saved = storage.read_json(storage.join(folder, STATE))
    stages, settings = saved["stages"], saved["settings"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    scores: dict[str, dict[str, float]] = {kind: stages["score"][kind] for kind in KINDS}
    psnr = stages["tokenizer quality"]["psnr_after"]
    return DemoResult(settings["seed"], seconds, psnr, scores, settings["prompts_per_category"])


def result_rows(results: Sequence[DemoResult]) -> list[dict[str, Cell]]:
    """Return a row a seed and one of their means; scores with Wilson's 95 % interval over the images, in brackets."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        row: dict[str, Cell] = {"seed": result.seed, "seconds": round(result.seconds), "PSNR dB": round(result.psnr, 1)}
        for kind in KINDS:
            scores, lowest = result.scores[kind], result.lowest(kind)
            row[kind] = _share(scores["overall"], result.prompts * len(CATEGORIES))
            row[f"{kind}: lowest"] = f"{lowest.replace('_', ' ')} {_share(scores[lowest], result.prompts)}"
        rows.append(row)
    return [*rows, _mean_row(results)]


def _mean_row(results: Sequence[DemoResult]) -> dict[str, Cell]:
    """Return the means over all seeds; the lowest category is that of the mean scores."""
    count = len(results)
    row: dict[str, Cell] = {
        "seed": "mean",
        "seconds": round(sum(r.seconds for r in results) / count),
        "PSNR dB": round(sum(r.psnr for r in results) / count, 1),
    }
    images = sum(r.prompts for r in results)
    for kind in KINDS:
        means = {name: sum(r.scores[kind][name] for r in results) / count for name in (*CATEGORIES, "overall")}
        lowest = min(CATEGORIES, key=means.__getitem__)
        row[kind] = _share(means["overall"], images * len(CATEGORIES))
        row[f"{kind}: lowest"] = f"{lowest.replace('_', ' ')} {_share(means[lowest], images)}"
    return row


def _share(share: float, images: int) -> str:
    low, high = wilson(share, images)
    return f"{share:.2f} [{low:.2f}, {high:.2f}]"
