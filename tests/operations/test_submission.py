"""``jobs/submit.py`` without a cluster: what it shows beforehand, and what it says when it is stopped while it sends."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from instella_ray.errors import UserError
from instella_ray.operations import submission

from ..kit.project import ROOT, job

CURATE = ["--working-dir", str(ROOT), "--", "jobs/curate.py", "--set", "input=gs://b/*.tar", "--set", "output=gs://b/c"]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_dry_run_without_an_address_asks_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert job("submit")(["--dry-run", *CURATE]) == 0
    packs, runs, needs, has = capsys.readouterr().out.splitlines()
    assert re.match(r"packs \d+ files, \d\.\d MiB; the largest: ", packs)
    assert runs == "runs  python jobs/curate.py --set 'input=gs://b/*.tar' --set output=gs://b/c"
    assert re.fullmatch(r"needs 0 GPUs and \d+ CPUs?", needs)
    assert has == "has   unknown: no cluster was asked, as no --address names one"


def test_a_command_is_submitted_like_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From any folder, with a recipe that comes with the package; the configuration is checked before anything is sent."""
    curate = ["curate", "--config", "data/curate", "--set", "input=/a", "--set", "output=/b"]
    for words in (curate, ["instella-ray", *curate]):
        assert job("submit")(["--dry-run", "--working-dir", str(tmp_path), "--", *words]) == 0
        assert "\nruns  python -m instella_ray curate --config data/curate --set input=/a" in capsys.readouterr().out
    with pytest.raises(UserError, match="--set inptu=a: unknown key 'inptu', did you mean 'input'"):
        job("submit")(["--dry-run", "--working-dir", str(tmp_path), "--", "curate", "--set", "inptu=a"])
    with pytest.raises(UserError, match=r"expected a job after --, such as .*, got plan x\.yaml"):
        job("submit")(["--dry-run", "--working-dir", str(tmp_path), "--", "plan", "x.yaml"])


def test_a_script_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("if __name__ == '__main__':\n    raise SystemExit('run')")
    with pytest.raises(UserError, match=r"a.py: expected a job, with a line job = Job\(...\) of instella_ray.job"):
        job("submit")(["--dry-run", "--working-dir", str(tmp_path), "--", "a.py"])


def test_a_local_output_of_a_cluster_with_several_nodes_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = SimpleNamespace(address="http://head:8265", nodes=lambda: [{"CPU": 64.0}] * 2)  # several machines
    monkeypatch.setattr(submission, "ClusterClient", lambda address: cluster)
    curate = [
        "--dry-run",
        "--address",
        cluster.address,
        "--working-dir",
        str(ROOT),
        "--",
        "curate",
        "--set",
        "input=gs://b/*.tar",
    ]
    assert job("submit")([*curate, "--set", "output=/mnt/curated"]) == 0
    assert capsys.readouterr().out.endswith("\nnote: output=/mnt/curated: expected on storage that all nodes share\n")
    assert job("submit")([*curate, "--set", "output=gs://b/c"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_ctrl_c_while_a_job_is_sent_says_how_to_follow_and_stop_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # No moment of a real upload can be met for certain.
    cluster = SimpleNamespace(address="http://head:8265", nodes=lambda: [{"CPU": 64.0}])
    monkeypatch.setattr(submission, "ClusterClient", lambda address: cluster)
    monkeypatch.setattr(submission, "_send", interrupted)
    assert job("submit")(["--name", "mine", *CURATE]) == 130
    first, follow, stop = capsys.readouterr().out.strip().splitlines()
    assert first.endswith(" may have reached the cluster")
    name = first.split()[0]
    assert re.fullmatch(r"mine-\d{8}-\d{6}-[0-9a-f]{6}", name)
    assert follow == f"follow it: ray job logs --address http://head:8265 --follow {name}"
    assert stop == f"stop it:   ray job stop --address http://head:8265 {name}"
