"""Drawings of the sets, by concept: the names of emoji are one vocabulary for all sets, whatever each calls them."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ... import storage
from ...errors import UserError
from ..formats.parts import DROPPED, KEPT
from .sets import CLIP_ART, SHORTCODES, IconSet

FLAG, LETTER, SKIN_TONE = "flag", "letter", "skin_tone"
"""Reasons to leave a drawing out: flags, letters and digits (keycaps, regional indicators, buttons), skin tones."""
TONES = frozenset(f"1f3f{digit}" for digit in "bcdef")
_TONE = re.compile(r"skin-tone|-tone\d|-(?:light|medium|dark)$|-(?:medium-light|medium-dark)$")
_FLAG = re.compile(r"^flag(-|$)|-flag$")
_LETTER = re.compile(r"^(letter|digit|keycap|regional-indicator)-|^.$")
_TITLE = re.compile(r"[a-z]+(?: [a-z]+){0,3}")
_PUBLIC_DOMAIN = re.compile(r"license\s+rdf:resource=['\"][^'\"]*public_?domain", re.IGNORECASE)


@dataclass(frozen=True)
class Drawing:
    """Drawing of a set, not rendered yet."""

    set: str
    name: str
    """Name in its set."""
    style: str
    concept: str
    """What it shows, in the words of the vocabulary."""
    svg: str
    """SVG document."""
    licence: str
    source: str
    """Package, version and name: ``PACKAGE@VERSION#NAME``."""
    keywords: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name that is unique over all sets."""
        return f"{self.set}-{self.name}"


Found = tuple[str, Drawing | None]
"""Verdict of the ledger on a drawing, and the drawing if it is kept."""


class Emoji(NamedTuple):
    """Entry of the vocabulary."""

    concept: str
    keywords: tuple[str, ...]
    left_out: str | None
    """Reason to leave out its drawings; None: they are used."""


class Vocabulary:
    """Names of emoji, from ``emojibase-data``."""

    def __init__(self, folder: Path) -> None:
        entries = storage.read_json(str(folder / "en/data.json"))
        groups = storage.read_json(str(folder / "meta/groups.json"))
        self.by_codes: dict[str, Emoji] = {}
        self.by_name: dict[str, Emoji] = {}
        codes_of = {entry["hexcode"]: _codes(entry["hexcode"]) for entry in entries}
        for entry in entries:
            self.by_codes[codes_of[entry["hexcode"]]] = emoji = _emoji(entry, groups)
            self.by_name.setdefault(_squashed(entry["label"]), emoji)
        for hexcode, codes in codes_of.items():
            if "-" not in codes:
                self._add(unicodedata.name(chr(int(codes, 16)), ""), hexcode)
        for name in SHORTCODES:
            for hexcode, given in storage.read_json(str(folder / name)).items():
                for code in [given] if isinstance(given, str) else given:
                    self._add(code, hexcode)

    def _add(self, name: str, hexcode: str) -> None:
        emoji = self.by_codes.get(_codes(hexcode))
        if emoji and (squashed := _squashed(name)):
            self.by_name.setdefault(squashed, emoji)

    def find(self, codes: list[str], names: list[str]) -> Emoji | None:
        """Return the emoji of the first known code points (hexadecimal, joined by dashes), or else name; None: neither."""
        found = [emoji for code in codes if (emoji := self.by_codes.get(_codes(code)))]
        found += [emoji for name in names if (emoji := self.by_name.get(_squashed(name)))]
        return found[0] if found else None


def read_iconify(name: str, entry: IconSet, folder: Path, vocabulary: Vocabulary) -> Iterator[Found]:
    """Yield what is found in an Iconify package: all its drawings and further names, in the order of names.

    Raises UserError if the package states another licence than the list of sets.
    """
    stated = storage.read_json(str(folder / "info.json"))["license"]["spdx"]
    if stated != entry.licence:
        raise UserError(f"{entry.label}: states the licence {stated}, expected {entry.licence}")
    data = storage.read_json(str(folder / "icons.json"))
    codes, others = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for code, icon in storage.read_json(str(folder / "chars.json")).items():
        codes[icon].append(code)
    aliases: Mapping[str, Mapping[str, Any]] = data.get("aliases", {})
    for alias, about in aliases.items():
        others[about["parent"]].append(alias)
    seen = set[tuple[str, str]]()
    for icon in sorted({*data["icons"], *aliases}):
        about = data["icons"].get(icon) or aliases[icon]
        if "body" not in about:
            if not about.keys() - {"parent"}:
                yield f"{DROPPED}:further_name", None
                continue
            parent = about["parent"]
            while parent:  # an alias may be another one's
                above = data["icons"].get(parent) or aliases[parent]
                about, parent = {**above, **about}, above.get("parent")
        names = [*([entry.names[icon]] if icon in entry.names else []), icon, *sorted(others[icon])]
        emoji = vocabulary.find(sorted(codes[icon]), names)
        if reason := _reason(icon, codes[icon], emoji, about):
            yield f"{DROPPED}:{reason}", None
            continue
        assert emoji is not None
        svg = _document(data, about)
        if (emoji.concept, svg) in seen:
            yield f"{DROPPED}:same_drawing", None
            continue
        seen.add((emoji.concept, svg))
        yield KEPT, _drawing(name, entry, icon, emoji.concept, svg, emoji.keywords)


def read_clip_art(name: str, entry: IconSet, folder: Path) -> Iterator[Found]:
    """Yield what is found in Debian's package of Open Clip Art: drawings whose titles are a few plain words."""
    for path in sorted((folder / CLIP_ART).rglob("*.svg")):
        icon = path.relative_to(folder / CLIP_ART).with_suffix("").as_posix()
        svg = path.read_bytes().decode("utf-8", "replace")
        found = re.search(r"<dc:title>([^<]*)</dc:title>", svg)
        title = " ".join(html.unescape(found[1]).lower().replace("_", " ").split()) if found else ""
        keywords = tuple(dict.fromkeys(k.strip() for k in re.findall(r"<rdf:li>([^<]*)</rdf:li>", svg) if k.strip()))
        if "flags" in icon.split("/"):
            yield f"{DROPPED}:{FLAG}", None
        elif not _PUBLIC_DOMAIN.search(svg):
            yield f"{DROPPED}:licence", None
        elif not _TITLE.fullmatch(title):
            yield f"{DROPPED}:no_title", None
        else:
            yield KEPT, _drawing(name, entry, icon, title, svg, keywords)


