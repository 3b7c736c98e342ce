"""Packages of small drawings, and the list of their sets, in the place of those that npm fetches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from instella_ray.data.icons import build
from instella_ray.data.icons.sets import WORDS, IconPackage, IconSet, SetList, package_digest, set_list

ABOUT = {"licence": "MIT", "attribution": "someone", "source": "https://example.org", "version": "1.0.0"}
INFO = {"license": {"spdx": "MIT"}}
"""``info.json`` of a set."""


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write texts as they are and everything else as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def write_vocabulary(folder: Path, entries: list[dict[str, Any]], github: dict[str, str]) -> None:
    """Write the package of names, those of GitHub by code points."""
    codes: dict[str, dict[str, str]] = {name: {} for name in WORDS if "shortcodes" in name}
    codes["en/shortcodes/github.json"] = github
    groups = {"groups": {"4": "food-drink"}, "subgroups": {}}
    write_files(folder / "emojibase-data", {"en/data.json": entries, "meta/groups.json": groups, **codes})


def listed(folder: Path) -> SetList:
    """The list of the sets in ``folder``, each of which has its name as its style."""

    def described(package: str, kind: type[IconPackage], **more: str) -> Any:
        entry = kind(package=package, digest="", **ABOUT, **more)
        return entry.model_copy(update={"digest": package_digest(entry, folder / package)})

    names = sorted(path.name for path in (folder / "@iconify-json").iterdir())
    sets = {name: described(f"@iconify-json/{name}", IconSet, style=f"style {name}") for name in names}
    return set_list().model_copy(update={"sets": sets, "vocabulary": described("emojibase-data", IconPackage)})


def write_sets(folder: Path, *names: str, drawings: int) -> None:
    """Write sets that draw the same things, each in rectangles of its own."""
    codes = [f"1f{0x300 + number:x}" for number in range(drawings)]
    entries = [{"label": f"thing {code}", "hexcode": code.upper(), "group": 4} for code in codes]
    write_vocabulary(folder, entries, {})
    for name in names:
        icons = {f"thing-{code}": {"body": _rectangles(f"{name} {code}")} for code in codes}
        data = {"icons": icons, "width": 10, "height": 10}
        chars = {code: f"thing-{code}" for code in codes}
        write_files(folder / "@iconify-json" / name, {"icons.json": data, "chars.json": chars, "info.json": INFO})


def _rectangles(seed: str) -> str:
    draw = random.Random(seed)
    return "".join(
        f'<rect x="{draw.randrange(7)}" y="{draw.randrange(7)}" width="{draw.randrange(1, 4)}" '
        f'height="{draw.randrange(1, 4)}" fill="#{draw.randrange(1 << 24):06x}"/>'
        for _ in range(6)
    )


def use_sets(folder: str) -> None:
    """Let this process build the sets in ``folder``; for processes of their own."""
    here = listed(Path(folder))
    build.set_list = lambda: here
