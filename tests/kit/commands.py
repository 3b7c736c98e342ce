"""Command lines of this package's jobs, checked as the jobs themselves would read them, without running anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import chdir
from typing import Any

import pytest

from instella_ray import commands
from instella_ray.config import ArgumentParser
from instella_ray.demo.recipe import DemoConfig
from instella_ray.operations import submission
from instella_ray.operations.submission import Submission

from .project import ROOT, job, job_config


class Loaded(Exception):
    """A command has read its command line, which is all that a check wants of it."""


def check_job(words: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """The configuration that ``python jobs/X.py ...`` would run with; UserError or SystemExit for one that it refuses."""
    python, script, *arguments = [_filled(word, variables or {}) for word in words]
    assert python.rpartition("/")[2] == "python" and script.startswith("jobs/") and (ROOT / script).is_file(), words
    with chdir(ROOT):
        return job_config(script.removeprefix("jobs/").removesuffix(".py"), arguments)


def check_submission(words: Sequence[str]) -> None:
    """SystemExit or UserError for a line of ``jobs/submit.py`` whose flags, or whose job, would be refused.

    The job is submitted for real but without an address, which asks no cluster.
    """
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
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        submission.submit(orders[0]._replace(address=None, dry_run=True, working_dir=str(ROOT)))


def check_cli(words: Sequence[str]) -> None:
    """AssertionError, SystemExit or UserError for an ``instella-ray`` command that there is not, or whose flags are wrong."""
    name, *arguments = words[1:]
    assert name in commands.NAMES, name
    command = commands.load(name)
    if hasattr(command, "job") and "--from" not in arguments:
        with chdir(ROOT), pytest.MonkeyPatch.context() as patch:
            # A demo's folder is not part of the repository.
            patch.setattr("instella_ray.demo.state.read_demo", lambda folder: DemoConfig(folder=folder))
            command.job.load(arguments)
        return
    parse = ArgumentParser.parse_args

    def parsed(self: ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise Loaded

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Loaded):
        patch.setattr(ArgumentParser, "parse_args", parsed)
        command.main(arguments)


def _filled(word: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    assert "$" not in word, f"{word}: a variable that is not set"
    return word
