"""Rendering of drawings, which are input from strangers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instella_ray.data.icons.render import FILL, RefusedDrawingError, render

pytest.importorskip("resvg_py", reason="the extra 'icons' is not installed")
SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg(body: str, box: str = "0 0 10 10") -> str:
    return f'<svg {SPACES} viewBox="{box}">{body}</svg>'


def test_a_drawing_fills_the_frame_is_centred_and_on_white() -> None:
    pixels, opacity = render(svg('<rect x="1" y="2" width="4" height="2" fill="red"/>'), 100)
    rows, columns = (np.flatnonzero((opacity > 128).any(axis)) for axis in (1, 0))
    assert abs(len(columns) - 100 * FILL) <= 3 and abs(len(rows) - 50 * FILL) <= 3
    assert abs(rows.mean() - 49.5) <= 2 and abs(columns.mean() - 49.5) <= 2
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[50, 50].tolist() == [255, 0, 0]


def test_edges_are_anti_aliased() -> None:
    _, opacity = render(svg('<circle cx="5" cy="5" r="4"/>'), 64)
    between = ((opacity > 0) & (opacity < 255)).sum()
    assert between > 64


def test_what_lies_outside_the_view_box_stays_hidden() -> None:
    pixels, _ = render(
        svg('<rect width="10" height="10" fill="red"/><rect x="12" width="9" height="9" fill="blue"/>'), 32
    )
    assert not (pixels == [0, 0, 255]).all(-1).any()


@pytest.mark.parametrize("href", ["href", "xlink:href"])
def test_no_file_is_read(href: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4), "red").save(secret)
    with pytest.raises(RefusedDrawingError, match="element_image"):
        render(svg(f'<image {href}="{secret}" width="10" height="10"/>'), 32)
    with pytest.raises(RefusedDrawingError, match="outside_reference"):
        render(svg(f'<use {href}="{secret}#a"/><rect width="4" height="4"/>'), 32)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (svg('<rect width="5" height="5" fill="url(http://127.0.0.1/a.svg#b)"/>'), "outside_reference"),
        (svg('<rect width="5" height="5" style="fill:url(file.svg#b)"/>'), "outside_reference"),
        (svg("<style>@import 'a.css';</style>"), "style_sheet"),
        (svg("<script>1</script>"), "element_script"),
        (svg('<filter id="f"><feImage href="#a"/></filter>'), "element_feImage"),
        (svg("<text>a</text>"), "element_text"),
        (f'<!DOCTYPE svg [<!ENTITY a "b">]>{svg("&a;")}', "entities"),
        (svg('<g id="a"><use href="#a"/></g>'), "circular"),
        (svg("<g>" * 2000 + "</g>" * 2000), "nested_too_deep"),
        (svg('<rect width="1" height="1"/>' * 40_000), "too_large"),
        (svg("<a/>" * 30_000), "too_many_elements"),
        (svg("<rect"), "not_svg"),
        ("<html/>", "not_svg"),
        (svg("<rect/>", "0 0 0 0"), "no_size"),
        (svg("<rect/>", "0 0 1 1e9"), "no_size"),
        (svg("<rect/>", "0 0 1.2.3 4"), "no_size"),
        (svg('<marker id="m"><rect width="1" height="1"/></marker><path marker-mid="url(#m)"/>'), "element_marker"),
        (svg('<g id="a"/><rect id="a" width="1" height="1"/>'), "repeated_id"),
        (svg('<pattern id="p"><rect fill="url( #p )"/></pattern>'), "circular"),
        (svg(""), "blank"),
        (svg('<rect width="5" height="5" fill="white"/>'), "blank"),
    ],
)
def test_hostile_and_empty_drawings_are_refused(text: str, reason: str) -> None:
    with pytest.raises(RefusedDrawingError, match=f"^{reason}$"):
        render(text, 16)


def test_references_that_multiply_are_counted_as_what_they_draw() -> None:
    levels = "".join(f'<g id="l{n}">' + f'<use href="#l{n - 1}"/>' * 10 + "</g>" for n in range(1, 12))
    with pytest.raises(RefusedDrawingError, match="too_many_elements"):
        render(svg(f'<g id="l0"><rect width="1" height="1"/></g>{levels}'), 16)


def test_a_paint_counts_for_each_element_that_inherits_it() -> None:
    def pattern(number: int) -> str:
        paint = f' fill="url(#p{number - 1} )"' if number else ""
        return f'<pattern id="p{number}" width="1" height="1"><g{paint}>' + "<path/>" * 10 + "</g></pattern>"

    with pytest.raises(RefusedDrawingError, match="too_many_elements"):
        render(svg("".join(map(pattern, range(12))) + '<rect width="9" height="9" fill="url(#p11)"/>'), 16)


def test_metadata_of_editors_is_ignored() -> None:
    extra = '<metadata><x href="http://a.b"/></metadata><e:view xmlns:e="urn:e" href="http://a.b"/>'
    pixels, _ = render(svg(f'{extra}<rect width="5" height="5" fill="blue"/>'), 16)
    assert pixels[8, 8].tolist() == [0, 0, 255]
