"""Captions of drawings: a noun phrase and the style; in the long form also shape and colours, measured on the pixels."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "dark red": (130, 20, 30),
    "orange": (245, 135, 35),
    "yellow": (255, 210, 60),
    "green": (70, 165, 75),
    "dark green": (25, 85, 50),
    "light green": (160, 215, 110),
    "teal": (25, 140, 140),
    "light blue": (135, 200, 245),
    "blue": (50, 110, 215),
    "dark blue": (30, 45, 110),
    "purple": (135, 75, 185),
    "pink": (245, 145, 180),
    "brown": (130, 80, 50),
    "beige": (235, 205, 165),
    "black": (25, 25, 28),
    "dark grey": (85, 90, 95),
    "grey": (150, 158, 165),
    "light grey": (205, 212, 218),
    "white": (253, 253, 253),
}
"""Named colours in sRGB. A pixel has the name of the nearest in CIELAB."""
STEP = 8
"""Red, green and blue are told apart in steps of this size."""
LEAST_SHARE, MOST_COLORS = 0.08, 3
"""Share of a drawing's area from which a colour is named, and the most colours named."""
OPAQUE = 200
"""Opacity (of 255) from which a pixel counts; the anti-aliased edge has colours of no part."""
ASIDE = 0.3
"""Distance of a colour's centre from the drawing's from which its position is named (half its side = 1)."""
LONG = 1.8
"""Aspect ratio from which a drawing is wide or tall."""

PREPOSITIONS = re.compile("with|without|of|in|on|at|and|behind|over|under|for|to|from|by|not|showing|.+ing")
"""Words that end the part of a phrase whose last word is counted: prepositions, and participles."""
MASS = re.compile(
    "people|men|women|arts|bacon|badminton|bowling|bread|butter|chess|confetti|construction|control|curry|customs|dna|"
    "evidence|fire|fog|garlic|hockey|ice|infinity|knitting|lacrosse|lightning|luggage|mail|money|pong|popcorn|rain|rice|"
    "salt|sake|smoking|snow|spaghetti|sushi|tennis|thread|water|yarn"
)
"""Last words of a noun phrase that take no article."""
WITHOUT_ARTICLE = re.compile("thumbs|palms|people|women|men|kissing|mount|santa|mrs.|mx")
"""First words of a noun phrase that take none."""
ZODIAC = re.compile(
    "Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus"
)
SINGULAR = re.compile(r"(ss|us|is|rhinoceros|canvas|gas|series|means)$")
"""Ends of words that are no plurals though they end with s."""
LIKE_YOU = re.compile(r"(uni[^n]|eu|ewe|ufo|us[eu]|ut[ei]|one\b|one-)", re.IGNORECASE)
"""Starts of words with a vowel letter that are spoken with a consonant."""
LETTERS = re.compile(r"[FHLMNRSX](-|\b|[A-Z])")
"""Abbreviations whose first letter is spoken with a vowel."""
PHRASES = {
    "biohazard": "a biohazard sign",
    "copyright": "a copyright sign",
    "dizzy": "circling stars",
    "divide": "a division sign",
    "dashing away": "a puff of air",
    "high voltage": "a high voltage sign",
    "locked": "a locked padlock",
    "minus": "a minus sign",
    "multiply": "a multiplication sign",
    "plus": "a plus sign",
    "prohibited": "a prohibition sign",
    "radioactive": "a radioactivity sign",
    "registered": "a registered trade mark sign",
    "Statue of Liberty": "the Statue of Liberty",
    "unlocked": "an unlocked padlock",
}
"""Noun phrases of concepts whose names are none."""


