"""``jobs/submit.py`` against a real head with token authentication: what is refused, what is shown, how it ends."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..kit.head import RAY, Head, end
from ..kit.processes import wait_until
from ..kit.project import ROOT
from ..kit.proxy import Wire

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIAL = '''
import os, sys, time
from pathlib import Path
import instella_ray
from instella_ray.config import Config
from instella_ray.errors import run_main
from instella_ray.job import Job


class TrialConfig(Config):
    """What it says, and how it ends."""

    notes: str
    hold: bool = False
    code: int = 0


def run(cfg):
    notes = Path(cfg.notes)
    print("run", os.environ["INSTELLA_RAY_RUN_ID"], "of", instella_ray.__file__)
    print("\\n".join(f"line {number}" for number in range(50)), flush=True)
    (notes / "begun").touch()
    while cfg.hold and not (notes / "release").exists():
        time.sleep(0.05)
    print("the last line")
    return cfg.code


job = Job("trial", TrialConfig, run, "Say things.")
if __name__ == "__main__":
    sys.exit(run_main(job.main))
'''
WIDE = """
import sys
from instella_ray.errors import run_main
from instella_ray.job import Job
from instella_ray.training.settings import TrainingRun


def run(cfg):
    print(f"began with {cfg.train.workers.count} workers")


job = Job("wide", TrainingRun, run, "Need workers.")
if __name__ == "__main__":
    sys.exit(run_main(job.main))
