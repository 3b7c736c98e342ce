"""Recipes and pages of the icons name the folders that the recipes before them write, and their commands could be typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from instella_ray.data.icons.splits import SPLITS

from ...kit.project import ROOT
from ...kit.shell_lines import check_line, shell_lines

RECIPES = sorted((ROOT / "configs" / "icons").glob("*.yaml"))
PAGES = [ROOT / "docs" / "icons.md", ROOT / "docs" / "evaluation.md", ROOT / "examples" / "icons" / "README.md"]
SHELL = re.compile(r"^#   (instella-ray .+|python jobs/.+)$", re.M)
FOLDER = re.compile(r"(?<![\w/])icons(?:-\w+)?/[\w*.-]+")
WRITTEN = {
    *(f"icons/{split}" for split in SPLITS),
    "icons-curated/*.tar",
    *(f"icons/{name}" for name in ("tokenizer", "diffusion", "ar")),  # come with the package
    *(f"icons-runs/{name}" for name in ("tokenizer", "diffusion", "ar", "classifier")),
}


def commands(path: Path) -> list[str]:
    text = path.read_text()
    lines = SHELL.findall(text) if path.suffix == ".yaml" else shell_lines(text)
    return [line for line in lines if "icons" in line]


def folders(path: Path) -> Iterator[str]:
    """Folders of the icons that the commands of a file name, and the values of a recipe."""
    lines = [re.sub(r"--config \S+", "", line) for line in commands(path)]
    if path.suffix == ".yaml":
        lines += [line.partition("#")[0] for line in path.read_text().splitlines()]
    for line in lines:
        yield from FOLDER.findall(line)


@pytest.mark.parametrize("path", [*RECIPES, *PAGES], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_folders_of_the_icons_are_those_that_commands_write(path: Path) -> None:
    assert commands(path)
    assert set(folders(path)) <= WRITTEN


def test_prompts_and_true_images_are_of_all_splits() -> None:
    of = {path.name: " ".join(line for line in commands(path) if "held-out-pairs" in line) for path in RECIPES + PAGES}
    for name in ("sample.yaml", "evaluate.yaml", "evaluation.md"):
        assert {found.partition("/")[2] for found in FOLDER.findall(of[name])} >= set(SPLITS), name


@pytest.mark.parametrize("line", [line for path in RECIPES for line in commands(path)])
def test_commands_of_the_recipes_could_be_typed(line: str) -> None:
    check_line(line)
