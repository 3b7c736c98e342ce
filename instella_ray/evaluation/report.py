"""``report.html`` of an evaluation: a self-contained page rendered from its output folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from .. import storage
from ..rendering import Goal, flat, render, svg_curves
from .citation import PARTS, images_protocol, protocol
from .metrics.base import better
from .metrics.presets import PROTOCOLS, UNSTATED, Preset, Published, preset
from .results import Evaluation, Json

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
PROTOCOL = {
    "sampler": "sampler",
    "guidance": "guidance_scale",
    "temperature": "temperature",
    "steps": "num_inference_steps",
    "rho": "rho",
}
"""Fields of :class:`.metrics.presets.Sampling`, and their names in the sampling config."""


def write_report(output: str) -> str:
    """Render the report of a finished evaluation; returns its path."""
    results = Evaluation(output)
    settings, card = list(results.settings.values()), results.card
    table = preset(card["preset"]) if card["preset"] else None
    rows = {setting["name"]: metric_rows(setting, table, card) for setting in settings}
    # All settings of an evaluation are measured in the same way.
    protocols = {result["name"]: dict(protocol(result)) for result in settings[0]["metrics"].values()}
    page = render(
        TEMPLATE,
        card=card,
        settings=settings,
        images={name: results.images(name) for name in results.settings} if card["size"] else {},
        training=results.training_images,
        rows=rows,
        goals={name: any(row.get("goal") for row in found) for name, found in rows.items()},
        protocols=protocols,
        protocol_keys=[key for key in PARTS if any(key in found for found in protocols.values())],
        made=images_protocol,
        preset=table,
        differences={setting["name"]: differences(table, card, setting) for setting in settings} if table else {},
        curves=list(curves(settings)) if len(settings) > 1 else [],
        names=metric_names(settings),
        best=best(settings),
        flat=flat,
        about=about,
    )
    path = storage.join(output, REPORT)
    storage.write_text(path, page)
    return path


def metric_rows(setting: Json, table: Preset | None, card: Json) -> list[Json]:
    """Return rows of all results of a setting, then the published values that were not measured.

    ``published`` of a row is the published value of the same name where samples and metric are the paper's protocol, else
    None; ``withheld`` says what differs in the metric alone. ``goal`` compares the row with the published value.
    """
    found = [(row, result) for result in setting["metrics"].values() for row in (result, *result["parts"])]
    if (each := setting["about"].get("seconds_per_image")) is not None:
        how = f"one actor on {setting['about']['hardware']}, in bulk"
        row = {"name": "seconds_per_image", "value": each, "low": None, "high": None, "count": setting["measured"]}
        row |= {"implementation": how, "weights": None}
        found.append((row, row))
    published = {entry.metric: entry for entry in table.published} if table else {}
    other = differences(table, card, setting) if table else []
    rows = []
    for row, result in found:
        entry = published.pop(row["name"], None)
        withheld = metric_differences(table, setting, result) if table and entry else []
        entry = None if other or withheld else entry
        rows.append({**row, "published": entry, "withheld": withheld, "goal": _goal(row["value"], entry)})
    return rows + [
        {"name": name, "value": None, "published": entry, "withheld": []} for name, entry in published.items()
    ]


def _goal(value: float | None, published: Published | None) -> Goal | None:
    if value is None or published is None:
        return None
    return Goal(published.metric, value, published.value, ">=" if published.better == "higher" else "<=")


def differences(table: Preset, card: Json, setting: Json) -> list[str]:
    """Return what differs between a setting's images and those of the published protocol, one text each."""
    about, found = setting["about"], list[str]()
    if card["size"] not in (None, table.size):
        found.append(f"images of {card['size']} px, the paper's {table.size}")
    expected = "samples" if table.model else "reconstructions"
    if card["measured_inputs"] != expected:
        return [*found, f"{card['measured_inputs']}, the paper's {expected}"]
    if table.model is None:
        return found
    if about["kind"] != table.model:
        found.append(f"model of kind {about['kind']}, the paper's {table.model}")
    if about["quantization"] != "none":
        found.append(f"model rounded to {about['quantization']}, the paper's is not")
    if table.sampling is None:
        return [*found, "how the model was sampled is not in the paper"]
    if by_prompt := about.get("by_prompt"):
        found.append(f"{', '.join(by_prompt)} by prompt, the paper's the same for all")
    for theirs, ours in PROTOCOL.items():
        if about["sampling"][ours] != (of := getattr(table.sampling, theirs)):
            found.append(f"{theirs} {about['sampling'][ours]}, the paper's {of}")
    return found


def metric_differences(table: Preset, setting: Json, result: Json) -> list[str]:
    """Return what differs between a result and the paper's protocol of its metric, one text each."""
    name = result["name"]
    if name in UNSTATED:
        return [UNSTATED[name]]
    found = PROTOCOLS[name].differences(name, result)
    if name in table.prompts and (each := setting["about"].get("images_per_prompt")):
        prompts, expected = setting["measured"] // each, (table.prompts[name], table.images_per_prompt[name])
        if (prompts, each) != expected:
            found.append(f"{name} over {prompts} prompts x {each}, the paper's {expected[0]} x {expected[1]}")
    return found


def best(settings: Sequence[Json]) -> dict[str, list[str]]:
    """Return the settings with the best value of each metric that has a better direction."""
    found: dict[str, list[str]] = {}
    for name in metric_names(settings):
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
    for name, label in metric_names(settings).items():
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
            yield f"{label} over {key}", svg_curves(lines, axis=key, spans=spans)


def about(result: Json) -> Iterator[tuple[str, str]]:
    """Yield rows of a run card on how a metric was measured."""
    yield "implementation", result["implementation"]
    if result["weights"]:
        yield "weights", f"{result['weights']} (sha256 {result['weights_hash']})"
    yield from flat(result["settings"])


def metric_names(settings: Sequence[Json]) -> dict[str, str]:
    """Return the name of each metric by that of its configuration, which a stand-in must not be shown under."""
    return {key: result["name"] for setting in settings for key, result in setting["metrics"].items()}
