"""Which files of a working directory go with a job, and the zip file that Ray uploads of them."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from ..errors import UserError
from ..training.run_dir import CONFIG, METRICS

EXCLUDES = (
    *(".git", ".venv", ".uv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "node_modules"),
    *("/demo*/", "/runs*/", "/build/", "/dist/"),
    *("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx"),
    *("*.tar", "*.tar.*", "*.tgz", "*.zip", "*.parquet", "*.arrow"),
)
"""What no job needs, beside what git ignores; patterns as git writes them. Data and weights are read where they lie."""
LIMIT = 100 << 20
"""Bytes that a job may take along; Ray keeps them in the memory of the head."""
EPOCH = (1980, 1, 1, 0, 0, 0)


class Patterns(NamedTuple):
    """Patterns as git writes them, which hold for what lies below a folder."""

    folder: Path
    spec: GitIgnoreSpec

    @classmethod
    def read(cls, path: Path) -> Patterns:
        """The patterns of an ignore file."""
        return cls(path.parent, GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8").splitlines()))

    def match(self, path: Path, end: str = "") -> bool:
        """Whether a pattern names ``path``; ``end`` is a slash for a folder."""
        return self.spec.match_file(path.relative_to(self.folder).as_posix() + end)


class Package(NamedTuple):
    """The files of a working directory that go with a job."""

    root: Path
    sizes: Mapping[str, int]
    """Bytes by path below ``root``."""

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def largest(self, count: int = 3) -> str:
        named = sorted(self.sizes.items(), key=lambda item: -item[1])[:count]
        return ", ".join(f"{path} {mebibytes(size)}" for path, size in named)

    def write(self, target: Path) -> None:
        """Zip the files; the same contents give the same bytes, so that Ray uploads them once."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(self.sizes):
                entry = zipfile.ZipInfo(path, EPOCH)
                entry.external_attr = (self.root / path).stat().st_mode << 16
                archive.writestr(entry, (self.root / path).read_bytes(), zipfile.ZIP_DEFLATED)


def find_package(root: Path) -> Package:
    """What of ``root`` goes with a job; UserError names the largest files where that is too much.

    In a git checkout these are the files that git tracks or would, elsewhere those that no ``.gitignore`` names; in both
    without those that a ``.rayignore`` names, :data:`EXCLUDES` and run directories. An ignore file holds for its folder
    and all below. Beside git's own reading none takes back what another names, as in Ray's own packages.
    """
    if not root.is_dir():
        raise UserError(f"--working-dir {root}: expected a folder")
    names = list(_walked(root, _listed_by_git(root)))
    runs = tuple(f"{folder}/" for folder in _run_directories(names))
    kept = {name: root / name for name in names if not name.startswith(runs)}
    package = Package(root, {name: path.stat().st_size for name, path in kept.items() if path.is_file()})
    if package.total > LIMIT:
        raise UserError(
            f"{root}: {mebibytes(package.total)} to pack, expected at most {mebibytes(LIMIT)}; the largest are "
            f"{package.largest(5)}: let .gitignore or .rayignore name what no job needs, or put it where the job reads it"
        )
    return package


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _listed_by_git(root: Path) -> list[str] | None:
    """Files below ``root`` that are tracked, or untracked and not ignored; None where there is no checkout or no git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else [name for name in done.stdout.split("\0") if name]


def _walked(root: Path, listed: Iterable[str] | None) -> Iterator[str]:
    """Files below ``root`` that no pattern names, of those ``listed`` where git has; no other folder is looked into."""
    ignore_files = (".gitignore", ".rayignore") if listed is None else (".rayignore",)  # git has read its own
    known = None if listed is None else {path for name in listed for path in (root / name, *(root / name).parents)}
    patterns = {root.parent: [Patterns(root, GitIgnoreSpec.from_lines(EXCLUDES))]}

    def wanted(path: Path, end: str = "") -> bool:
        return (known is None or path in known) and not any(each.match(path, end) for each in patterns[path.parent])

    for name, folders, files in os.walk(root):
        folder = Path(name)
        found = [Patterns.read(folder / file) for file in ignore_files if file in files]
        patterns[folder] = [*patterns[folder.parent], *found]
        folders[:] = [child for child in folders if wanted(folder / child, "/")]
        yield from (path.relative_to(root).as_posix() for file in files if wanted(path := folder / file))


def _run_directories(names: list[str]) -> list[str]:
    """Folders among ``names`` that training has written, by the two files that each of them has."""
    found = set(names)
    logs = [name for name in names if name.endswith(f"/{METRICS}")]
    return [folder for name in logs if f"{(folder := name.removesuffix(f'/{METRICS}'))}/{CONFIG}" in found]
