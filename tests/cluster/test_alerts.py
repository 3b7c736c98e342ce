"""The rules of ``cluster/monitoring`` in Prometheus's own evaluation: each alert fires when it should, and not before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ..kit.kubernetes import KubernetesError, build, run
from ..kit.project import ROOT

pytestmark = pytest.mark.process

RUN, APP, WHERE = 'run="a"', 'application="endpoint"', 'namespace="instella-ray", ray_io_cluster="serve"'
HOUR, DAY = 60, 24 * 60
"""In minutes, which is the step of the series if a case says nothing else."""


class Case(NamedTuple):
    """Series that make an alert fire at ``minute``, and such that must not, in promtool's notation."""

    firing: dict[str, str]
    silent: dict[str, str]
    minute: int
    step: int = 1


def ratio(bad: float, minutes: int) -> dict[str, str]:
    """Requests of an endpoint, a hundred a minute, of which so many fail."""
    all_, failed = f"ray_serve_num_http_requests_total{{{APP}, {WHERE}}}", "ray_serve_num_http_error_requests_total"
    return {all_: f"0+100x{minutes}", f'{failed}{{error_code="503", {APP}, {WHERE}}}': f"0+{100 * bad}x{minutes}"}


def slow(share: float, minutes: int) -> dict[str, str]:
    """Answered requests, a hundred a minute, of which so many take more than ten seconds."""
    name = "ray_instella_request_seconds"
    return {
        f"{name}_count{{{APP}, {WHERE}}}": f"0+100x{minutes}",
        f'{name}_bucket{{le="10.0", {APP}, {WHERE}}}': f"0+{100 * (1 - share)}x{minutes}",
    }


def level(series: str, high: float, low: float, minutes: int, minute: int, **others: str) -> Case:
    """A series that stays at ``high``, and one that stays at ``low``, beside ``others``."""
    return Case({series: f"{high}x{minutes}", **others}, {series: f"{low}x{minutes}", **others}, minute)


RUNNING, STEP = f"ray_instella_training_running{{{RUN}}}", f"ray_instella_training_step{{{RUN}}}"
STATE = 'ray_train_controller_state{ray_train_run_id="a", ray_train_controller_state="ERRORED"}'
ROWS, TASKS = 'ray_data_output_rows{dataset="a"}', 'ray_data_num_tasks_running{dataset="a"}'
FAILED, FINISHED = 'ray_data_num_tasks_failed{dataset="a"}', 'ray_data_num_tasks_finished{dataset="a"}'
TURNED = f'ray_instella_requests_total{{code="overloaded", {APP}, {WHERE}}}'
LIMITED = f'ray_instella_requests_total{{code="rate_limit_exceeded", {APP}, {WHERE}}}'
ANSWERED = f'ray_instella_requests_total{{code="", {APP}, {WHERE}}}'
REPLICA = f'ray_serve_deployment_replica_healthy{{deployment="Decoder", {APP}, {WHERE}}}'
WAITING, SLOTS = f"ray_instella_waiting_rows{{{WHERE}}}", f"ray_instella_slots{{{WHERE}}}"
FREE, CLAIM = (
    f'kubelet_volume_stats_{what}_bytes{{namespace="instella-ray", persistentvolumeclaim="runs"}}'
    for what in ("available", "capacity")
)
USED, LEFT = 'ray_node_disk_usage{instance="a"}', 'ray_node_disk_free{instance="a"}'
UP = 'up{job="monitoring/instella-ray", instance="a"}'

