"""Command lines of this package's jobs, checked as the jobs themselves would read them, without running anything."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import chdir
from typing import Any

import pytest

from instella_ray import cli
from instella_ray.config import ArgumentParser, job_config
from instella_ray.demo.recipe import DemoConfig
from instella_ray.operations.submission import Submission

from .project import JOBS, ROOT, job


class Loaded(Exception):
    """A command has read its command line, which is all that a check wants of it."""


def check_job(words: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """The configuration that ``python jobs/X.py ...`` would run with; UserError or SystemExit for one that it refuses."""
    python, script, *arguments = [_filled(word, variables or {}) for word in words]
    assert python.rpartition("/")[2] == "python" and script.startswith("jobs/") and (ROOT / script).is_file(), words
    with chdir(ROOT):
        return job_config(job(script.removeprefix("jobs/").removesuffix(".py")), arguments)


def check_submission(words: Sequence[str]) -> None:
    """SystemExit or UserError for a line of ``jobs/submit.py`` whose flags, or whose job, would be refused."""
    orders: list[Submission] = []
    main = job("submit")

    def submit(order: Submission) -> int:
        orders.append(order)
        return 0

    patch = pytest.MonkeyPatch()
    try:
        patch.setitem(main.__globals__, "submit", submit)  # type: ignore[attr-defined]
        main(list(words[2:]))
    finally:
        patch.undo()
    command = [word for word in orders[0].command if word != "python"]
    check_job(["python", *command])


def check_cli(words: Sequence[str]) -> None:
    """AssertionError, SystemExit or UserError for an ``instella-ray`` command that there is not, or whose flags are wrong."""
    name, *arguments = words[1:]
    assert any(name in commands for commands in cli.COMMANDS.values()), name
    main = importlib.import_module(f"instella_ray.commands.{name.replace('-', '_')}").main
    if name.replace("-", "_") in {path.stem for path in JOBS}:
        with chdir(ROOT), pytest.MonkeyPatch.context() as patch:
            # A demo's folder is not part of the repository.
            patch.setattr("instella_ray.demo.state.read_demo", lambda folder: DemoConfig(folder=folder))
            job_config(main, arguments)
        return
    parse = ArgumentParser.parse_args

    def parsed(self: ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise Loaded

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Loaded):
        patch.setattr(ArgumentParser, "parse_args", parsed)
        main(arguments)


def _filled(word: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    assert "$" not in word, f"{word}: a variable that is not set"
    return word
