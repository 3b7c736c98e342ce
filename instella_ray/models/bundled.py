"""Models that come with the package: trained weights under ``instella_ray/bundled``, which need no path and no download.

A name is a folder there, such as ``icons/ar``. Its first part is a set of models over the codes of one tokenizer, with one
list of checksums, ``SHA256SUMS`` in the format of the program sha256sum; alone, it stands for the set's diffusion generator.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from ..errors import UserError

FOLDER = Path(__file__).parents[1] / "bundled"
SUMS = "SHA256SUMS"
DEFAULT = "icons"
"""Name of the model that draws where none is named."""
TOKENIZER, GENERATOR = "tokenizer", "diffusion"
"""Models of every set; its name stands for the generator."""


def bundled_names() -> list[str]:
    """Return the names of all models that come with the package, and of their sets, sorted."""
    names = {str(file.parent.relative_to(FOLDER)) for file in FOLDER.rglob("config.yaml")}
    return sorted(names | {name.partition("/")[0] for name in names})


def bundled_folder(name: str) -> Path | None:
    """Return the folder of the model ``name``, whose set of files is checked once; None if no model has that name.

    Raises UserError that names a damaged, missing or unknown file, and both checksums.
    """
    if name not in bundled_names():
        return None
    models = name.partition("/")[0]
    check_sums(FOLDER / models)
    return FOLDER / (f"{name}/{GENERATOR}" if name == models else name)


@functools.cache
def check_sums(folder: Path) -> None:
    """Raise UserError unless ``SHA256SUMS`` of ``folder`` lists all files there, and each has its SHA-256."""
    listed = (folder / SUMS).read_text() if (folder / SUMS).is_file() else ""
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in listed.splitlines())}
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {SUMS}
    if unknown := sorted(there - sums.keys()):
        raise UserError(f"{folder / SUMS}: does not list {unknown[0]}; install instella-ray again")
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing from the installation; install instella-ray again")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(f"{file}: damaged, its SHA-256 is {found}, expected {expected}; install instella-ray again")


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of ``folder``: a line for each other file in it, at any depth."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / SUMS)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))