def noun_phrase(concept: str) -> str:
    """Return a concept as a noun phrase: "a tomato", "an apple", "grapes", "a clock at one-thirty"."""
    if concept in PHRASES:
        return PHRASES[concept]
    if ZODIAC.fullmatch(concept):
        return f"the sign {concept}"
    if concept.endswith(("o'clock", "-thirty")):
        return f"a clock at {concept}"
    words = concept.split()
    if words[0] in ("no", "non-potable"):
        return f"a {concept} sign"
    end = next((i for i, word in enumerate(words) if i and PREPOSITIONS.fullmatch(word)), len(words))
    head = words[end - 1].strip(",").lower()
    plural = head.endswith("s") and not SINGULAR.search(head)
    if plural or MASS.fullmatch(head) or WITHOUT_ARTICLE.fullmatch(words[0].lower()):
        return concept
    vowel = words[0].startswith("hour") or (words[0][0].lower() in "aeiou" and not LIKE_YOU.match(concept))
    return f"{'an' if vowel or LETTERS.match(words[0]) else 'a'} {concept}"


def short_caption(concept: str, style: str) -> str:
    """Return the short caption: "a tomato, flat style"."""
    return f"{noun_phrase(concept)}, {style} style"


def long_caption(concept: str, style: str, pixels: np.ndarray, opacity: np.ndarray) -> str:
    """Return the long caption: "a tomato, flat style, red, with green at the top".

    Shape and colours are measured on ``pixels``, uint8 ``[S, S, 3]``, where ``opacity``, uint8 ``[S, S]``, says that the
    drawing is; what cannot be measured is not named.
    """
    return ", ".join([short_caption(concept, style), *_shape(opacity), *_colors(pixels, opacity)])


def _shape(opacity: np.ndarray) -> list[str]:
    height, width = _extent(opacity > OPAQUE // 2)
    if not height or not width:
        return []
    return ["wide"] if width >= LONG * height else ["tall"] if height >= LONG * width else []


def _extent(mask: np.ndarray) -> tuple[int, int]:
    """Return the height and width of what ``mask`` marks (px)."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return (int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1) if len(rows) else (0, 0)


def _colors(pixels: np.ndarray, opacity: np.ndarray) -> list[str]:
    """Describe the colours of the largest areas, the second and third with their positions."""
    mask = opacity >= OPAQUE
    if not mask.any():
        return []
    nearest = np.full(mask.shape, -1)
    nearest[mask] = _nearest()[tuple(pixels[mask].T // STEP)]
    counts = np.bincount(nearest[mask], minlength=len(COLORS))
    order = np.argsort(-counts, kind="stable")[:MOST_COLORS]
    named = [int(color) for color in order if counts[color] >= LEAST_SHARE * mask.sum()]
    if not named:
        return []
    first, *others = [
        list(COLORS)[color] + _position(nearest == color, mask, main=not i) for i, color in enumerate(named)
    ]
    return [first, *([f"with {' and '.join(others)}"] if others else [])]


def _position(part: np.ndarray, whole: np.ndarray, *, main: bool) -> str:
    """Return the position of ``part`` within ``whole``, " at the top"; none for the ``main`` colour and near the middle."""
    (y, x), (top, left) = (np.mean(np.nonzero(mask), axis=1) for mask in (part, whole))
    down, right = 2 * (y - top) / len(whole), 2 * (x - left) / len(whole)
    if main or max(abs(down), abs(right)) < ASIDE:
        return ""
    if abs(down) >= abs(right):
        return " at the bottom" if down > 0 else " at the top"
    return " on the right" if right > 0 else " on the left"


@cache
def _nearest() -> np.ndarray:
    """Return the index of the nearest named colour of every colour in steps of :data:`STEP`, ``[32, 32, 32]``."""
    rgb = np.moveaxis(np.indices(3 * (256 // STEP,)), 0, -1) * STEP + (STEP - 1) / 2
    named = _lab(np.array(list(COLORS.values())))
    return np.stack([np.linalg.norm(_lab(rgb) - lab, axis=-1) for lab in named]).argmin(0)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB (0 to 255) ``[..., 3]`` to CIELAB (D65)."""
    unit = rgb / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    curve = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(curve, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
