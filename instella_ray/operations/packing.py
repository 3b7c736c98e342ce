"""Packing of a working directory: selection of the files for a job, and the zip file that Ray uploads."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pydantic
from pathspec import GitIgnoreSpec

from ..errors import UserError
from ..runs import RECORD, RunRecord
from ..training.run_dir import CONFIG, METRICS

EXCLUDES = (
    *(".git", ".venv", ".uv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "node_modules"),
    *("/demo*/", "/runs*/", "/build/", "/dist/", "/instella_ray/bundled/"),
    *("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx"),
    *("*.tar", "*.tar.*", "*.tgz", "*.zip", "*.parquet", "*.arrow"),
)
"""Excluded files in addition to those that git ignores, as gitignore patterns. Data and weights are not uploaded."""
LIMIT = 100 << 20
"""Largest package in bytes; Ray keeps it in the memory of the head node."""
EPOCH = (1980, 1, 1, 0, 0, 0)


class Patterns(NamedTuple):
    """Patterns of an ignore file, in git's syntax, which apply below its folder."""

    folder: Path
    spec: GitIgnoreSpec

    @classmethod
    def read(cls, path: Path) -> Patterns:
        """Read an ignore file."""
        return cls(path.parent, GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8").splitlines()))

    def match(self, path: Path, end: str = "") -> bool:
        """Tell whether ``path`` matches; ``end`` is a slash for a folder."""
        return self.spec.match_file(path.relative_to(self.folder).as_posix() + end)


class Package(NamedTuple):
    """Files of a working directory to upload with a job."""

    root: Path
    sizes: Mapping[str, int]
    """Size in bytes by path relative to ``root``."""

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def largest(self, count: int = 3) -> str:
        named = sorted(self.sizes.items(), key=lambda item: -item[1])[:count]
        return ", ".join(f"{path} {mebibytes(size)}" for path, size in named)

    def write(self, target: Path) -> None:
        """Zip the files deterministically: equal contents give equal bytes, so that Ray uploads them only once."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(self.sizes):
                entry = zipfile.ZipInfo(path, EPOCH)
                entry.external_attr = (self.root / path).stat().st_mode << 16
                archive.writestr(entry, (self.root / path).read_bytes(), zipfile.ZIP_DEFLATED)


def find_package(root: Path) -> Package:
    """Select the files of ``root`` to upload; raises UserError with the largest files if they exceed :data:`LIMIT`.

    In a git checkout these are the files that git tracks or would track, elsewhere those that match no ``.gitignore``;
    files that match a ``.rayignore``, :data:`EXCLUDES` and outputs of jobs are excluded in both. An ignore file applies
    to its folder and all below. Except within git's own reading, no ignore file re-includes what another excludes, as
    in Ray's packages.
    """
    if not root.is_dir():
        raise UserError(f"--working-dir {root}: expected a folder")
    found = {name: root / name for name in _walked(root, _listed_by_git(root))}
    package = Package(root, {name: path.stat().st_size for name, path in found.items() if path.is_file()})
    if package.total > LIMIT:
        raise UserError(
            f"{root}: {mebibytes(package.total)} to pack, expected at most {mebibytes(LIMIT)}; the largest are "
            f"{package.largest(5)}: add what the job does not need to .gitignore or .rayignore, or move it to shared storage"
        )
    return package


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _listed_by_git(root: Path) -> list[str] | None:
    """List files below ``root`` that are tracked, or untracked and not ignored; None without a checkout or git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else [name for name in done.stdout.split("\0") if name]


def _walked(root: Path, listed: Iterable[str] | None) -> Iterator[str]:
    """Yield the files below ``root`` that match no pattern, of those ``listed`` by git, if any; skips excluded folders."""
    ignore_files = (".gitignore", ".rayignore") if listed is None else (".rayignore",)  # git applies its own
    known = None if listed is None else {path for name in listed for path in (root / name, *(root / name).parents)}
    patterns = {root.parent: [Patterns(root, GitIgnoreSpec.from_lines(EXCLUDES))]}

    def wanted(path: Path, end: str = "") -> bool:
        if known is not None and path not in known:
            return False
        return not any(each.match(path, end) for each in patterns[path.parent]) and not (end and _is_output(path))

    for name, folders, files in os.walk(root):
        folder = Path(name)
        found = [Patterns.read(folder / file) for file in ignore_files if file in files]
        patterns[folder] = [*patterns[folder.parent], *found]
        folders[:] = [child for child in folders if wanted(folder / child, "/")]
        yield from (path.relative_to(root).as_posix() for file in files if wanted(path := folder / file))


def _is_output(folder: Path) -> bool:
    """Return whether a job has written the folder: it holds a run record, or is a run directory of training."""
    if all((folder / name).is_file() for name in (METRICS, CONFIG)):
        return True
    if not (folder / RECORD).is_file():
        return False
    try:
        RunRecord.model_validate_json((folder / RECORD).read_bytes())
    except pydantic.ValidationError:  # a file of the user's with the same name
        return False
    return True
