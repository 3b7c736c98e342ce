"""Command lines of this house's jobs, checked as the jobs themselves would read them, without running anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import chdir
from typing import Any

import pytest

from instella_ray import cli
from instella_ray.config import job_config
from instella_ray.operations.submission import Submission

from .project import ROOT, job


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


def _filled(word: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        word = word.replace(f"${name}", value)
    assert "$" not in word, f"{word}: a variable that is not set"
    return word