"""
TRAINING = [
    "jobs/wide.py",
    "--set",
    "train.run_dir=/r",
    "--set",
    "train.global_batch=6",
    "--set",
    "train.workers.count=6",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A working directory with two jobs of its own beside the package."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "instella_ray", folder / "instella_ray", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jobs").mkdir()
    (folder / "jobs" / "trial.py").write_text(TRIAL)
    (folder / "jobs" / "wide.py").write_text(WIDE)
    return str(folder)


@pytest.fixture
def trial(project: str, tmp_path: Path) -> list[str]:
    return ["--working-dir", project, "--", "python", "jobs/trial.py", "--set", f"notes={tmp_path}"]


@pytest.fixture
def wire(head: Head) -> Iterator[Wire]:
    wire = Wire(head.port)
    yield wire
    wire.close()


def packages(head: Head) -> list[str]:
    return [str(path) for path in head.folder.glob("t/session_*/runtime_resources/working_dir_files/*")]


def test_a_job_that_the_cluster_has_no_room_for_is_refused_before_anything_is_sent(head: Head, project: str) -> None:
    before = (packages(head), [job.submission_id for job in head.client.list_jobs()])
    code, output = head.run("--working-dir", project, "--", *TRAINING)
    expected = "error: jobs/wide.py: needs 6 CPUs, the cluster has 4 CPUs; --queue lets the job wait until the"
    assert code == 2 and output == f"{expected} cluster has scaled up\n"
    assert (packages(head), [job.submission_id for job in head.client.list_jobs()]) == before


@pytest.mark.parametrize(
    "env", [{"RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}], ids=["wrong", "none"]
)
def test_a_token_that_is_missing_or_wrong_is_refused_in_one_line(
    head: Head, trial: list[str], env: dict[str, str]
) -> None:
    code, output = head.run(*trial, **env)
    assert code == 2 and len(output.splitlines()) == 1
    assert output.startswith(f"error: {head.address}: the token is missing or wrong; expected RAY_AUTH_MODE=token")


def test_an_address_where_nothing_answers_is_named(head: Head, trial: list[str], wire: Wire) -> None:
    wire.close()
    code, output = head.run(*trial, address=wire.address)
    assert code == 2 and len(output.splitlines()) == 1
    assert output.startswith(f"error: {wire.address}: expected the dashboard of a running Ray cluster")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["jobs/trail.py"], "jobs/trail.py: the job is not among the files to pack"),
        (["jobs/trial.py", "--set", "code=1"], "key 'notes' is required"),
        (["jobs/trial.py", "--config", "a.yaml"], "a.yaml: cannot read the configuration"),
        (
            ["jobs/wide.py", "--set", "train.run_dir=r"],
            "train.run_dir=r: would be written to Ray's copy of the working",
        ),
        (["echo", "hello"], "expected a job after --, such as jobs/curate.py --config FILE, got echo hello"),
    ],
)
def test_a_job_that_would_be_refused_there_is_refused_here(
    head: Head, project: str, words: list[str], expected: str
) -> None:
    code, output = head.run("--working-dir", project, "--", *words)
    assert code == 2 and output.startswith("error: ") and expected in output and len(output.splitlines()) == 1


def test_a_dry_run_says_what_would_be_packed_needed_and_run_and_sends_nothing(head: Head, trial: list[str]) -> None:
    before = len(head.client.list_jobs())
    code, output = head.run("--dry-run", *trial)
    assert code == 0 and len(head.client.list_jobs()) == before
    assert re.search(r"^packs \d+ files, \d\.\d MiB; the largest: instella_ray/", output)
    assert "\nruns  python jobs/trial.py --set notes=" in output
    assert f"\nneeds 0 GPUs and 1 CPU\nhas   0 GPUs and 4 CPUs on 1 nodes, {head.address}\n" in output


@pytest.mark.nightly
def test_a_lost_connection_repeats_no_line_and_the_jobs_own_exit_code_is_passed_on(
    head: Head, trial: list[str], wire: Wire, tmp_path: Path
) -> None:
    order = head.submit("--name", "mine", *trial, "--set", "hold=true", "--set", "code=3", address=wire.address)
    assert wait_until(lambda: "line 49" in order.output, 180), order.output
    assert wire.cut() > 0
    (tmp_path / "release").touch()
    assert order.wait() == 3
    lines = order.output.splitlines()
    assert [line for line in lines if line.startswith("line ")] == [f"line {number}" for number in range(50)]
    assert lines.count("the last line") == 1
    assert lines[-1] == f"{order.job}: FAILED, Job entrypoint command failed with exit code 3"
    assert re.fullmatch(r"mine-\d{8}-\d{6}-[0-9a-f]{6}", order.job)
    (own,) = [line for line in lines if line.startswith(f"run {order.job} of ")]
    assert "working_dir_files" in own  # the package that was packed, not one that was there
    assert head.client.get_job_info(order.job).metadata == {"run_id": order.job}


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(head: Head, trial: list[str], tmp_path: Path) -> None:
    order = head.submit(*trial, "--set", "hold=true")
    assert wait_until(lambda: "line 49" in order.output, 180), order.output
    order.interrupt()
    assert order.wait() == 130
    assert order.output.endswith(
        f"\n{order.job} continues to run\nfollow it: ray job logs --address {head.address} --follow {order.job}\n"
        f"stop it:   ray job stop --address {head.address} {order.job}\n"
    )
    assert head.client.get_job_status(order.job) == "RUNNING"
    (tmp_path / "release").touch()
    assert wait_until(lambda: head.client.get_job_status(order.job) == "SUCCEEDED", 60)


@pytest.mark.nightly
def test_rays_own_command_submits_it_too(head: Head, trial: list[str]) -> None:
    """Without the checks beforehand: the same script on the same working directory, by ``ray job submit``."""
    command = [*RAY, "job", "submit", "--address", head.address, *trial, "--set", "code=3"]
    done = subprocess.run(command, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "the last line" in done.stdout and done.returncode != 0
    # Of a job that ends at once, Ray may follow no more than the last lines.
    job = re.search(r"raysubmit_\w+", done.stdout)
    assert job and re.search(
        r"^run trial-\d{8}-\d{6}-[0-9a-f]{6} of .*working_dir_files", head.client.get_job_logs(job[0]), re.MULTILINE
    )


@pytest.mark.nightly
def test_a_job_may_wait_for_a_cluster_that_grows(head: Head, project: str) -> None:
    order = head.submit("--queue", "--working-dir", project, "--", *TRAINING)
    assert wait_until(lambda: "waiting for 6 CPUs" in order.output, 180), order.output
    nodes: list[subprocess.Popen[Any]] = []

    def ended() -> bool:
        # On a busy machine a node may give up before it has begun.
        if not nodes or nodes[-1].poll() is not None:
            nodes.append(head.join(cpus=2))
        return order.ended

    try:
        assert wait_until(ended, 300), order.output
        assert order.wait() == 0, order.output
        assert "began with 6 workers" in order.output
    finally:
        for node in nodes:
            end(node)
