"""Command lines of this house's jobs, checked as the jobs themselves would read them, without running anything."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from instella_ray import cli
from instella_ray.config import load_config

from .test_repository import ROOT, job


class Loaded(Exception):
    """A job has read its configuration, which is all that a check wants of it."""


def check_job(words: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """The configuration that ``python jobs/X.py ...`` would run with; UserError or SystemExit for one that it refuses."""
    python, script, *arguments = [_filled(word, variables or {}) for word in words]
    assert python.rpartition("/")[2] == "python" and script.startswith("jobs/") and (ROOT / script).is_file(), words
    main = job(script.removeprefix("jobs/").removesuffix(".py"))
    patch = pytest.MonkeyPatch()
    try:
        patch.chdir(ROOT)
        patch.setitem(main.__globals__, "parse_job", _parse)  # type: ignore[attr-defined]
        main(arguments)
    except Loaded as loaded:
        return loaded.args[0]
    finally:
        patch.undo()
    raise AssertionError(f"{script} did not read its configuration")


def check_cli(words: Sequence[str]) -> None:
    """SystemExit for an ``instella-ray`` command whose flags its parser does not know."""
    patch = pytest.MonkeyPatch()

    def parsed(run: object) -> int:
        raise Loaded

    try:
        patch.setattr(cli, "run_main", parsed)
        cli.main(list(words[1:]))
    except Loaded:
        return
    finally:
        patch.undo()
    raise AssertionError(f"{words}: not parsed")


def _parse(cls: type, argv: Sequence[str], *, flags: Mapping[str, str] | None = None, **about: str) -> None:
    parser = argparse.ArgumentParser(prog=about["prog"], exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    for flag, key in (flags or {}).items():
        parser.add_argument(f"--{flag}", dest=key)
    args = parser.parse_args(argv)
    given = [f"{key}={value}" for key in (flags or {}).values() if (value := getattr(args, key)) is not None]
    raise Loaded(load_config(cls, args.config, [*args.overrides, *given]))


def _filled(word: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    assert "$" not in word, f"{word}: a variable that is not set"
    return word