CASES = {
    "TrainingStalled": Case({STEP: "7x90", RUNNING: "1x90"}, {STEP: "0+1x90", RUNNING: "1x90"}, 60),
    "TrainingNotFinite": level(f"ray_instella_training_finite{{{RUN}}}", 0, 1, 20, 10),
    "TrainingWaitsForData": level(f"ray_instella_training_data_wait{{{RUN}}}", 0.2, 0.05, 120, 90),
    "TrainingRestartsOften": Case(
        {f'ray_instella_training_step{{{RUN}, worker="{n}"}}': "0+1x90" for n in range(4)},
        {f'ray_instella_training_step{{{RUN}, worker="{n}"}}': "0+1x90" for n in range(3)},
        30,
    ),
    "TrainingFailed": level(STATE, 1, 0, 20, 10),
    "CheckpointStale": level(
        f"ray_instella_training_checkpoint_age_seconds{{{RUN}}}", 8000, 7000, 40, 20, **{RUNNING: "1x40"}
    ),
    "DataStopped": Case({ROWS: "5x90", TASKS: "2x90"}, {ROWS: "0+5x90", TASKS: "2x90"}, 60),
    "DataTasksFail": level(FAILED, 10, 2, 40, 20, **{FINISHED: "100x40"}),
    "ObjectStoreSpills": Case(
        {'ray_data_spilled_bytes{SessionName="a"}': "0+12000000000x90"},
        {'ray_data_spilled_bytes{SessionName="a"}': "0+1000000000x90"},
        60,
    ),
    "EndpointTurnsAway": Case(
        {TURNED: "0+10x60", ANSWERED: "0+100x60"},
        {TURNED: "0+1x60", LIMITED: "0+50x60", ANSWERED: "0+100x60"},  # a key at its own limit pages nobody
        30,
    ),
    "ReplicaUnhealthy": level(REPLICA, 0, 1, 30, 20),
    "ImagesWait": level(WAITING, 9, 8, 30, 20, **{SLOTS: "8x30"}),
    "CallsQueue": level(
        f'ray_serve_deployment_queued_queries{{deployment="Decoder", {APP}, {WHERE}}}', 101, 100, 30, 20
    ),
    "EndpointFails": Case(ratio(0.08, 2 * HOUR), ratio(0.01, 2 * HOUR), 90),
    "ErrorBudgetSpent": Case(ratio(0.006, 200), ratio(0.004, 200), 3 * DAY + 2 * HOUR, 30),
    "EndpointSlow": Case(slow(0.16, 2 * HOUR), slow(0.02, 2 * HOUR), 90),
    "LatencyBudgetSpent": Case(slow(0.012, 200), slow(0.008, 200), 3 * DAY + 2 * HOUR, 30),
    "MemoryNearlyFull": level("ray_node_mem_used", 94, 90, 20, 10, ray_node_mem_total="100x20"),
    "GpuIdle": level('ray_node_gpus_utilization{SessionName="a"}', 1, 50, 2 * HOUR, 90),
    "VolumeNearlyFull": level(FREE, 9, 11, 30, 20, **{CLAIM: "100x30"}),
    "DiskNearlyFull": level(USED, 95, 60, 30, 20, **{LEFT: "8x30"}),
    "TargetDown": level(UP, 0, 1, 20, 10),
    "TargetsAbsent": Case({}, {UP: "0x60"}, 30),
    "EndpointAbsent": Case({REPLICA: "1x29 stale"}, {REPLICA: "1x120"}, 80),
}
EXTRA = {
    # Six times the rate pages in the windows of six hours and half an hour, where the short ones do not.
    "EndpointFails": Case(ratio(0.035, 8 * HOUR), ratio(0.029, 8 * HOUR), 7 * HOUR),
    # An outage that is over pages no more, though the last hour still holds it.
    "EndpointSlow": Case(
        slow(0.5, 2 * HOUR),
        {
            name: f"{text} {last}"
            for (name, text), last in zip(slow(0.5, 30).items(), ("3100+100x60", "1600+100x60"), strict=True)
        },
        70,
    ),
}


def rules() -> dict[str, Any]:
    (found,) = [
        target["spec"] for target in build(ROOT / "cluster" / "monitoring") if target["kind"] == "PrometheusRule"
    ]
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump(rules()))
    return file


def test_prometheus_takes_the_rules(rule_file: Path) -> None:
    run("promtool", "check", "rules", "--lint-fatal", rule_file)


def test_prometheus_refuses_a_slip(tmp_path: Path) -> None:
    rule = {"alert": "A", "expr": "sum(rate(a[5m])"}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": [rule]}]}))
    with pytest.raises(KubernetesError, match="unclosed left parenthesis"):
        run("promtool", "check", "rules", tmp_path / "rules.yaml")


def test_prometheus_takes_the_queries_of_the_dashboard(rule_file: Path, tmp_path: Path) -> None:
    board = json.loads((ROOT / "cluster" / "monitoring" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run("promtool", "check", "rules", file)


def test_every_alert_has_a_case() -> None:
    assert [rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule] == list(CASES)


@pytest.mark.parametrize(
    ("alert", "case"), [*CASES.items(), *EXTRA.items()], ids=[*CASES, *(f"{name}-windows" for name in EXTRA)]
)
def test_an_alert_fires_when_it_should(alert: str, case: Case, rule_file: Path, tmp_path: Path) -> None:
    def check(series: dict[str, str], count: int) -> dict[str, Any]:
        query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
        expected = [{"labels": "{}", "value": count}] if count else []
        return {
            "interval": f"{case.step}m",
            "input_series": [{"series": name, "values": _values(text)} for name, text in series.items()],
            "promql_expr_test": [{"expr": query, "eval_time": f"{case.minute}m", "exp_samples": expected}],
        }

    tests = {"rule_files": [str(rule_file)], "evaluation_interval": f"{case.step}m"}
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({**tests, "tests": [check(case.firing, 1), check(case.silent, 0)]}))
    run("promtool", "test", "rules", file)


def _values(text: str) -> str:
    """A level as promtool writes it: ``7x90`` is a series of 7."""
    return " ".join(
        part if re.search(r"\d[+-]|^_|stale", part) else re.sub(r"^([\d.]+)x", r"\1+0x", part) for part in text.split()
    )
