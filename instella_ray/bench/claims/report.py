"""Page of the verdicts: a table, what does not hold, and a figure with a panel for each metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import escape

from ... import storage
from ...rendering import Cell, digits, table
from .settings import METRICS, Claim, ClaimsBench
from .verdicts import CONFIDENCE, FAILS, HOLDS, UNDECIDED, ClaimVerdict

WIDTH, LEFT, RIGHT, ROW, HEAD = 860, 330, 30, 22, 34
"""Lengths in pixels: the figure, its labels, the space beside the axis, a row, and the title of a panel."""
COLORS = {HOLDS: "#1a7f4b", FAILS: "#b3261e", UNDECIDED: "#6b6b6b"}
STYLE = "font: 13px system-ui, sans-serif"


def verdict_rows(verdicts: Sequence[ClaimVerdict]) -> list[dict[str, Cell]]:
    """Return a row a claim for the table in the terminal."""
    return [
        {
            "claim": each.claim.name,
            "metric": METRICS[each.claim.metric].name,
            "proposed": digits(float(np.mean(each.proposed))),
            "baseline": digits(float(np.mean(each.baseline))),
            "in favour": _with_interval(each),
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
    counts = {name: sum(each.verdict == name for each in verdicts) for name in (HOLDS, FAILS, UNDECIDED)}
    metrics = dict.fromkeys(each.claim.metric for each in verdicts)
    parts = [
        "# The paper's claims at small size",
        f"Made by `instella-ray bench --config bench/claims --set claims.page=docs/claims.md`: {_settings(cfg)}. "
        "A claim is a sentence of the paper; two arms differ in what it is about, and in nothing else. Both are trained "
        "with the same seeds, and the difference is positive where the arm that the paper proposes is better. "
        f"In brackets Student's {CONFIDENCE:.0%} interval of the mean difference over the seeds, paired by seed: the claim "
        "**holds** if all of it is above zero, **fails** if all of it is below, and is **undecided** otherwise. For claims "
        "that nothing is lost, a margin takes the place of zero. One of twenty intervals misses its value by chance.",
        f"Of {len(verdicts)} claims {counts[HOLDS]} hold, {counts[FAILS]} fail and {counts[UNDECIDED]} are undecided. "
        "That is what images of this size, models of this size and minutes of training show. It says nothing about the "
        "paper's size.",
        "\n".join(f"- **{METRICS[name].name}**: {METRICS[name].about}" for name in metrics),
        f"![Differences in favour of each claim, with their intervals]({figure})",
        table([_page_row(each) for each in verdicts]),
        *_outcomes(verdicts),
        "## Sentences",
        "\n".join(_sentence(each.claim) for each in verdicts),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(cfg: ClaimsBench) -> str:
    prompts = 6 * cfg.prompts_per_category
    return (
        f"{cfg.scenes:,} [scenes](benchmarks.md#demo) to train on, {cfg.held_out} held out, {prompts} prompts with "
        f"{cfg.images_per_prompt} images each, seeds {', '.join(map(str, cfg.seeds))}, the demo's models with "
        + ", ".join(f"`{item}`" for item in cfg.overrides)
    )


def _outcomes(verdicts: Sequence[ClaimVerdict]) -> list[str]:
    """Return a section on each verdict that is not good news."""
    titles = {FAILS: "## What does not hold at this scale", UNDECIDED: "## What these seeds do not decide"}
    parts = []
    for verdict, title in titles.items():
        lines = [f"- {each.claim.name}: {_outcome(each)}" for each in verdicts if each.verdict == verdict]
        parts += [title, "\n".join(lines)] if lines else []
    return parts


def _outcome(each: ClaimVerdict) -> str:
    metric = METRICS[each.claim.metric]
    means = (digits(float(np.mean(values)), metric.unit) for values in (each.proposed, each.baseline))
    names = (each.claim.proposed.name, each.claim.baseline.name)
    arms = ", ".join(f"{name} {mean}" for name, mean in zip(names, means, strict=True))
    return f"{metric.name} of {arms}; difference {_with_interval(each)}."


def _page_row(each: ClaimVerdict) -> dict[str, Cell]:
    claim, metric = each.claim, METRICS[each.claim.metric]
    cells = {
        name: f"{arm.name}: {digits(float(np.mean(values)), metric.unit)}"
        for name, arm, values in (
            ("proposed", claim.proposed, each.proposed),
            ("baseline", claim.baseline, each.baseline),
        )
    }
    at = f" at {claim.size} px" if claim.size else ""
    return {
        "claim": claim.name,
        "section": claim.section,
        "metric": metric.name + at,
        **cells,
        "in favour of the claim": _with_interval(each) + (f", margin {digits(claim.margin)}" if claim.margin else ""),
        "verdict": f"**{each.verdict}**",
    }


def _sentence(claim: Claim) -> str:
    note = f" {claim.note}" if claim.note else ""
    return f'- {claim.name} (section {claim.section}): "{claim.sentence}"{note}'


def _with_interval(each: ClaimVerdict) -> str:
    low, high = each.interval
    return f"{_signed(float(each.differences.mean()))} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"+{digits(value)}" if value > 0 else digits(value)


def forest(verdicts: Sequence[ClaimVerdict]) -> str:
    """Return an SVG file: for each claim the mean difference, its interval, and small dots for the seeds."""
    panels: dict[str, list[ClaimVerdict]] = {}
    for each in verdicts:
        panels.setdefault(each.claim.metric, []).append(each)
    parts: list[str] = []
    top = 0
    for rows in panels.values():
        parts += _panel(rows, top)
        top += HEAD + ROW * len(rows) + ROW
    legend = "".join(f'<tspan fill="{color}" dx="14">● {name}</tspan>' for name, color in COLORS.items())
    parts.append(f'<text x="{LEFT - 14}" y="{top + 12}">{legend}</text>')
    size = f'viewBox="0 0 {WIDTH} {top + 24}" width="{WIDTH}" height="{top + 24}"'
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
            yield f'<circle cx="{at(value):.1f}" cy="{y}" r="2.5" fill="{color}" fill-opacity="0.45"/>'
        yield f'<circle cx="{at(float(each.differences.mean())):.1f}" cy="{y}" r="4.5" fill="{color}"/>'
