"""Submit a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import ArgumentParser
from ..job import Job
from ..operations.submission import Submission, submit
from . import NAMES, load


def parser(prog: str = "submit.py") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Run a job on a cluster: pack the working directory, check that the cluster has what the job needs, "
        "follow the job's log and exit with its status. Ctrl-C leaves the job running.",
        epilog="The cluster's token is read from RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token.",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="URL of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265)",
    )
    parser.add_argument("--name", help="prefix of the job's id (default: the job's name)")
    parser.add_argument("--working-dir", default=".", metavar="DIR", help="the job's working directory (default: .)")
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="return once the job is submitted")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print what would be packed, required and run, and what the cluster named by an address has",
    )
    parser.add_argument(
        "--queue", action="store_true", help="if the cluster lacks resources, queue the job until they are added"
    )
    parser.add_argument(
        "command", nargs="+", metavar="-- JOB", help="as run locally: jobs/X.py ARGUMENTS, or curate ARGUMENTS"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "submit.py") -> int:
    return submit(Submission(find_command=find_command, **vars(parser(prog).parse_args(argv))))


def find_command(name: str) -> Job[Any] | None:
    """Return the job that is the command ``name``; None if there is no such command, or if it is no job."""
    return getattr(load(name), "job", None) if name in NAMES else None
