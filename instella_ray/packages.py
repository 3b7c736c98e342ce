"""Packages of optional extras: imported where they are needed, and named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import UserError


def optional_import(module: str, asker: str, hint: str) -> Any:
    """The module, or a UserError in which ``asker`` says what to install where it does not import."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{asker}: {error}; {hint}") from None


def extra_import(module: str, asker: str, extra: str) -> Any:
    """:func:`optional_import` of a module that one of this project's extras brings."""
    return optional_import(module, asker, f"pip install 'instella-ray[{extra}]'")
