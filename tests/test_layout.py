"""The layout: floors of rooms, circles, names, and what each part may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .kit.project import PACKAGE, ROOT, imports, python_files, room_of, texts

# From the ground up: a room imports from the floors below its own, and from nothing beside it.
FLOORS = [
    {"logs", "memory"},
    {"errors", "retries", "lru"},
    {"transient", "urls"},
    {"storage"},
    {"config", "packages", "accelerator", "rendering", "sheet", "resources"},
    {"models", "runs", "job"},
    {"flops", "engine"},
    {"data"},
    {"serving", "bulk", "pipeline"},
    {"evaluation"},
    {"training"},
    {"planning"},
    {"demo", "bench", "operations"},
    {"commands"},
    {"cli"},
]
WITHOUT_RAY = (
    "models",
    "flops.py",
    "engine",
    "serving/batching.py",
    "serving/runner.py",
    "serving/safety.py",
    "data/scenes.py",
    "data/formats",
    "data/icons",
    "data/generation/captioner.py",
    "data/generation/diffusers_pipeline.py",
    "data/prompts.py",
    "evaluation/metrics",
    "evaluation/statistics.py",
    "bulk/sampler.py",
    "bulk/sample_set.py",
    "planning/simulation",
)


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms - set().union(*FLOORS) == set()


def test_rooms_import_only_from_floors_below() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = set()
    for path in PACKAGE.rglob("*.py"):
        here = room_of(path)
        if here in ("__init__", "__main__"):  # hand the Python API and the command line on
            continue
        for name in imports(path):
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "instella_ray" and room in floor and room != here and floor[room] >= floor.get(here, -1):
                wrong.add((str(path.relative_to(PACKAGE)), room))
    assert wrong == set()


def test_the_documented_layers_are_these() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^```\n(cli\n.*?)^```", page, re.M | re.S)
    assert block
    assert [set(line.split(", ")) for line in block[1].splitlines()] == FLOORS[::-1]
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^```\n(cli > .*?)^```", contributing, re.M | re.S)
    assert block
    assert [set(re.findall(r"\w+", layer)) for layer in block[1].split(">")] == FLOORS[::-1]


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that a file of it imports, inside functions too; not what is imported for types alone."""
    found = set()
    for name in imports(path):
        while name and not (ROOT / Path(*name.split("."))).with_suffix(".py").is_file():
            name = name.rpartition(".")[0]
        found |= {name} if name.startswith(f"{PACKAGE.name}.") else set()
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): modules_imported(p) for p in PACKAGE.rglob("*.py")}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    # What is left imports a circle, or is in one.
    while tops := graph.keys() - set().union(*graph.values()):
        graph = {module: needs for module, needs in graph.items() if module not in tops}
    assert sorted(graph) == []


def test_formats_know_nothing_of_what_is_done_with_them() -> None:
    others = {".".join(("instella_ray.data", room)) for room in ("curation", "generation", "loading", "job", "encode")}
    files = (PACKAGE / "data" / "formats").glob("*.py")
    found = {(path.name, name) for path in files for name in modules_imported(path)}
    assert [pair for pair in found if pair[1].startswith(tuple(others))] == []


def test_files_from_outside_are_opened_in_formats_alone() -> None:
    """One reader for each kind of them, or the same fault is mended in one job and not in the others."""
    readers = re.compile(r"\b(Image\.open|tarfile\.open|ParquetFile|url_to_fs)\(")
    # Files of samples are this package's own.
    allowed = {PACKAGE / "data" / "formats", PACKAGE / "storage.py", PACKAGE / "bulk" / "sample_set.py"}
    files = [path for path in PACKAGE.rglob("*.py") if allowed.isdisjoint((path, *path.parents))]
    assert [f"{path}: {found[0]}" for path in files if (found := readers.search(path.read_text()))] == []


def test_progress_bars_are_made_in_one_place() -> None:
    """With settings of their own, bars are torn on a terminal and fill files."""
    files = PACKAGE.rglob("*.py")
    assert [path.name for path in files if any(name.split(".")[0] == "tqdm" for name in imports(path))] == ["logs.py"]


def test_no_class_name_stands_twice() -> None:
    """A class says what it is the task, the worker or the limits *of*."""
    names = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name, times in Counter(names).items() if times > 1) == []


@pytest.mark.parametrize("part", WITHOUT_RAY)
def test_models_samplers_and_engine_never_import_ray(part: str) -> None:
    path = PACKAGE / part
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    assert files
    assert [f"{f}: {name}" for f in files for name in imports(f) if name.split(".")[0] == "ray"] == []


@pytest.mark.process
def test_curation_its_workers_and_the_loader_never_load_torch() -> None:
    """Half of what a worker's start would take, and most of its memory; filters with networks load it where they run.

    Training's batches are made without it too: tests/data/loading/test_loader.py makes some.
    """
    modules = ("curation.job", "curation.prefilter", "views", "formats.codes", "loading.loader", "loading.image_data")
    parts = ", ".join(f"instella_ray.data.{name}" for name in modules)
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_can_be_read_in_one_sitting() -> None:
    by_machine = ("LICENSE", "constraints.txt")

    def longest(path: str, text: str) -> int:
        """Lines; a page is three texts in one file: its style, its elements and its script."""
        parts = re.split(r"^</?(?:style|script)\b", text, flags=re.M) if path.endswith(".html") else [text]
        return max(len(part.splitlines()) for part in parts)

    assert {p: n for p, text in texts() if p not in by_machine and (n := longest(p, text)) > 400} == {}


def test_nothing_is_left_to_do_or_hollow() -> None:
    marks = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b")
    left = [f"{path}: {match[0]}" for path, text in texts() if (match := marks.search(text))]
    for path in python_files():
        tree = ast.parse(path.read_text())
        interfaces = {
            id(function)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("Protocol", "ABC") for base in node.bases)
            for function in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in interfaces:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                hollow = [isinstance(x, ast.Pass) or ast.unparse(x) == "..." for x in body]
                if body and all(hollow):
                    left.append(f"{path.relative_to(ROOT)}: {node.name} does nothing")
    assert left == []
