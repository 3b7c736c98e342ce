"""Renders drawings, SVG from strangers, as square images; and what a drawing may contain.

By resvg (the package ``resvg-py``): its wheels have no dependencies, where CairoSVG needs the system's Cairo and lacks
filters. resvg anti-aliases by how much of a pixel a shape covers. It reads the files that an ``<image>`` names, and nothing
stops what merely takes long, so a drawing is parsed and may be refused here first, and what was parsed is what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageChops

from ...packages import extra_import
from ..formats.images import open_image

Box = tuple[float, float, float, float]
"""Left, top, width and height in units of the drawing."""

SVG = "http://www.w3.org/2000/svg"
MAX_BYTES, MAX_ELEMENTS, MAX_ASPECT = 1 << 20, 20_000, 50.0
"""Limits of a drawing: bytes; elements, counted again for each reference to them; longer over shorter side."""
REFUSED = frozenset({"image", "feImage", "script", "foreignObject", "feTurbulence", "text", "animate", "set", "marker"})
"""Elements that read files, run for any time (markers are drawn at each point of a path), or need fonts."""
FILL = 0.9
"""Share of the image's side that the longer side of a drawing fills."""
SOUGHT = 64
"""Side of the image in which the edges of a drawing are looked for (px)."""
FAINT = 8
"""Opacity (of 255) up to which a pixel is not part of a drawing."""

_URL = re.compile(r"url\(\s*['\"]?(#?)([^)'\"]*)")
_NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\d.])")


class RefusedDrawingError(Exception):
    """Drawing that is not rendered; the message is a reason of the ledger."""


def parse_drawing(svg: str) -> tuple[ElementTree.Element, Box]:
    """Parse an SVG document, check it, and return it with its view box.

    Elements of other namespaces, such as editors' metadata, are removed. Raises RefusedDrawingError for a drawing that is
    not SVG, has no size, refers to anything outside itself, or exceeds the limits.
    """
    if len(svg.encode()) > MAX_BYTES:
        raise RefusedDrawingError("too_large")
    if "<!ENTITY" in svg:
        raise RefusedDrawingError("entities")
    try:
        root = ElementTree.fromstring(svg)
    except (ElementTree.ParseError, ValueError):
        raise RefusedDrawingError("not_svg") from None
    if root.tag != f"{{{SVG}}}svg":
        raise RefusedDrawingError("not_svg")
    try:
        _clean(root)
        _Weights(root).check()
    except RecursionError:
        raise RefusedDrawingError("nested_too_deep") from None
    return root, _view_box(root)