def _drawing(name: str, entry: IconSet, icon: str, concept: str, svg: str, keywords: tuple[str, ...]) -> Drawing:
    source = f"{entry.label}#{icon}"
    return Drawing(
        set=name,
        name=icon,
        style=entry.style,
        concept=concept,
        svg=svg,
        licence=entry.licence,
        source=source,
        keywords=keywords,
    )


def _reason(icon: str, codes: list[str], emoji: Emoji | None, about: Mapping[str, Any]) -> str | None:
    """Return the reason to leave an icon out; None: it is used."""
    if about.get("hidden"):
        return "hidden"
    if about.get("rotate"):
        return "rotated"
    if _TONE.search(icon) or any(TONES.intersection(code.split("-")) for code in codes):
        return SKIN_TONE
    if _FLAG.search(icon):
        return FLAG
    if _LETTER.search(icon):
        return LETTER
    return emoji.left_out if emoji else "not_in_vocabulary"


def _document(data: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Return the SVG document of an icon."""
    left, top, width, height = (
        about.get(key, data.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = about["body"]
    if about.get("hFlip") or about.get("vFlip"):
        across, down = (-1 if about.get("hFlip") else 1), (-1 if about.get("vFlip") else 1)
        moved = f"{2 * left + width if across < 0 else 0} {2 * top + height if down < 0 else 0}"
        body = f'<g transform="translate({moved}) scale({across} {down})">{body}</g>'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{body}</svg>'


def _emoji(entry: Mapping[str, Any], groups: Mapping[str, Any]) -> Emoji:
    group = groups["groups"].get(str(entry.get("group")), "component")
    subgroup = groups["subgroups"].get(str(entry.get("subgroup")))
    left_out = FLAG if group == "flags" else None
    if group == "component" or subgroup in ("keycap", "alphanum"):
        left_out = LETTER
    return Emoji(concept_of(entry["label"]), tuple(entry.get("tags", ())), left_out)


def concept_of(label: str) -> str:
    """Return the concept of an emoji's label: "man: red hair" is "man with red hair"."""
    text = label.replace("’", "'").replace("“", "").replace("”", "")
    subject, colon, rest = text.partition(": ")
    if not colon or rest.startswith("facing "):
        return f"{subject} {rest}".strip()
    if subject in ("family", "kiss"):
        *first, last = rest.split(", ")
        return f"{subject} of {', '.join(first)} and {last}" if first else f"{subject} of {last}"
    *first, last = rest.split(", ")
    joined = f"{', '.join(first)} and {last}" if first else last
    return f"{subject} with {joined}"


def _codes(code: str) -> str:
    """Return code points in lower case, without variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _squashed(name: str) -> str:
    """Return only the letters and digits of a name, in lower case and without accents."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub(r"[^a-z0-9]", "", plain)
