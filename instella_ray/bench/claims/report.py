"""Page of the verdicts: a table, what does not hold, and a figure with a panel for each metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import escape

from ... import storage
from ...data.scenes import CATEGORIES
from ...rendering import Cell, digits, table
from .settings import METRICS, ClaimsBench
from .verdicts import CONFIDENCE, FAILS, HOLDS, UNDECIDED, UNMEASURED, ClaimVerdict, mean

WIDTH, LEFT, RIGHT, ROW, HEAD = 860, 330, 30, 22, 34
"""Lengths in pixels: the figure, its labels, the space beside the axis, a row, and the title of a panel."""
COLORS = {HOLDS: "#1a7f4b", FAILS: "#b3261e", UNDECIDED: "#6b6b6b"}
COUNTED = {HOLDS: "hold", FAILS: "fail", UNDECIDED: "are undecided", UNMEASURED: "are not measured"}
STYLE = "font: 13px system-ui, sans-serif"
PAGE = """# The paper's claims at small size

Made by `instella-ray bench --config claims --set claims.page=docs/claims.md`. A claim is a sentence of the paper. Its arms
differ in what the sentence is about, and in nothing else; they are trained with the same seeds. Differences are positive
where the arm that the paper proposes is better. In brackets is Student's {confidence:.0%} interval of the mean difference,
paired by seed. A claim **holds** if all of its interval is above zero, **fails** if all of it is below, and is **undecided**
otherwise; for claims that nothing is lost, minus a margin takes the place of zero. One of twenty intervals misses its value
by chance.

Of {claims} claims {counts}. This is what images, models and runs of this size show; the paper's are larger.

{settings}

![Differences in favour of each claim, with their intervals]({figure})

{table}

## What does not hold at this scale

{fails}

Not decided by these seeds: {undecided}.

## Sentences

