"""Comparison of two evaluations: metric differences with significance tests, and images of the shared prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from .. import storage
from ..errors import UserError
from ..rendering import Cell, digits, render, table, value_text
from .metrics.base import Info, Metric, better
from .metrics.diversity import Diversity
from .metrics.rates import RateMetric
from .metrics.samples import SampleMetric
from .report import REPORT
from .results import Evaluation, Json
from .statistics import paired_difference

TEMPLATE = Path(__file__).with_name("compare.html.j2")
LEVEL = 0.05
NOTE = "p-values from a sign-flip permutation test over prompts, not corrected for the number of metrics"
IMAGES = 48


@dataclass(frozen=True)
class Row:
    """A metric (or part of one) measured in both evaluations."""

    name: str
    a: Json
    b: Json
    """Result as JSON, with ``value``, ``low``, ``high`` and ``count``."""
    difference: float
    """Value in B minus value in A."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    """Two-sided p-value; None for an unpaired comparison."""
    how: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class SettingComparison:
    """Comparison of one setting of evaluation A with one setting of evaluation B."""

    a: str
    b: str
    """``FOLDER`` or ``FOLDER#SETTING``."""
    rows: list[Row]
    refused: dict[str, str]
    """Reason by name of each metric that is not comparable."""
    differs: list[tuple[str, str, str]]
    """Differing input properties: dotted name, value in A, value in B."""
    images: list[tuple[Json, Json]]

    def text(self) -> str:
        """Format the comparison for a terminal."""
        lines = [f"A {self.a}", f"B {self.b}", "", table([_cells(row) for row in self.rows])]
        return "\n".join([*lines, *(f"not compared: {name}: {why}" for name, why in self.refused.items())])


def compare(a: str, b: str, output: str | None = None) -> list[SettingComparison]:
    """Compare two evaluation outputs, each ``FOLDER`` or ``FOLDER#SETTING``; write an HTML page to ``output``.

    Settings are paired by name; if each side has a single setting, those two are compared. Raises UserError if nothing
    is comparable.
    """
    first, second = _open(a), _open(b)
    found = [
        _compare(first[0], ours, second[0], theirs) for ours, theirs in _pairs(a, list(first[1]), b, list(second[1]))
    ]
    if not any(comparison.rows for comparison in found):
        reasons = "; ".join(f"{name}: {why}" for name, why in found[0].refused.items())
        raise UserError(f"{a} and {b}: nothing to compare ({reasons or 'no metric in both'})")
    if output is not None:
        pages = {
            f"Report of {name}": link for name, side in (("A", a), ("B", b)) if (link := _report_link(side, output))
        }
        storage.write_text(output, render(TEMPLATE, comparisons=found, note=NOTE, pages=pages))
    return found


def _report_link(side: str, output: str) -> str | None:
    """Return the path of an evaluation's report relative to the page ``output``; None unless both are on a local disk."""
    report = storage.join(side.partition("#")[0], REPORT)
    if not (storage.is_local(report) and storage.is_local(output) and storage.exists(report)):
        return None
    paths = [storage.filesystem(url)[1] for url in (report, output)]
    return quote(Path(os.path.relpath(paths[0], Path(paths[1]).parent)).as_posix())


def _open(name: str) -> tuple[Evaluation, list[str]]:
    folder, mark, setting = name.partition("#")
    evaluation = Evaluation(folder)
    if mark and setting not in evaluation.settings:
        raise UserError(f"{name}: no such setting, expected one of {', '.join(evaluation.settings)}")
    return evaluation, [setting] if mark else list(evaluation.settings)


