"""Submit a job: pack the working directory, hold the job's needs against the cluster, follow its log to the end."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..config import Config, add_config_arguments, job_config
from ..errors import UserError
from ..logs import RUN_ID, new_run_id
from .claims import amounts, lacking, totals
from .cluster import ClusterClient
from .following import LogFollower, exit_code
from .packing import Package, find_package, mebibytes
from .requirements import least
from .waiting import queued


class Submission(NamedTuple):
    """A job and where it goes."""

    command: Sequence[str]
    """As it would be run here: ``jobs/X.py --config ...``, with ``python`` before it or not."""
    address: str | None = None
    """Of the cluster's dashboard; none means what Ray's variables name, or this machine."""
    name: str | None = None
    """What the job's id begins with; none means the job's own name."""
    working_dir: str = "."
    follow: bool = True
    """Print the log until the job ends, and end as it did."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    queue: bool = False
    """Let the job wait on the cluster until that has grown to what the job needs."""


def submit(order: Submission) -> int:
    """Returns the exit code for the shell: the job's own where it is followed.

    UserError when the job would be refused where it runs, when its files are too large or not among those packed, when
    the cluster lacks something and the job may not wait for it, and when the cluster cannot be reached.
    """
    root = Path(order.working_dir).absolute()
    script, arguments = _parted(order.command)
    package = find_package(root)
    _require(script, package, "the job")
    needs = least(read_job(root, script, arguments))
    _require_config(arguments, package)
    command = ["python", script, *arguments]
    if order.dry_run:
        print(f"packs {len(package.sizes)} files, {mebibytes(package.total)}; the largest: {package.largest()}")
        print(f"runs  {shlex.join(command)}")
        print(f"needs {amounts(totals(needs), totals(needs))}", flush=True)
    cluster = ClusterClient(order.address)
    nodes = cluster.nodes()
    short = lacking(needs, nodes)
    if order.dry_run:
        have = {name: sum(node.get(name, 0.0) for node in nodes) for name in totals(needs)}
        print(f"has   {amounts(have, have)} on {len(nodes)} nodes, {cluster.address}")
    if short and not order.queue:
        raise UserError(f"{script}: {short}; --queue lets the job wait there until the cluster has grown to that")
    if order.dry_run:
        return 0
    job = new_id(order.name or PurePosixPath(script).stem)
    _send(cluster, package, job, queued(needs, command) if short else command)
    again = f"ray job logs --address {cluster.address} --follow {job}"
    stop = f"ray job stop --address {cluster.address} {job}"
    print(f"{job}: submitted to {cluster.address}", flush=True)
    if not order.follow:
        print(f"follow it: {again}\nstop it:   {stop}")
        return 0
    try:
        with cluster.reached():
            details = LogFollower(cluster.jobs, job).run()
    except KeyboardInterrupt:
        print(f"\n{job} runs on\nfollow it: {again}\nstop it:   {stop}", flush=True)
        return 130
    said = details.message.partition(", last available logs")[0].splitlines() if details.message else []
    print(f"{job}: {details.status.value}" + (f", {said[0]}" if said else ""), flush=True)
    return exit_code(details)


def read_job(root: Path, script: str, arguments: Sequence[str]) -> Config:
    """The configuration that ``script`` would run with, which it reads as it does when it runs."""
    spec = importlib.util.spec_from_file_location(f"submitted_{PurePosixPath(script).stem}", root / script)
    if spec is None or spec.loader is None:
        raise UserError(f"{script}: expected a job, jobs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    with chdir(root):
        spec.loader.exec_module(module)
        if not callable(main := getattr(module, "main", None)):
            raise UserError(f"{script}: expected a job, with a function main(argv) that reads its configuration first")
        return job_config(main, arguments)


def new_id(name: str) -> str:
    """A new job's id, which is its run's too; UserError for a name that Ray could not take."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name}: expected letters, digits and . _ -")
    return new_run_id(name)


def _parted(command: Sequence[str]) -> tuple[str, list[str]]:
    """Script and arguments of a job's command line."""
    words = list(command)
    if words and re.fullmatch(r"(.*/)?python[0-9.]*", words[0]):
        words.pop(0)
    if not words or not words[0].endswith(".py"):
        found = f", got {shlex.join(words)}" if words else ""
        raise UserError(f"expected a job after --, such as jobs/curate.py --config FILE{found}")
    return PurePosixPath(words[0]).as_posix(), words[1:]


def _require(path: str, package: Package, what: str) -> None:
    if path not in package.sizes:
        raise UserError(f"{path}: {what} is not among the files to pack from {package.root}")


def _require_config(arguments: Sequence[str], package: Package) -> None:
    """A path from the working directory must go along; an absolute one may lie where the cluster reads it too."""
    parser = argparse.ArgumentParser(add_help=False)
    add_config_arguments(parser)
    path = parser.parse_known_args(arguments)[0].config
    if path and not Path(path).is_absolute():
        _require(PurePosixPath(path).as_posix(), package, "the configuration")


def _send(cluster: ClusterClient, package: Package, job: str, command: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="instella-ray-") as scratch:
        target = Path(scratch) / "working_dir.zip"
        package.write(target)
        try:
            with cluster.reached():
                cluster.jobs.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job,
                    metadata={"run_id": job},
                    runtime_env={"working_dir": str(target), "env_vars": {RUN_ID: job}},
                )
        except RuntimeError as error:
            raise UserError(f"{cluster.address}: did not take the job ({str(error).splitlines()[0]})") from None
