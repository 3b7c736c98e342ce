"""Tables 1 to 3 of the paper, laid out as there: its own rows, and those of evaluations with a preset below them.

A number stands in a column only if its result has the name of the column's metric, which it has with that metric's weights
alone; what stood in for one is told below the table, under its own name, and so is what differs from the paper's protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bulk.sample_set import SampleRun
from ..errors import UserError
from ..models.checkpoint import build_model, read_checkpoint_config
from ..rendering import Cell, digits, table
from .metrics.presets import PRESETS, Preset
from .report import differences, metric_differences
from .results import Evaluation, Json

DASH = "–"
TASKS = {
    "Single Obj.": "geneval/single_object",
    "Two Obj.": "geneval/two_object",
    "Counting": "geneval/counting",
    "Colors": "geneval/colors",
    "Color Attr.": "geneval/color_attr",
    "Position": "geneval/position",
    "Overall ↑": "geneval",
    "CLIP ↑": "clip_score",
    "IR ↑": "image_reward",
}
QUALITY = {"rFID ↓": "rfid", "PSNR ↑": "psnr", "SSIM ↑": "ssim"}
THREE_DECIMALS = dict.fromkeys(("clip_score", "image_reward", "ssim"), 3)
"""Decimals of the paper's numbers, where they are not two."""
DATA = {"paper-table2-imagenet": "ImageNet", "paper-table2-coco": "COCO"}


@dataclass(frozen=True)
class TableLayout:
    """Columns of a table, and the paper's rows."""

    title: str
    facts: tuple[str, ...]
    """Columns before the metrics."""
    metrics: Mapping[str, str]
    """Names of results by column."""
    rows: Mapping[str, Mapping[str, Cell]]
    """What the paper's row has beside the metrics, by the preset of its numbers."""
    own: tuple[str, ...] = ()
    """Columns after the metrics, of which nothing is measured here."""
    note: str = ""


BIT: dict[str, Cell] = {"Tokenizer": "BIT (paper)", "Size": "397M", "# Tkn": 128}
DIFFUSION_BIT: dict[str, Cell] = {"Model": "Diffusion BIT (paper)", "Size": "1B", "GPU-days": "177 MI300X"}
LAYOUTS = (
    TableLayout(
        "Table 1: text-to-image generation",
        ("Model", "Size", "Reso."),
        TASKS,
        {
            "paper-table1-ar": {"Model": "Instella AR (paper)", "Size": "0.8B", "Reso.": 1024},
            "paper-table1": {"Model": "Instella Diff (paper)", "Size": "1.2B", "Reso.": 1024},
        },
    ),
    TableLayout(
        "Table 2: tokenizers",
        ("Tokenizer", "Size", "# Tkn"),
        {f"{data} {title}": f"{preset}/{name}" for preset, data in DATA.items() for title, name in QUALITY.items()},
        dict.fromkeys(DATA, BIT),
    ),
    TableLayout(
        "Table 3: efficiency",
        ("Model", "Size", "Steps"),
        {"FID-30K ↓": "fid", "Sec/img ↓": "seconds_per_image"},
        {
            "paper-table3": {**DIFFUSION_BIT, "Steps": 20},
            "paper-table3-50": {**DIFFUSION_BIT, "Steps": 50},
        },
        ("GPU-days",),
        "Sec/img is here the time of an actor an image, in bulk; the paper does not say how it measured. GPU-days are in the "
        "report of a training run.",
    ),
)


@dataclass
class OwnRow:
    """Row of evaluations of one model."""

    cells: dict[str, Cell]
    notes: dict[str, None] = field(default_factory=dict)
    """What its numbers are not, each once and in order."""


@dataclass(frozen=True)
class PaperTable:
    """One table with the notes below it."""

    title: str
    rows: list[dict[str, Cell]]
    notes: list[str]

    def text(self) -> str:
        """Format as Markdown, which is readable on a terminal too."""
        notes = "".join(f"\n- {note}" for note in self.notes)
        return f"## {self.title}\n\n{table(self.rows)}\n{notes}\n"


def paper_tables(folders: Sequence[str]) -> list[PaperTable]:
    """Lay out evaluations as the paper's tables; metrics of one model may be in several ``folders``.

    Raises UserError for folders without a finished evaluation, and for evaluations without a preset.
    """
    own: dict[str, dict[str, OwnRow]] = {layout.title: {} for layout in LAYOUTS}
    for folder in folders:
        evaluation = Evaluation(folder)
        preset = evaluation.card["preset"]
        if preset is None:
            raise UserError(f"{folder}: evaluated without a preset, expected one of {', '.join(PRESETS)}")
        layout = next(each for each in LAYOUTS if preset in each.rows)
        for setting in evaluation.settings.values():
            _add(own[layout.title], layout, PRESETS[preset], evaluation.card, setting)
    return [_laid_out(layout, own[layout.title]) for layout in LAYOUTS]


