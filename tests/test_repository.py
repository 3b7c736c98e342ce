"""Rules of the house that a program can check."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "instella_ray"
FLOORS = {
    "errors": 0,
    "config": 1,
    "storage": 1,
    "accelerator": 1,
    "models": 1,
    "rng": 2,
    "diffusion": 2,
    "sampling": 2,
    "data": 3,
    "training": 4,
    "serving": 5,
    "demo": 6,
    "cli": 6,
}
WITHOUT_RAY = (
    "models",
    "rng.py",
    "diffusion.py",
    "sampling.py",
    "serving/engine.py",
    "serving/runner.py",
    "data/scenes.py",
)
# The check of recorded numbers runs the samplers too, and its command's name is fixed.
UPWARDS = {"models/golden.py"}


def sources() -> list[Path]:
    return [p for folder in ("instella_ray", "jobs", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file of the package imports."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_rooms_import_only_from_floors_below() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__" or str(relative) in UPWARDS:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "instella_ray" or len(parts) < 2 or parts[1] not in FLOORS:
                continue
            if FLOORS[parts[1]] > FLOORS[room]:
                wrong.append(f"{relative} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("part", WITHOUT_RAY)
def test_models_samplers_and_engine_never_import_ray(part: str) -> None:
    path = PACKAGE / part
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    assert files
    assert [f"{f}: {name}" for f in files for name in imports(f) if name.split(".")[0] == "ray"] == []


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_jobs_do_no_work_at_import() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Expr, ast.If)
    for path in (ROOT / "jobs").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert all(isinstance(node, allowed) for node in tree.body), path
        assert len(path.read_text().splitlines()) <= 60, path


def test_no_package_index_is_named() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/setup.sh"):
        text = (ROOT / name).read_text()
        assert (
            "index-url" not in text
            and "find-links" not in text
            and "http"
            not in text.replace("httpx", "")
            .replace("httptools", "")
            .replace("httpcore", "")
            .replace("aiohttp", "")
            .replace("openapi-http", "")
        ), name


def test_constraints_are_exact_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50 and all("==" in line and "@" not in line for line in lines)


def test_make_explains_itself() -> None:
    out = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert "make demo" in out and "make test" in out
