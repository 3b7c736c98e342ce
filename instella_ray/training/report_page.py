"""The page of a run's report: curves, previews, starts and checkpoints as HTML."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from .. import storage
from ..data.formats.patterns import pattern_text
from ..models.folders import checkpoint_step, finished_checkpoints
from ..rendering import flat, render, svg_curves, thumbnail
from ..sheet import TILE
from .checkpoints import best_checkpoint, scores
from .previews import AVERAGED, ORIGINALS, TrainingPreview, alike, joined
from .run_dir import CONFIG
from .settings import HELD_OUT, TrainConfig

REPORT = "report.html"
VALIDATION = "validation/report.html"
TEMPLATE = Path(__file__).with_name("run_report.html.j2")
POINTS = 240
"""Points of a curve: of more values, each point is the mean of as many."""
SMOOTHED = 50
"""Number of logged rows from which on the loss also has a running mean, over a twentieth of them."""
LOG_RANGE = 10.0
"""Ratio of the largest to the smallest value from which on a loss or norm has a logarithmic axis."""
TRAINING, HELD = "training", "held out"
LATEST = 1536
"""Largest width in pixels of a row of the latest preview."""

Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """Logged values of a metric."""

    steps: array[float]
    values: array[float]


@dataclass(frozen=True)
class RunState:
    """What the page of a run is drawn from."""

    run_dir: str
    cfg: TrainConfig
    status: str
    """running, finished or stopped."""
    reason: str
    """Why it stopped."""
    step: int
    """Completed steps."""
    written: str
    """Time of writing."""
    curves: Mapping[str, Curve]
    """By metric."""
    starts: Sequence[Mapping[str, Any]]
    """Every start of the workers, in order."""
    previews: Mapping[int, TrainingPreview]
    """By step, reduced."""
    latest: TrainingPreview | None


@dataclass(frozen=True)
class Chart:
    """Metrics of one chart by the labels of their curves."""

    title: str
    metrics: Mapping[str, str]
    log: bool = False
    """Whether the axis is logarithmic for values over :data:`LOG_RANGE`."""


CHARTS = (
    Chart(
        "Loss", {TRAINING: "loss", f"{HELD}, EMA": "held_out_loss", f"{HELD}, raw weights": "held_out_loss_raw"}, True
    ),
    Chart("PSNR (dB)", {TRAINING: "psnr", HELD: "held_out_psnr"}),
    Chart("Bit accuracy", {TRAINING: "bit_accuracy", HELD: "held_out_bit_accuracy"}),
    Chart("Bit accuracy by timestep, from t0 (clean) to t4 (noise)", {f"t{i}": f"bit_accuracy_t{i}" for i in range(5)}),
    Chart(
        "Held-out bit accuracy by timestep, from t0 (clean) to t4 (noise)",
        {f"t{i}": f"held_out_bit_accuracy_t{i}" for i in range(5)},
    ),
    Chart("Gradient norm before clipping", {"mean": "gradient_norm", "largest": "gradient_norm_max"}, True),
    Chart("Learning rate", {"lr": "lr"}),
    Chart("Throughput (images/s)", {"images/s": "images_per_second"}),
    Chart("Share of the time spent waiting for data", {"data wait": "data_wait"}),
    Chart("Peak memory of rank 0 (GB)", {"memory": "memory_gb"}),
    Chart("Model FLOP utilization", {"MFU": "mfu"}),
    Chart("Skipped batches", {"skipped": "skipped_batches"}),
)
NOT_SHOWN = {"flops_per_second"}
"""Metrics without a chart: it is the throughput times a constant."""


def render_run(state: RunState, config: Mapping[str, Any]) -> str:
    """Render the page of a run with the contents of its config.yaml."""
    known = {metric for chart in CHARTS for metric in chart.metrics.values()} | NOT_SHOWN
    others = [name for name in state.curves if name not in known and name.removeprefix(HELD_OUT) not in known]
    more = [
        Chart(name.replace("_", " "), {TRAINING: name, HELD: HELD_OUT + name})
        for name in dict.fromkeys(name.removeprefix(HELD_OUT) for name in others)
    ]
    skipped = state.curves.get("skipped_batches")
    validation = {"Validation": VALIDATION} if storage.exists(storage.join(state.run_dir, VALIDATION)) else {}
    return render(
        TEMPLATE,
        state=state,
        run=state.run_dir.rstrip("/").rpartition("/")[2],
        pages={"Configuration": CONFIG, **validation},
        data=data_text(config),
        left=time_left(state),
        now={name: values[-1] for name, (_, values) in state.curves.items()},
        charts=list(drawn(CHARTS, state)),
        more=list(drawn(more, state)),
        latest=_latest(state.latest) if state.latest else [],
        grid=_grid(state.previews) if state.previews else [],
        labels=state.previews[max(state.previews)].labels if state.previews else (),
        skipped=int(skipped[1][-1]) if skipped else 0,
        restarts=state.starts[1:],
        checkpoints=_checkpoints(state),
        config=flat(config),
    )


def data_text(config: Mapping[str, Any]) -> str:
    """Return what a run trains on, from its configuration."""
    codes = config.get("codes")
    if isinstance(codes, list) and len(codes) == 1:
        codes = codes[0]["folder"]
    if isinstance(codes, list):
        return ", ".join(f"{source['folder']} (weight {source.get('weight', 1)})" for source in codes)
    given = codes or config.get("images") or config.get("data") or ""
    return pattern_text(tuple(given) if isinstance(given, list) else given)


def time_left(state: RunState) -> str:
    """Return the time that the remaining steps take at the last logged throughput; empty if it is not known."""
    _, speeds = state.curves.get("images_per_second", ((), ()))
    if state.status != "running" or state.step == state.cfg.steps or not speeds or not speeds[-1]:
        return ""
    seconds = (state.cfg.steps - state.step) * state.cfg.global_batch / speeds[-1]
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def drawn(charts: Sequence[Chart], state: RunState) -> Iterator[tuple[str, Markup]]:
    """Draw the charts that have values; restarts are marked."""
    restarts = [start["step"] for start in state.starts[1:]]
    for chart in charts:
        series = {label: points(state.curves, name) for label, name in chart.metrics.items() if name in state.curves}
        series = {label: line for label, line in series.items() if line}
        if not series:
            continue
        if "loss" in chart.metrics.values() and len(rows := state.curves.get("loss", ((), ()))[1]) >= SMOOTHED:
            series = {**series, "training, running mean": running_mean(state.curves["loss"], max(1, len(rows) // 20))}
        values = [value for line in series.values() for _, value in line]
        wide = chart.log and min(values) > 0 and max(values) > LOG_RANGE * min(values)
        yield chart.title, svg_curves(series, log=wide, marks=restarts)


def points(curves: Mapping[str, Curve], name: str) -> Points:
    """Return the finite values of a metric as (step, value), at most :data:`POINTS` of them, each a mean of as many."""
    steps, values = (np.array(each) for each in curves[name])
    finite = np.isfinite(values)
    return _binned(steps[finite], values[finite])


def running_mean(curve: Curve, count: int) -> Points:
    """Return the mean of the last ``count`` finite values at each step."""
    steps, values = (np.array(each) for each in curve)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(count, len(values) + 1)
    return _binned(steps[count - 1 :], (sums[ends] - sums[ends - count]) / count)


def _binned(steps: np.ndarray, values: np.ndarray) -> Points:
    each = math.ceil(len(values) / POINTS) or 1
    starts = range(0, len(values), each)
    return [(float(steps[i : i + each][-1]), float(values[i : i + each].mean())) for i in starts]


def _latest(preview: TrainingPreview) -> list[tuple[str, bytes]]:
    """Return the rows of the latest preview by name, as image files."""
    return [(name, thumbnail(joined(images), LATEST)) for name, images in preview.rows.items()]


def _grid(previews: Mapping[int, TrainingPreview]) -> list[tuple[str, bytes]]:
    """Return a row of images for each step, after the originals if there are any, with its name."""
    steps = alike(previews)
    rows = [(f"step {step:,}", previews[step].rows[AVERAGED]) for step in steps]
    originals = previews[steps[-1]].rows.get(ORIGINALS)
    if originals is not None:
        rows.insert(0, (ORIGINALS, originals))
    return [(name, thumbnail(joined(images), TILE * len(images))) for name, images in rows]


def _checkpoints(state: RunState) -> list[dict[str, Any]]:
    """Return the kept checkpoints, with their losses and whether each is the best."""
    found = {folder: scores(folder) for folder in finished_checkpoints(state.run_dir)}
    best = best_checkpoint(found, state.cfg.keep_best) if state.cfg.keep_best else []
    names = ["loss", "held_out_loss", *([state.cfg.keep_best.metric] if state.cfg.keep_best else [])]
    return [
        {
            "step": checkpoint_step(folder),
            "best": folder in best,
            "metrics": {name: values[name] for name in dict.fromkeys(names) if name in values},
        }
        for folder, values in found.items()
    ]
