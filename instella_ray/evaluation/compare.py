"""Comparison of evaluations with the first of them: metrics, what differs otherwise, and images of shared prompts."""

from __future__ import annotations

import os
import string
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import storage
from ..config import check_output_file
from ..errors import UserError
from ..rendering import digits, render, value_text
from .differences import NOTE, PAIRED, Row, differences
from .metrics.base import Info, Metric
from .report import REPORT
from .results import Evaluation, Json

TEMPLATE = Path(__file__).with_name("compare.html.j2")
PAGE = "compare.html"
IMAGES = 48
COSTS = {"actor_seconds", "seconds", "cost", "seconds_per_image"}
"""What a run took, which differs between any two."""
MISSING = "not recorded"


@dataclass(frozen=True)
class ComparedRun:
    """One setting of an evaluation."""

    label: str
    """``A`` for the baseline, then ``B``, ``C``, ..."""
    evaluation: Evaluation
    setting: str

    @property
    def name(self) -> str:
        """``FOLDER`` or ``FOLDER#SETTING``."""
        return f"{self.evaluation.folder}#{self.setting}" if self.setting else self.evaluation.folder

    @property
    def results(self) -> Json:
        return self.evaluation.settings[self.setting]

    def facts(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return everything that was recorded about the run and its metrics, besides costs, by dotted name.

        ``names``: a metric's name in the keys, by that of its configuration.
        """
        found = flattened(self.results["about"])
        apart = ("name", "about", "units", "metrics", "shown", "citations")
        counts = {key: value for key, value in self.results.items() if key not in apart}
        found |= flattened({"card": self.evaluation.card, **counts})
        for name, result in self.results["metrics"].items():
            how = {key: result[key] for key in ("name", "implementation", "weights", "weights_hash")}
            settings = self.evaluation.first(self.setting, name).info.settings
            found |= flattened({"metrics": {names[name]: {**how, "settings": settings}}})
        return {name: value for name, value in found.items() if name.rpartition(".")[2] not in COSTS}

    def metric(self, name: str) -> Metric:
        """Load a metric, whole only if it has scores to pair: the others' results are in ``results``."""
        first = self.evaluation.first(self.setting, name)
        return self.evaluation.metric(self.setting, name) if isinstance(first, PAIRED) else first


@dataclass(frozen=True)
class RunDifferences:
    """Differences of one run from the baseline."""

    label: str
    rows: list[Row]
    refused: dict[str, str]
    """Reason by name of each metric that is not comparable, of the baseline's if the two have other names."""


@dataclass(frozen=True)
class SettingComparison:
    """Comparison of one setting in each of several evaluations."""

    setting: str
    runs: dict[str, str]
    """``FOLDER`` or ``FOLDER#SETTING`` by label; the first is the baseline."""
    others: list[RunDifferences]
    differs: list[tuple[str, dict[str, str]]]
    """Differing properties of the runs: dotted name, and value by label."""
    cautions: list[str]
    """Reasons of the results not to take a value at face value, with run and metric."""
    images: list[dict[str, Json]]
    """Thumbnail rows of the same prompt by label."""

    @property
    def metrics(self) -> list[tuple[str, Json, dict[str, Row]]]:
        """Name of each compared metric, the baseline's result, and the rows of the other runs by label."""
        found: dict[str, dict[str, Row]] = {}
        for other in self.others:
            for row in other.rows:
                found.setdefault(row.name, {})[other.label] = row
        return [(name, next(iter(rows.values())).a, rows) for name, rows in found.items()]

    def text(self) -> str:
        """Format the comparison for a terminal: lines of about 100 characters."""
        blocks = [[f"{label}  {name}" for label, name in self.runs.items()], list(_table(self.metrics, self.runs))]
        blocks.append([_wrapped(f"Caution: {caution}") for caution in self.cautions])
        for other in self.others:
            by_how: dict[str, list[str]] = {}
            for row in other.rows:
                by_how.setdefault(row.how, []).append(row.name)
            blocks.append([_wrapped(f"{other.label}: {', '.join(names)}: {how}") for how, names in by_how.items()])
            refused = (f"{other.label}, not compared: {name}: {why}" for name, why in other.refused.items())
            blocks[-1] += map(_wrapped, refused)
        if self.differs:
            told = ((name, "; ".join(f"{label} {value}" for label, value in of.items())) for name, of in self.differs)
            blocks.append(["What differs:", *(_wrapped(f"  {name}: {values}") for name, values in told)])
        return "\n\n".join("\n".join(lines) for lines in blocks if lines)

    def as_dict(self) -> Json:
        """Return plain JSON values, without the images."""
        return {
            "setting": self.setting,
            "runs": self.runs,
            "others": [{**vars(other), "rows": [row.as_dict() for row in other.rows]} for other in self.others],
            "differs": dict(self.differs),
            "cautions": self.cautions,
        }


def compare(*names: str, output: str | None = None) -> list[SettingComparison]:
    """Compare evaluation outputs, each ``FOLDER`` or ``FOLDER#SETTING``, with the first; write an HTML page to ``output``.

    Settings are paired by name; if each side has a single setting, those are compared. The settings of a single sweep are
    compared with each other. Raises UserError
    if nothing is comparable, and for an output that cannot be written.
    """
    if output is not None:
        check_output_file(output)
    sides = [_open(name) for name in names]
    if len(sides) == 1:
        sides = [(side, [setting]) for side, own in sides for setting in own]
    if not 2 <= len(sides) <= len(string.ascii_uppercase):
        raise UserError(f"{', '.join(names)}: {len(sides)} to compare, expected 2 to {len(string.ascii_uppercase)}")
    found = []
    for setting in _settings(names, sides):
        chosen = (setting if setting is not None else own[0] for _, own in sides)
        runs = [
            ComparedRun(label, evaluation, name)
            for label, (evaluation, _), name in zip(string.ascii_uppercase, sides, chosen, strict=False)
        ]
        found.append(_compare(runs))
    if not any(other.rows for comparison in found for other in comparison.others):
        reasons = "; ".join(f"{name}: {why}" for name, why in found[0].others[0].refused.items())
        raise UserError(f"{' and '.join(names)}: nothing to compare ({reasons or 'no metric in all'})")
    if output is not None:
        links = {
            label: _report_link(side.folder, output) for label, (side, _) in zip(found[0].runs, sides, strict=True)
        }
        pages = {f"Report of {label}": link for label, link in links.items() if link}
        storage.write_text(output, render(TEMPLATE, comparisons=found, note=NOTE, pages=pages))
    return found


def _report_link(folder: str, output: str) -> str | None:
    """Return the link of an evaluation's report relative to the page ``output``; None unless both are on a local disk."""
    report = storage.join(folder, REPORT)
    if not (storage.is_local(report) and storage.is_local(output) and storage.exists(report)):
        return None
    paths = [storage.filesystem(url)[1] for url in (report, output)]
    return quote(os.fsencode(Path(os.path.relpath(paths[0], Path(paths[1]).parent)).as_posix()))


def _open(name: str) -> tuple[Evaluation, list[str]]:
    folder, setting = _split(name)
    evaluation = Evaluation(folder)
    if setting is not None and setting not in evaluation.settings:
        raise UserError(f"{name}: no such setting, expected one of {', '.join(evaluation.settings)}")
    return evaluation, list(evaluation.settings) if setting is None else [setting]


def _split(name: str) -> tuple[str, str | None]:
    """Split ``FOLDER#SETTING``; a folder of the whole name comes first, then that of the longest part before a ``#``."""
    folder, setting = name, None
    while folder and not storage.exists(folder):
        folder, _, rest = folder.rpartition("#")
        setting = f"{rest}{'' if setting is None else f'#{setting}'}"
    return (folder, setting) if folder else (name, None)


def _settings(names: Sequence[str], sides: Sequence[tuple[Evaluation, list[str]]]) -> list[str | None]:
    """Return the settings that all sides have; None alone for the single setting of each."""
    if all(len(own) == 1 for _, own in sides):
        return [None]
    shared: list[str | None] = [name for name in sides[0][1] if all(name in own for _, own in sides)]
    if not shared:
        raise UserError(f"{' and '.join(names)}: no setting in all; name one of each as FOLDER#SETTING")
    return shared


def _compare(runs: Sequence[ComparedRun]) -> SettingComparison:
    base = runs[0]
    asked = [run.evaluation.asked(run.setting) for run in runs]
    same = [{name for name, of in asked[0].items() if theirs.get(name) == of} for theirs in asked]
    ours = {name: base.metric(name) for name in base.results["metrics"]}
    others = [_differences(base, ours, run, shared) for run, shared in zip(runs[1:], same[1:], strict=True)]
    names = {key: result["name"] for run in runs[::-1] for key, result in run.results["metrics"].items()}
    facts = [run.facts(names) for run in runs]
    differs = []
    for name in dict.fromkeys(name for found in facts for name in found):
        values = [found.get(name, MISSING) for found in facts]
        if any(value != values[0] for value in values):
            differs.append((name, {run.label: value_text(v) for run, v in zip(runs, values, strict=True)}))
    shown = [run.evaluation.images(run.setting) for run in runs]
    grid = base.results["shown"]["grid"]
    if not set[str].intersection(
        *map(set, asked)
    ):  # images of other models on the same prompts, under names of their own
        grid = [shown[0][name]["prompt"] for name in grid if name in shown[0]]
        shown = [{row["prompt"]: row for row in rows.values() if row["prompt"]} for rows in shown]
    else:
        shown = [{name: rows[name] for name in rows if name in found} for rows, found in zip(shown, same, strict=True)]
    both = [name for name in grid if all(name in rows for rows in shown)]
    images = [{run.label: rows[name] for run, rows in zip(runs, shown, strict=True)} for name in both[:IMAGES]]
    setting = base.setting if len({run.setting for run in runs}) == 1 else ""
    cautions = [
        f"{run.label}, {result['name']}: {caution}"
        for run in runs
        for result in run.results["metrics"].values()
        for caution in result.get("cautions", ())
    ]
    return SettingComparison(setting, {run.label: run.name for run in runs}, others, differs, cautions, images)


def _differences(base: ComparedRun, ours: Mapping[str, Metric], other: ComparedRun, same: set[str]) -> RunDifferences:
    a, b, labels = base.results, other.results, (base.label, other.label)
    metrics, refused = {}, {}
    for name in (name for name in a["metrics"] if name in b["metrics"]):
        pair = ours[name], other.metric(name)
        sizes = base.evaluation.card["size"], other.evaluation.card["size"]
        if why := incomparable(pair[0].info, pair[1].info, sizes, labels):
            refused[pair[0].info.name] = why
        else:
            metrics[name] = pair
    for label, side, rest in ((labels[0], a, b), (labels[1], b, a)):
        alone = side["metrics"].keys() - rest["metrics"].keys()
        refused |= {side["metrics"][name]["name"]: f"measured in {label} alone" for name in alone}
    seeds = a["about"].get("seed") == b["about"].get("seed")
    rows = differences(a["metrics"], b["metrics"], metrics, same, labels, seeds=seeds)
    return RunDifferences(other.label, rows, dict(sorted(refused.items())))


def incomparable(
    a: Info, b: Info, sizes: tuple[int | None, int | None], labels: tuple[str, str] = ("A", "B")
) -> str | None:
    """Return the reason why results of the two metrics are not comparable; None if they are."""
    first, second = labels
    if a.name != b.name:
        return f"{first} measured {a.name}, {second} {b.name}: other metrics"
    ours, theirs = flattened(_facts(a)), flattened(_facts(b))
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)} in {first}, {theirs.get(key)} in {second}"
    images = a.settings.get("images")
    if sizes[0] != sizes[1] and images and images["size"] is None:
        return f"images of {sizes[0]} px in {first}, {sizes[1]} px in {second}"
    return None


