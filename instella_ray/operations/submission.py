"""Job submission: packs the working directory, checks the job's needs against the cluster, and follows its log."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..config import add_config_arguments, recipes
from ..errors import UserError
from ..job import Job
from ..logs import PACKAGE, RUN_ID, new_run_id
from ..resources import amounts, lacking, totals
from .cluster import ClusterClient, named_address
from .following import LogFollower, exit_code
from .packing import Package, find_package, mebibytes
from .paths import require_lasting_outputs, require_packed_inputs, shared_outputs
from .requirements import least
from .waiting import queued


class Submission(NamedTuple):
    """Job to submit, target cluster and options."""

    command: Sequence[str]
    """Command line as run locally: ``jobs/X.py --config ...`` or ``curate --config ...``.

    ``python`` or ``instella-ray`` may precede it.
    """
    find_command: Callable[[str], Job[Any] | None]
    """Function that returns the job that is a command of this package, by name; None if none is."""
    address: str | None = None
    """Address of the cluster's dashboard; none uses Ray's environment variables, else this machine."""
    name: str | None = None
    """Prefix of the job's id; none uses the script's name."""
    working_dir: str = "."
    follow: bool = True
    """Print the log until the job ends, and return its exit code."""
    dry_run: bool = False
    """Print what would be submitted, without submitting; a cluster is only asked if its address is named."""
    queue: bool = False
    """Let the job wait on the cluster until it has scaled up to the job's needs."""


def submit(order: Submission) -> int:
    """Submit a job and return the shell exit code: the job's own if its log is followed.

    Raises UserError if the job's configuration is invalid, if it writes to a relative path, if its files are too large or
    not in the package, if the cluster lacks resources and ``order.queue`` is not set, and if the cluster cannot be reached.
    """
    root = Path(order.working_dir).absolute()
    name, *arguments = _without_interpreter(order.command)
    package = find_package(root)
    if job := order.find_command(name):
        command = ["python", "-m", PACKAGE, name, *arguments]
    elif not name.endswith(".py"):
        raise UserError(
            f"expected a job after --, such as jobs/curate.py --config FILE, got {shlex.join(order.command)}"
        )
    else:
        _require(name, package, "the job")
        job = script_job(root, name)
        command = ["python", name, *arguments]
    with chdir(root):
        config = job.load(arguments)
        require_lasting_outputs(config)
        require_packed_inputs(config, package)
    needs = least(config)
    _require_config(arguments, package)
    if order.dry_run:
        print(f"packs {len(package.sizes)} files, {mebibytes(package.total)}; the largest: {package.largest()}")
        print(f"runs  {shlex.join(command)}")
        print(f"needs {amounts(totals(needs), totals(needs))}", flush=True)
        if named_address(order.address) is None:
            print("has   unknown: no cluster was asked, as no --address names one")
            return 0
    cluster = ClusterClient(order.address)
    nodes = cluster.nodes()
    short = lacking(needs, nodes)
    if order.dry_run:
        have = {name: sum(node.get(name, 0.0) for node in nodes) for name in totals(needs)}
        print(f"has   {amounts(have, have)} on {len(nodes)} nodes, {cluster.address}")
    if short and not order.queue:
        raise UserError(f"{name}: {short}; --queue lets the job wait until the cluster has scaled up")
    if len(nodes) > 1 and (shared := shared_outputs(config)):
        print(f"note: {', '.join(shared)}: expected on storage that all nodes share", flush=True)
    if order.dry_run:
        return 0
    job_id = new_id(order.name or PurePosixPath(name).stem)
    advice = (
        f"follow it: ray job logs --address {cluster.address} --follow {job_id}\n"
        f"stop it:   ray job stop --address {cluster.address} {job_id}"
    )
    try:
        _send(cluster, package, job_id, queued(needs, command) if short else command)
    except KeyboardInterrupt:
        print(f"\n{job_id} may have reached the cluster\n{advice}", flush=True)
        return 130
    print(f"{job_id}: submitted to {cluster.address}", flush=True)
    if not order.follow:
        print(advice)
        return 0
    try:
        with cluster.reached():
            details = LogFollower(cluster.jobs, job_id).run()
    except KeyboardInterrupt:
        print(f"\n{job_id} continues to run\n{advice}", flush=True)
        return 130
    message = details.message.partition(", last available logs")[0].splitlines() if details.message else []
    print(f"{job_id}: {details.status.value}" + (f", {message[0]}" if message else ""), flush=True)
    return exit_code(details)


def script_job(root: Path, script: str) -> Job[Any]:
    """Return the ``job`` of a script, which is imported and not run; UserError if it has none."""
    spec = importlib.util.spec_from_file_location(f"submitted_{PurePosixPath(script).stem}", root / script)
    if spec is None or spec.loader is None:
        raise UserError(f"{script}: expected a job, jobs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations in sys.modules
    with chdir(root):
        spec.loader.exec_module(module)
    if not isinstance(job := getattr(module, "job", None), Job):
        raise UserError(f"{script}: expected a job, with a line job = Job(...) of instella_ray.job")
    return job


def new_id(name: str) -> str:
    """Create a job id, which is also the run id; raises UserError for a name that Ray does not accept."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name}: expected letters, digits and . _ -")
    return new_run_id(name)


def _without_interpreter(command: Sequence[str]) -> list[str]:
    """Return a job's command line from its script or command on; UserError if there is none."""
    words = list(command)
    if words and re.fullmatch(r"(.*/)?(python[0-9.]*|instella-ray)", words[0]):
        words.pop(0)
    if not words:
        raise UserError("expected a job after --, such as jobs/curate.py --config FILE")
    return [PurePosixPath(words[0]).as_posix(), *words[1:]]


def _require(path: str, package: Package, what: str) -> None:
    if path not in package.sizes:
        raise UserError(f"{path}: {what} is not among the files to pack from {package.root}")


def _require_config(arguments: Sequence[str], package: Package) -> None:
    """Require that a relative path of a configuration is in the package.

    An absolute one may be on storage that the cluster reads, and a recipe comes with this package.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_config_arguments(parser)
    path = parser.parse_known_args(arguments)[0].config
    if path and not Path(path).is_absolute() and path not in recipes():
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
            raise UserError(f"{cluster.address}: rejected the job ({str(error).splitlines()[0]})") from None
