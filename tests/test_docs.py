"""README, CONTRIBUTING and the pages of ``docs/``: size, links, code, the annotated tree, and the strict build."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from instella_ray.commands import NAMES

from .kit.project import MAKEFILE, PACKAGE, ROOT, tracked

DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]
PAGES += sorted(DOCS.glob("*.md"))
TREE_LINE = re.compile(r"^((?:  )*)([\w.]+/?)  +(\S.*)$")


def tree() -> dict[str, str]:
    """Paths of the annotated tree, folders with a slash at their end, and their descriptions."""
    (block,) = [
        block for block in re.findall(r"^```\n(.*?)^```", ARCHITECTURE, re.M | re.S) if "instella_ray/" in block
    ]
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in filter(None, block.splitlines()):
        match = TREE_LINE.match(line)
        assert match, line
        depth = len(match[1]) // 2
        path = "".join([*parents[:depth], match[2]])
        assert path not in found, path
        found[path] = match[3]
        parents[depth:] = [match[2]]
    return found


def test_the_architecture_page_names_every_folder_and_file() -> None:
    files = [path.relative_to(ROOT) for path in tracked()]
    folders = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1}
    # Of the models that come with the package SHA256SUMS tells every file.
    bundled = Path(PACKAGE.name, "bundled")
    package = [path for path in files if path.parts[0] == PACKAGE.name and bundled not in path.parents]
    folders.add(f"{bundled}/")
    folders |= {f"{parent}/" for path in package for parent in path.parents if len(parent.parts) > 1}
    named = {
        str(path)
        for path in package
        if path.name != "__init__.py" and path.suffix != ".j2" and path.parent.name != "commands"
    }
    assert tree().keys() == folders | named


def test_the_files_of_commands_are_named_after_them() -> None:
    files = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert files == {command.replace("-", "_") for command in NAMES}


def test_a_file_has_a_few_words() -> None:
    assert {path: words for path, words in tree().items() if len(words.split()) > 7} == {}


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1200


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path (empty: the page itself) and anchor (maybe empty) of each link and image that stays in the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, and of those that it includes from another file."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    included = re.findall(r'^--8<-- "([^":]+)', text, re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    return found.union(*(anchors(ROOT / name) for name in included))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_is_python(page: Path) -> None:
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)):
        compile(code, f"{page.name}, block {number}", "exec")


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(name for entry in nav for name in entry.values()) == sorted(path.name for path in DOCS.glob("*.md"))


def test_every_image_is_shown() -> None:
    shown = {(page.parent / path).resolve() for page in PAGES for path, _ in links(page)}
    assert set(DOCS.glob("*.png")) <= shown


def test_files_that_contributing_names_exist() -> None:
    """In its tables a file without a folder is beside the one named before it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:instella_ray|tests|configs|docs)/[\w/.]+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.process
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("the extra 'docs' is not installed")
    recipe = re.search(r"^\t\$\(BIN\)/(mkdocs .*)$", MAKEFILE, re.M)
    assert recipe
    command = [sys.executable, "-m", *recipe[1].split(), "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = [tmp_path / "site" / path.stem / "index.html" for path in DOCS.glob("*.md") if path.stem != "index"]
    assert all(page.stat().st_size > 1000 for page in pages)
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "instella_ray.models.sampling.generate_diffusion" in api and ":class:" not in api
    # Nothing is fetched from other sites.
    assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)', api)