def _facts(info: Info) -> Json:
    facts = asdict(info)
    reference = facts["settings"].get("reference")
    if reference and reference["sha256"]:  # identified by content: the file's path is irrelevant
        facts["settings"]["reference"] = {**reference, "source": None}
    return facts


def _table(metrics: Sequence[tuple[str, Json, dict[str, Row]]], runs: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a table with a block a metric and a line a run."""
    number = partial(digits, significant=4)
    base = next(iter(runs))

    def measured(value: float | None, low: float | None, high: float | None) -> str:
        return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"

    head = ("", "value", f"less {base}", "p", "p (Holm)", "verdict")
    blocks: list[tuple[str, list[tuple[str, ...]]]] = []
    for name, a, rows in metrics:
        lines: list[tuple[str, ...]] = [(base, measured(a["value"], a["low"], a["high"]), "", "", "", "")]
        for label, row in rows.items():
            p_values = ("" if p is None else digits(p, significant=2) for p in (row.p_value, row.adjusted))
            value = measured(row.b["value"], row.b["low"], row.b["high"])
            lines.append((label, value, measured(row.difference, row.low, row.high), *p_values, row.verdict))
        blocks.append((name, lines))
    every = [head, *(line for _, lines in blocks for line in lines)]
    widths = [max(len(line[column]) for line in every) for column in range(len(head))]

    def padded(line: tuple[str, ...]) -> str:
        return "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()

    yield padded(head)
    for name, lines in blocks:
        yield name
        yield from map(padded, lines)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def flattened(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