def _pairs(a: str, ours: list[str], b: str, theirs: list[str]) -> list[tuple[str, str]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    shared = [(name, name) for name in ours if name in theirs]
    if not shared:
        raise UserError(f"{a} and {b}: no setting in both; name one of each as FOLDER#SETTING")
    return shared


def _compare(first: Evaluation, ours: str, second: Evaluation, theirs: str) -> SettingComparison:
    a, b = first.settings[ours], second.settings[theirs]
    asked = first.asked(ours), second.asked(theirs)
    same = {name for name, of in asked[0].items() if asked[1].get(name) == of}
    rows: list[Row] = []
    refused: dict[str, str] = {}
    for name in (name for name in a["metrics"] if name in b["metrics"]):
        metrics = first.metric(ours, name), second.metric(theirs, name)
        sizes = first.card["size"], second.card["size"]
        if why := incomparable(metrics[0].info, metrics[1].info, sizes):
            refused[name] = why
        else:
            rows += _rows(a["metrics"][name], b["metrics"][name], *metrics, same)
    for name in set(a["metrics"]) ^ set(b["metrics"]):
        refused[name] = f"measured in {'A' if name in a['metrics'] else 'B'} alone"
    about = {name: (_leaf(a["about"], name), _leaf(b["about"], name)) for name in _leaves(a["about"])}
    differs = [(name, value_text(left), value_text(right)) for name, (left, right) in about.items() if left != right]
    shown = first.images(ours), second.images(theirs)
    both = [name for name in a["shown"]["grid"] if name in same and name in shown[0] and name in shown[1]]
    images = [(shown[0][name], shown[1][name]) for name in both[:IMAGES]]
    titles = [f"{e.folder}#{s}" if s else e.folder for e, s in ((first, ours), (second, theirs))]
    return SettingComparison(titles[0], titles[1], rows, dict(sorted(refused.items())), differs, images)


def incomparable(a: Info, b: Info, sizes: tuple[int | None, int | None]) -> str | None:
    """Return the reason why results of the two metrics are not comparable; None if they are."""
    if a.name != b.name:
        return f"A measured {a.name}, B {b.name}: other metrics"
    ours, theirs = _facts(a), _facts(b)
    for key in _leaves({**ours, **theirs}):
        if _leaf(ours, key) != _leaf(theirs, key):
            return f"{key} is {_leaf(ours, key)} in A, {_leaf(theirs, key)} in B"
    images = a.settings.get("images")
    if sizes[0] != sizes[1] and images and images["size"] is None:
        return f"images of {sizes[0]} px in A, {sizes[1]} px in B"
    return None


def _facts(info: Info) -> Json:
    facts = asdict(info)
    reference = facts["settings"].get("reference")
    if reference and reference["sha256"]:  # identified by content: the file's path is irrelevant
        facts["settings"]["reference"] = {**reference, "source": None}
    return facts


def _rows(a: Json, b: Json, ours: Metric, theirs: Metric, same: set[str]) -> Iterator[Row]:
    """Yield the rows of a metric and of its parts."""
    parts = {part["name"]: part for part in b["parts"]}
    whole, others = _row(a, b), [_row(p, parts[p["name"]]) for p in a["parts"] if p["name"] in parts]
    if isinstance(ours, RateMetric) and isinstance(theirs, RateMetric):
        verdicts = ours.verdicts()
        names = sorted(same & set(verdicts) & set(theirs.verdicts()))
        sizes = Counter(verdicts[name].category for name in names)
        # The score is the unweighted mean over categories, so a sample is weighted by the inverse of its category's size.
        weights = {name: len(names) / len(sizes) / sizes[verdicts[name].category] for name in names}
        yield _paired(whole, ours, theirs, weights)
        for row in others:
            category = row.name.rpartition("/")[2]
            yield _paired(row, ours, theirs, {name: 1.0 for name in names if verdicts[name].category == category})
    elif isinstance(ours, SampleMetric | Diversity) and isinstance(theirs, SampleMetric | Diversity):
        shared = sorted(same & set(_scores(ours)) & set(_scores(theirs)))
        yield _paired(whole, ours, theirs, dict.fromkeys(shared, 1.0))
        yield from map(_unpaired, others)
    else:
        yield from map(_unpaired, (whole, *others))


def _row(a: Json, b: Json) -> Row:
    known = a["value"] is not None and b["value"] is not None
    return Row(a["name"], a, b, b["value"] - a["value"] if known else float("nan"))


def _scores(metric: SampleMetric | Diversity) -> dict[str, float]:
    """Return scores by sample (or prompt) name; empty if computing them needs a network that is not loaded."""
    try:
        return metric.scores()
    except UserError:
        return {}


def _paired(row: Row, ours: Any, theirs: Any, weights: Mapping[str, float]) -> Row:
    """Compute the weighted difference over the samples that both evaluations share."""
    if len(weights) < 2:
        return _unpaired(row)
    a, b, names = ours.scores(), theirs.scores(), list(weights)
    scale = np.array([weights[name] for name in names])
    groups = None if isinstance(ours, Diversity) else [ours.groups()[name] for name in names]
    found = paired_difference(scale * [b[name] for name in names], scale * [a[name] for name in names], groups)
    most = max(row.a["count"], row.b["count"])
    kind = "prompts" if isinstance(ours, Diversity) else "samples"
    how = f"paired over {len(names)}{f' of {most}' if kind == 'samples' and len(names) < most else ''} {kind}"
    values: dict[str, Any] = {"difference": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}
    return replace(row, **values, how=how, verdict=_verdict(row.name, found.value, found.p_value))


def _unpaired(row: Row) -> Row:
    ends = [row.a["low"], row.a["high"], row.b["low"], row.b["high"]]
    how = "unpaired, no interval"
    if None not in ends:
        apart = row.a["high"] < row.b["low"] or row.b["high"] < row.a["low"]
        how = f"unpaired, intervals {'apart' if apart else 'overlap'}"
    return replace(row, how=how, verdict="equal" if row.difference == 0 else "")


def _verdict(name: str, difference: float, p_value: float) -> str:
    if difference == 0 and p_value == 1:
        return "equal"
    if p_value >= LEVEL:
        return "no difference seen"
    way = better(name)
    if way is None:
        return "B higher" if difference > 0 else "A higher"
    return "B better" if (difference > 0) == (way == "higher") else "A better"


def _cells(row: Row) -> dict[str, Cell]:
    number = partial(digits, significant=4)

    def interval(low: float | None, high: float | None) -> str:
        return f" [{number(low)}, {number(high)}]" if low is not None and high is not None else ""

    return {
        "metric": row.name,
        "A": number(row.a["value"]) + interval(row.a["low"], row.a["high"]),
        "B": number(row.b["value"]) + interval(row.b["low"], row.b["high"]),
        "B - A": number(row.difference) + interval(row.low, row.high),
        "p": "" if row.p_value is None else digits(row.p_value),
        "how": row.how,
        "verdict": row.verdict,
    }


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _leaf(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
