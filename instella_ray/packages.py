"""Versions of packages, and imports of optional ones, with an installation hint if they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import UserError


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def optional_import(module: str, asker: str, hint: str) -> Any:
    """Import and return ``module``; UserError, prefixed with ``asker`` and with the ``hint``, if that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{asker}: {error}; {hint}") from None


def extra_import(module: str, asker: str, extra: str) -> Any:
    """Import a module of this project's ``extra`` as :func:`optional_import`."""
    return optional_import(module, asker, f"pip install 'instella-ray[{extra}]'")
