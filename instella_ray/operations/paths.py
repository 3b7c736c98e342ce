"""Checks of a submitted job's paths: results must outlive the job's working directory, and inputs be in it or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath

from ..config import Config, PathValue, path_values
from ..data.formats.patterns import expand_part, split_pattern
from ..errors import UserError
from ..models.bundled import bundled_names
from ..training.stages import TokenizerStagesConfig
from ..urls import is_local, is_relative
from .packing import Package

CODE = "instella_ray/__init__.py"
"""File by which a package holds this one's code, without the weights that come with it."""


def require_lasting_outputs(config: Config) -> None:
    """Require that the job of ``config`` writes to no relative path.

    A submitted job runs in Ray's copy of the working directory, which Ray deletes. Raises UserError that names the key,
    its value and an example.
    """
    for path in _paths(config):
        if path.kind.written and is_relative(path.value):
            raise UserError(
                f"{path.key}={path.value}: would be written to Ray's copy of the working directory, which is deleted "
                f"with the cluster or before; {_examples(path)}"
            )


def require_packed_inputs(config: Config, package: Package) -> None:
    """Require that the relative inputs of the job of ``config`` are in ``package``; call it in the package's folder.

    Raises UserError that names the key, its value and an example.
    """
    for path in _paths(config):
        if path.kind.written:
            continue
        for part in split_pattern(path.value):
            # package:MODULE/FILE is part of an installed package, and some models are part of this one, unless its packed
            # code comes before the installed one.
            bundled = part in bundled_names() and CODE not in package.sizes
            installed = part.startswith("package:") or bundled
            if is_relative(part) and not installed and not _is_packed(part, package):
                raise UserError(
                    f"{path.key}={part}: is not among the files to pack from {package.root}; {_examples(path, part)}"
                )


def shared_outputs(config: Config) -> list[str]:
    """Return ``KEY=VALUE`` of the outputs that are local paths, which all nodes must share."""
    return [f"{path.key}={path.value}" for path in _paths(config) if path.kind.written and is_local(path.value)]


def _paths(config: Config) -> Iterator[PathValue]:
    yield from path_values(config)
    if isinstance(config, TokenizerStagesConfig):
        for name, stage in config.each().items():
            yield from path_values(stage, f"stages.{name}.")


def _is_packed(part: str, package: Package) -> bool:
    patterns = [os.path.relpath(path, package.root) for path in expand_part(part)]
    return any(
        name == pattern or name.startswith(f"{pattern}/") or fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*")
        for pattern in patterns
        for name in package.sizes
    )


def _examples(path: PathValue, value: str | None = None) -> str:
    name = PurePosixPath(value or path.value).name or path.key
    return f"expected a URL such as gs://BUCKET/{name}, or a path on storage that all nodes share, such as /mnt/shared/{name}"