def _laid_out(layout: TableLayout, own: Mapping[str, OwnRow]) -> PaperTable:
    empty: dict[str, Cell] = dict.fromkeys((*layout.facts, *layout.metrics, *layout.own), DASH)
    rows = [empty | row for row in _paper_rows(layout)]
    notes = [layout.note] if layout.note and own else []
    for row in own.values():
        rows.append(empty | row.cells)
        steps = f", {row.cells['Steps']} steps" if "Steps" in row.cells else ""
        notes += [f"{row.cells[layout.facts[0]]}{steps}: {'; '.join(row.notes)}"] if row.notes else []
    return PaperTable(layout.title, rows, notes)


def _paper_rows(layout: TableLayout) -> Iterator[dict[str, Cell]]:
    """Yield the paper's rows; presets of one model, such as those of both data sets of Table 2, share one."""
    merged: dict[tuple[Cell, ...], dict[str, Cell]] = {}
    for name, facts in layout.rows.items():
        row = merged.setdefault(tuple(facts.values()), dict(facts))
        values = {_key(name, entry.metric): _number(entry.value, entry.metric) for entry in PRESETS[name].published}
        row |= {title: values[key] for title, key in layout.metrics.items() if key in values}
    yield from merged.values()


def _key(preset: str, metric: str) -> str:
    return f"{preset}/{metric}" if preset in DATA else metric


def _number(value: float | None, metric: str) -> str:
    """Format a value with the paper's decimals."""
    return DASH if value is None else f"{value:.{THREE_DECIMALS.get(metric, 2)}f}"


def _add(rows: dict[str, OwnRow], layout: TableLayout, preset: Preset, card: Json, setting: Json) -> None:
    """Add a setting's results to the row of its model."""
    about = setting["about"]
    facts, identity = _tokenizer_facts(card) if preset.model is None else _generator_facts(card, about)
    if "Steps" in layout.facts:
        facts["Steps"] = about["sampling"]["num_inference_steps"]
        identity += f"/{facts['Steps']}"
    row = rows.setdefault(identity, OwnRow({name: facts[name] for name in layout.facts}))
    row.notes |= dict.fromkeys(differences(preset, card, setting))
    titles = {key: title for title, key in layout.metrics.items()}
    for section, result in setting["metrics"].items():
        found = [each for each in (result, *result["parts"]) if _key(preset.name, each["name"]) in titles]
        for each in found:
            row.cells[titles[_key(preset.name, each["name"])]] = _number(each["value"], each["name"])
        if found and (other := metric_differences(preset, setting, result)):
            row.notes[f"{result['name']}: {'; '.join(other)}"] = None
        if not found:
            stands_for = titles.get(_key(preset.name, section))
            instead = f"{stands_for.rstrip(' ↑↓')} was not measured, but " if stands_for else ""
            row.notes[f"{instead}{result['name']} {digits(result['value'])}"] = None
    if "seconds_per_image" in titles and about.get("seconds_per_image") is not None:
        row.cells[titles["seconds_per_image"]] = _number(about["seconds_per_image"], "seconds_per_image")


def _tokenizer_facts(card: Json) -> tuple[dict[str, Cell], str]:
    name = f"ours ({str(card['tokenizer_hash'])[:8]})"
    size, config = _model(card["tokenizer"])
    return {"Tokenizer": name, "Size": size, "# Tkn": config.get("num_tokens", DASH)}, str(card["tokenizer_hash"])


def _generator_facts(card: Json, about: Json) -> tuple[dict[str, Cell], str]:
    if about.keys().isdisjoint(SampleRun.model_fields):
        raise UserError(f"{card['source']}: not samples of a generator, as the preset {card['preset']} expects")
    name = f"ours ({about['kind']} {about['model_hash'][:8]})"
    return {"Model": name, "Size": _model(about["model"])[0], "Reso.": card["size"] or DASH}, about["model_hash"]


def _model(folder: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the number of parameters of a model folder as text, and its configuration; a dash if it is not here any more."""
    try:
        config: Mapping[str, Any] = read_checkpoint_config(folder or "")["model"]
    except UserError:
        return DASH, {}
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_model(config).parameters())
    unit, name = next((each for each in ((1e9, "B"), (1e6, "M")) if count >= each[0] / 2), (1e3, "K"))
    return f"{count / unit:.{1 if name == 'B' else 0}f}{name}", config