{sentences}
"""


def verdict_rows(verdicts: Sequence[ClaimVerdict]) -> list[dict[str, Cell]]:
    """Return a row a claim for the table in the terminal."""
    return [
        {
            "claim": each.claim.name,
            "metric": METRICS[each.claim.metric].name,
            **{side: digits(value) for side, (_, value) in zip(("proposed", "baseline"), each.arms, strict=True)},
            "in favour": _in_favour(each),
            "verdict": each.verdict,
        }
        for each in verdicts
    ]


def write_page(page: str, cfg: ClaimsBench, verdicts: Sequence[ClaimVerdict]) -> None:
    """Write the Markdown file ``page``, and its figure beside it under the same name with the ending ``svg``."""
    figure = f"{page.removesuffix('.md')}.svg"
    storage.write_text(figure, forest(verdicts))
    storage.write_text(page, page_text(cfg, verdicts, figure.rpartition("/")[2]))


def page_text(cfg: ClaimsBench, verdicts: Sequence[ClaimVerdict], figure: str) -> str:
    """Return the page in Markdown; ``figure`` is the name of its image."""
    counts = Counter(each.verdict for each in verdicts)
    return PAGE.format(
        confidence=CONFIDENCE,
        claims=len(verdicts),
        counts=", ".join(f"{counts[name]} {text}" for name, text in COUNTED.items() if counts[name]),
        settings="\n".join(_settings(cfg, verdicts)),
        figure=figure,
        table=table([_row(each) for each in verdicts]),
        fails="\n".join(_outcome(each) for each in verdicts if each.verdict == FAILS) or "Nothing that was decided.",
        undecided="; ".join(each.claim.name for each in verdicts if each.verdict == UNDECIDED) or "nothing",
        sentences="\n".join(map(_sentence, verdicts)),
    )


def _settings(cfg: ClaimsBench, verdicts: Sequence[ClaimVerdict]) -> Iterator[str]:
    """Yield lines on data, models and metrics."""
    images = len(CATEGORIES) * cfg.prompts_per_category * cfg.images_per_prompt
    yield f"- **Data**: {cfg.scenes:,} scenes, {cfg.held_out} held out; seeds {', '.join(map(str, cfg.seeds))}."
    yield f"- **Samples**: {images} images of a generator, {cfg.images_per_prompt} of each prompt."
    yield f"- **Models**: the demo's, with {', '.join(f'`{item}`' for item in cfg.overrides)}."
    for name in dict.fromkeys(each.claim.metric for each in verdicts):
        yield f"- **{METRICS[name].name}**: {METRICS[name].about}."


def _outcome(each: ClaimVerdict) -> str:
    """Return a line on a claim that does not hold."""
    metric = METRICS[each.claim.metric]
    (proposed, ours), (baseline, theirs) = each.arms
    values = f"{digits(ours, metric.unit)} ({proposed}) against {digits(theirs, metric.unit)} ({baseline})"
    return f"- {each.claim.name}: {metric.name} {values}, in favour {_in_favour(each)}"


def _row(each: ClaimVerdict) -> dict[str, Cell]:
    claim, metric = each.claim, METRICS[each.claim.metric]
    (proposed, ours), (baseline, theirs) = each.arms
    return {
        "claim": claim.name,
        "section": claim.section,
        "metric": f"{metric.name} at {claim.size} px" if claim.size else metric.name,
        "proposed": f"{proposed}: {digits(ours, metric.unit)}",
        "baseline": f"{baseline}: {digits(theirs, metric.unit)}",
        "in favour": _in_favour(each),
        "seeds": len(each.proposed),
        "verdict": f"**{each.verdict}**",
    }


def _sentence(each: ClaimVerdict) -> str:
    claim = each.claim
    return f'- {claim.name} ({claim.section}): "{claim.sentence}"' + (f" {claim.note}" if claim.note else "")


def _in_favour(each: ClaimVerdict) -> str:
    low, high = each.interval
    margin = f", margin {digits(each.claim.margin)}" if each.claim.margin else ""
    return f"{_signed(mean(each.differences))} [{_signed(low)}, {_signed(high)}]{margin}"


def _signed(value: float) -> str:
    return f"+{digits(value)}" if value > 0 else digits(value)


def forest(verdicts: Sequence[ClaimVerdict]) -> str:
    """Return an SVG file: for each claim the mean difference, its interval, and small dots for the seeds."""
    panels: dict[str, list[ClaimVerdict]] = {}
    for each in verdicts:
        if each.verdict != UNMEASURED:
            panels.setdefault(each.claim.metric, []).append(each)
    parts: list[str] = []
    top = 0
    for rows in panels.values():
        parts += _panel(rows, top)
        top += HEAD + ROW * len(rows) + ROW
    legend = "".join(f'<tspan fill="{color}" dx="14">● {name}</tspan>' for name, color in COLORS.items())
    note = (
        f'<tspan fill="#555555" dx="14">lines: {CONFIDENCE:.0%} intervals; small dots: seeds; dashes: margins</tspan>'
    )
    parts.append(f'<text x="8" y="{top + 16}">{legend}{note}</text>')
    size = f'viewBox="0 0 {WIDTH} {top + 30}" width="{WIDTH}" height="{top + 30}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" style="{STYLE}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _panel(rows: Sequence[ClaimVerdict], top: int) -> Iterator[str]:
    """Draw the claims of one metric below ``top``, on an axis of their own."""
    metric = METRICS[rows[0].claim.metric]
    ends = [0.0, *(-each.claim.margin for each in rows), *(value for each in rows for value in each.differences)]
    ends += [end for each in rows for end in each.interval if np.isfinite(end)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / span

    bottom = top + HEAD + ROW * len(rows)
    unit = f" ({metric.unit})" if metric.unit else ""
    yield f'<text x="8" y="{top + 22}" font-weight="600">{metric.name}{unit}, difference in favour of the claim</text>'
    for value in dict.fromkeys((low, 0.0, high)):
        x = at(value)
        dashed = "" if value == 0 else ' stroke-dasharray="2 4"'
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEAD - 6}" y2="{bottom}" stroke="#999999"{dashed}/>'
        if value == 0 or abs(x - at(0.0)) > 40:
            yield f'<text x="{x:.1f}" y="{bottom + 14}" fill="#555555" text-anchor="middle">{digits(value)}</text>'
    for number, each in enumerate(rows):
        y, color = top + HEAD + ROW * number + ROW // 2, COLORS[each.verdict]
        start, end = each.interval
        yield f'<text x="8" y="{y + 4}">{escape(each.claim.name)}</text>'
        if each.claim.margin:
            x = at(-each.claim.margin)
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{y + 9}" stroke="#222222" stroke-dasharray="3 2"/>'
        if np.isfinite(start):
            yield f'<line x1="{at(start):.1f}" x2="{at(end):.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
        for value in each.differences:
            yield f'<circle cx="{at(value):.1f}" cy="{y - 6}" r="2" fill="{color}" fill-opacity="0.6"/>'
        yield f'<circle cx="{at(mean(each.differences)):.1f}" cy="{y}" r="4.5" fill="{color}"/>'
