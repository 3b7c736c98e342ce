"""``jobs/submit.py`` without a cluster: what it shows beforehand, and what it says when it is stopped while it sends."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from instella_ray.operations import submission

from ..kit.project import ROOT, job

CURATE = ["--working-dir", str(ROOT), "--", "jobs/curate.py", "--set", "input=shards/*.tar", "--set", "output=curated"]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_dry_run_without_an_address_asks_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert job("submit")(["--dry-run", *CURATE]) == 0
    packs, runs, needs, has = capsys.readouterr().out.splitlines()
    assert re.match(r"packs \d+ files, \d\.\d MiB; the largest: ", packs)
    assert runs == "runs  python jobs/curate.py --set 'input=shards/*.tar' --set output=curated"
    assert re.fullmatch(r"needs 0 GPUs and \d+ CPUs?", needs)
    assert has == "has   unknown: no cluster was asked, as no --address names one"


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
