"""The project's files: where they are, and those that a rule is about."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "instella_ray"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
SUBMIT = ROOT / "jobs" / "submit.py"  # sends the others to a cluster
JOBS = sorted(set((ROOT / "jobs").glob("*.py")) - {SUBMIT})
# Ray Serve's own form; tests/serving/test_configs.py checks it.
DEPLOY = ROOT / "configs" / "serve" / "deploy.yaml"
# Read by ``instella-ray simulate``; tests/planning checks them.
SIMULATIONS = sorted((ROOT / "configs" / "simulation").glob("*.yaml"))


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control, or about to be; without git, those of the folders we know."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        known = [ROOT / name for name in (".ci", "configs", "docs", "instella_ray", "jobs", "tests")]
        found = [p for folder in known for p in folder.rglob("*") if "__pycache__" not in p.parts]
        found += [p for p in ROOT.iterdir() if p.suffix or p.name in ("Makefile", "LICENSE")]
    else:
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    return tuple(sorted(p for p in found if p.is_file()))


def texts() -> Iterator[tuple[str, str]]:
    """Relative path and text of each tracked file that is text."""
    for path in tracked():
        try:
            yield str(path.relative_to(ROOT)), path.read_text()
        except UnicodeDecodeError:
            continue


def script(name: str) -> ModuleType:
    """The module of ``jobs/NAME.py``."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


def job(name: str) -> Callable[[Sequence[str]], int]:
    """The main function of ``jobs/NAME.py``."""
    module = script(name)
    main: Callable[[Sequence[str]], int] = getattr(module, "job", module).main
    return main


def job_config(name: str, argv: Sequence[str]) -> Any:
    """The configuration that ``python jobs/NAME.py ARGV`` would run with; UserError or SystemExit if it is refused."""
    return script(name).job.load(argv)


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, inside functions too."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")