def render(svg: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render a drawing centred on white: its colours, uint8 ``[size, size, 3]``, and opacity, uint8 ``[size, size]``.

    The longer side of what is visible fills :data:`FILL` of the image. Raises RefusedDrawingError as
    :func:`parse_drawing`, and for drawings that show nothing or only white.
    """
    root, box = parse_drawing(svg)
    try:
        return _centred(root, box, size)
    except RecursionError:  # writing the document recurses as parsing does
        raise RefusedDrawingError("nested_too_deep") from None


def _centred(root: ElementTree.Element, box: Box, size: int) -> tuple[np.ndarray, np.ndarray]:
    side = max(box[2:])
    frame = (box[0] + box[2] / 2 - side / 2, box[1] + box[3] / 2 - side / 2, side, side)
    found = _draw(root, box, frame, SOUGHT).getchannel("A").point(lambda opacity: 255 * (opacity > FAINT)).getbbox()
    if found is None:
        raise RefusedDrawingError("blank")
    left, top, right, bottom = (frame[i % 2] + edge * side / SOUGHT for i, edge in enumerate(found))
    side = max(right - left, bottom - top) / FILL
    frame = ((left + right - side) / 2, (top + bottom - side) / 2, side, side)
    drawn = _draw(root, box, frame, size)
    image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    if ImageChops.invert(image).getbbox() is None:
        raise RefusedDrawingError("blank")
    return np.asarray(image), np.asarray(drawn.getchannel("A"))


def _draw(root: ElementTree.Element, box: Box, frame: Box, pixels: int) -> Image.Image:
    """Render the part ``frame`` of a drawing, cut at its view box, as RGBA of ``pixels`` squared."""
    resvg = extra_import("resvg_py", "icons", "icons")
    places = dict(zip(("x", "y", "width", "height"), map(repr, box), strict=True))
    root.attrib.update(places, viewBox=_text(box), overflow="hidden")
    outer = ElementTree.Element(f"{{{SVG}}}svg", {"viewBox": _text(frame), "width": "1", "height": "1"})
    outer.append(root)
    markup = ElementTree.tostring(outer, encoding="unicode")
    try:
        data = resvg.svg_to_bytes(svg_string=markup, width=pixels, height=pixels, skip_system_fonts=True)
    except ValueError:
        raise RefusedDrawingError("not_rendered") from None
    return open_image(data).convert("RGBA")


def _text(box: Box) -> str:
    return " ".join(map(repr, box))


def _clean(element: ElementTree.Element) -> None:
    """Remove elements of other namespaces than SVG, and raise RefusedDrawingError for what is refused."""
    for child in list(element):
        tag = child.tag if isinstance(child.tag, str) else ""
        if not tag.startswith(f"{{{SVG}}}") or _local(tag) == "metadata":
            element.remove(child)
            continue
        if _local(tag) in REFUSED:
            raise RefusedDrawingError(f"element_{_local(tag)}")
        _clean(child)
    styles = element.text or "" if _local(element.tag) == "style" else ""
    if "@" in styles or _URL.search(styles):
        raise RefusedDrawingError("style_sheet")
    for name, value in element.attrib.items():
        outside = [target for hash_, target in _URL.findall(value) if not hash_]
        if outside or (_local(name) == "href" and not value.startswith("#")):
            raise RefusedDrawingError("outside_reference")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


class _Weights:
    """Numbers of elements that a drawing has when each reference is replaced by what it refers to.

    A paint, clip or mask counts for each element inside of the one that names it, as paints are inherited.
    """

    def __init__(self, root: ElementTree.Element) -> None:
        self.root = root
        named = [(identity, each) for each in root.iter() if (identity := each.get("id"))]
        self.by_id = dict(named)
        self.doubled = len(self.by_id) < len(named)
        self.known: dict[int, int | None] = {}

    def check(self) -> None:
        """Raise RefusedDrawingError for more than :data:`MAX_ELEMENTS`, an element in itself, and ids that repeat."""
        if self.doubled:
            raise RefusedDrawingError("repeated_id")
        if self._of(self.root) > MAX_ELEMENTS:
            raise RefusedDrawingError("too_many_elements")

    def _of(self, element: ElementTree.Element) -> int:
        if id(element) in self.known:
            if (known := self.known[id(element)]) is None:
                raise RefusedDrawingError("circular")
            return known
        self.known[id(element)] = None
        paints = [target for value in element.attrib.values() for _, target in _URL.findall(value)]
        copies = [value[1:] for name, value in element.attrib.items() if _local(name) == "href"]
        inside = 1 + sum(map(self._of, [*element, *self._named(copies)]))
        self.known[id(element)] = total = inside * (1 + sum(map(self._of, self._named(paints))))
        return total

    def _named(self, targets: Iterable[str]) -> list[ElementTree.Element]:
        return [self.by_id[target.strip()] for target in targets if target.strip() in self.by_id]


def _view_box(root: ElementTree.Element) -> Box:
    """Return the view box of a document, or that of its width and height."""
    given: list[Any] = [_NUMBER.match(part) for part in re.split(r"[\s,]+", root.get("viewBox", "").strip())]
    if len(given) != 4 or not all(given):
        given = [_NUMBER.match(text) for text in ("0", "0", root.get("width", ""), root.get("height", ""))]
    if not all(given):
        raise RefusedDrawingError("no_size")
    left, top, width, height = (float(number[1]) for number in given)
    if min(width, height) <= 0 or max(width, height) > MAX_ASPECT * min(width, height):
        raise RefusedDrawingError("no_size")
    return left, top, width, height
