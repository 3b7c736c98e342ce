"""``report.html`` of an evaluation: a self-contained page rendered from its output folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from .. import storage
from ..rendering import Goal, flat, render, svg_curves
from .metrics.base import better
from .metrics.presets import Preset, Published, preset
from .results import Evaluation, Json

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
PROTOCOL = {
    "sampler": "sampler",
    "guidance": "guidance_scale",
    "temperature": "temperature",
    "steps": "num_inference_steps",
}
"""Fields of :class:`.metrics.presets.Sampling`, and their names in the sampling config."""


def write_report(output: str) -> str:
    """Render the report of a finished evaluation; returns its path."""
    results = Evaluation(output)
    settings, card = list(results.settings.values()), results.card
    table = preset(card["preset"]) if card["preset"] else None
    page = render(
        TEMPLATE,
        card=card,
        settings=settings,
        images={name: results.images(name) for name in results.settings} if card["size"] else {},
        rows={setting["name"]: metric_rows(setting, table) for setting in settings},
        preset=table,
        differences={setting["name"]: differences(table, card, setting) for setting in settings} if table else {},
        curves=list(curves(settings)) if len(settings) > 1 else [],
        names=_names(settings),
        best=best(settings),
        flat=flat,
        about=about,
    )
    path = storage.join(output, REPORT)
    storage.write_text(path, page)
    return path


def metric_rows(setting: Json, table: Preset | None) -> list[Json]:
    """Return rows of all results of a setting with published values of the same name, then the other published values.

    ``goal`` of a row compares it with the published value; None where there is no such value.
    """
    found = [row for result in setting["metrics"].values() for row in (result, *result["parts"])]
    if (each := setting["about"].get("seconds_per_image")) is not None:
        how = f"one actor on {setting['about']['hardware']}, in bulk"
        row = {"name": "seconds_per_image", "value": each, "low": None, "high": None, "count": setting["measured"]}
        found.append({**row, "implementation": how, "weights": None})
    published = {entry.metric: entry for entry in table.published} if table else {}
    rows = []
    for row in found:
        entry = published.pop(row["name"], None)
        rows.append({**row, "published": entry, "goal": _goal(row["value"], entry)})
    return rows + [{"name": name, "value": None, "published": entry} for name, entry in published.items()]


def _goal(value: float | None, published: Published | None) -> Goal | None:
    if value is None or published is None:
        return None
    return Goal(published.metric, value, published.value, ">=" if published.better == "higher" else "<=")


def differences(table: Preset | None, card: Json, setting: Json) -> list[str]:
    """Return the differences between a setting and the published protocol, one text each."""
    about = setting["about"]
    found: list[str] = []
    if table is None:
        return found
    if card["size"] not in (None, table.size):
        found.append(f"images of {card['size']} px, the paper's {table.size}")
    if table.sampling is not None and "sampling" in about:
        for theirs, ours in PROTOCOL.items():
            if about["sampling"][ours] != (expected := getattr(table.sampling, theirs)):
                found.append(f"{theirs} {about['sampling'][ours]}, the paper's {expected}")
    if each := about.get("images_per_prompt"):
        names = {row["name"] for row in setting["metrics"].values()}
        prompts = setting["measured"] // each
        for name in sorted(names & set(table.prompts)):
            if (prompts, each) != (expected := (table.prompts[name], table.images_per_prompt[name])):
                found.append(f"{name} over {prompts} prompts x {each}, the paper's {expected[0]} x {expected[1]}")
    return found


def best(settings: Sequence[Json]) -> dict[str, list[str]]:
    """Return the settings with the best value of each metric that has a better direction."""
    found: dict[str, list[str]] = {}
    for name in _names(settings):
        results = {s["name"]: s["metrics"][name] for s in settings if name in s["metrics"]}
        values = {setting: r["value"] for setting, r in results.items() if r["value"] is not None}
        if len(set(values.values())) > 1 and (way := better(next(iter(results.values()))["name"])):
            goal = max(values.values()) if way == "higher" else min(values.values())
            found[name] = [setting for setting, value in values.items() if value == goal]
    return found


def curves(settings: Sequence[Json]) -> Iterator[tuple[str, Markup]]:
    """Yield title and chart for each metric and swept numeric parameter, with a line per value of the other parameters."""
    sampling = [setting["about"].get("sampling", {}) for setting in settings]
    keys = [key for key in sampling[0] if len({str(s.get(key)) for s in sampling}) > 1]
    for name in _names(settings):
        for key in (key for key in keys if isinstance(sampling[0][key], int | float)):
            lines: dict[str, list[tuple[float, float]]] = {}
            spans: dict[str, list[tuple[float, float, float]]] = {}
            for setting, values in sorted(zip(settings, sampling, strict=True), key=lambda pair: pair[1][key]):
                result = setting["metrics"].get(name)
                if result is None or result["value"] is None:
                    continue
                line = ", ".join(f"{other} {values[other]}" for other in keys if other != key)
                lines.setdefault(line, []).append((values[key], result["value"]))
                if None not in (result["low"], result["high"]):
                    spans.setdefault(line, []).append((values[key], result["low"], result["high"]))
            yield f"{name} over {key}", svg_curves(lines, axis=key, spans=spans)


def about(result: Json) -> Iterator[tuple[str, str]]:
    """Yield rows of a run card on how a metric was measured."""
    yield "implementation", result["implementation"]
    if result["weights"]:
        yield "weights", f"{result['weights']} (sha256 {result['weights_hash']})"
    yield from flat(result["settings"])


def _names(settings: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for setting in settings for name in setting["metrics"]))
