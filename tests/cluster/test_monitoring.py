"""``cluster/monitoring``: rules and panels ask for series that exist, in queries that are well-formed."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ..kit.kubernetes import build
from ..kit.manifests import check_object
from ..kit.overlays import clusters
from ..kit.project import PACKAGE, ROOT, texts

pytestmark = pytest.mark.process  # kubectl builds what they look at

FOLDER = ROOT / "cluster" / "monitoring"
WORDS = re.compile(
    r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)"  # labels
    r"|\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b\d[\w.]*"  # matchers, ranges, texts, numbers
)
FUNCTIONS = {
    *("sum", "avg", "min", "max", "count", "rate", "increase", "changes", "histogram_quantile"),
    *("avg_over_time", "max_over_time", "count_over_time", "last_over_time", "label_values", "absent"),
}
OPERATORS = {"and", "or", "unless", "offset"}
OF_OTHERS = {"up", "kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
"""Series of Prometheus itself and of Kubernetes."""


def objects() -> dict[str, dict[str, Any]]:
    return {target["kind"]: target for target in build(FOLDER)}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in objects()["PrometheusRule"]["spec"]["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def recorded() -> set[str]:
    """Words of the names that rules record."""
    return {word for rule in rules() if "record" in rule for word in rule["record"].split(":")}


def queries() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    variables = [v["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    return [*panels, *variables, *(rule["expr"] for rule in rules())]


@cache
def series() -> frozenset[str]:
    """What may be asked for: the series of Ray's own dashboards, and those that this package makes."""
    found: set[str] = set()
    spec = importlib.util.find_spec("ray.dashboard.modules.metrics.dashboards")
    assert spec and spec.submodule_search_locations
    for path in Path(spec.submodule_search_locations[0]).glob("*_panels.py"):
        found |= set(re.findall(r"\bray_[a-z0-9_]+", path.read_text()))
    made = re.compile(r"\b(Counter|Gauge|Histogram)\(\s*\"(instella_\w+)\"")
    suffixes = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
    for path in PACKAGE.rglob("*.py"):
        for kind, name in made.findall(path.read_text()):
            found |= {f"ray_{name}{suffix}" for suffix in suffixes[kind]}
    from instella_ray.training.loggers import GAUGES

    return frozenset(found | {f"ray_instella_training_{name}" for name in (*GAUGES, "step", "finite", "running")})


def names_in(query: str) -> set[str]:
    """Every word of a query that is neither a label nor a number."""
    return set(re.findall(r"[a-z_][a-z0-9_]*", WORDS.sub(" ", query)))


def problems(query: str) -> list[str]:
    known = FUNCTIONS | OPERATORS | OF_OTHERS | series() | recorded() | {"run", "namespace", "ray_io_cluster"}
    found = [f"unknown: {name}" for name in sorted(names_in(query) - known)]
    opened: list[str] = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for sign in re.sub(r"\"[^\"]*\"", "", query):
        if sign in pairs.values():
            opened.append(sign)
        elif sign in pairs and (not opened or opened.pop() != pairs[sign]):
            found.append(f"{sign} closes nothing")
    found += [f"{sign} is not closed" for sign in opened]
    for name, rest in re.findall(r"\b(\w+)\s*\(([^()]*)\)", query):
        if name in ("rate", "increase", "changes") or name.endswith("_over_time"):
            found += [] if re.search(r"\[\d+[smhd]\]$", rest) else [f"{name} needs a range"]
        if name == "rate" and not re.match(r"ray_\w+(_total|_bucket|_sum|_count|_bytes|_rows|_s)\b", rest):
            found.append(f"rate({rest}): of what only grows")
    found += ["two operators"] if re.search(r"[-+*/<>]\s*[*/<>]|[=<>]\s*$", query) else []
    return found


def test_every_query_is_well_formed_and_asks_for_series_that_exist() -> None:
    assert {query: found for query in queries() if (found := problems(query))} == {}


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum(ray_serve_deployment_queued_querys)", "unknown: ray_serve_deployment_queued_querys"),
        ("ray_instella_training_steps == 0", "unknown: ray_instella_training_steps"),
        ("ray_instella_images > 1", "unknown: ray_instella_images"),  # a counter ends with _total
        ("sum(rate(ray_instella_images_total[5m])", "( is not closed"),
        ("rate(ray_instella_images_total)", "rate needs a range"),
        ("rate(ray_instella_slots[5m])", "rate(ray_instella_slots[5m]): of what only grows"),
        ("summ(ray_instella_slots)", "unknown: summ"),
    ],
)
def test_a_slip_in_a_query_is_found(query: str, problem: str) -> None:
    assert problem in problems(query)


def test_the_objects_are_valid_and_scrape_ports_that_pods_have() -> None:
    for target in objects().values():
        check_object(target)
    monitor = objects()["PodMonitor"]["spec"]
    groups = [clusters("mi300x")["development"]["headGroupSpec"]]
    groups += clusters("mi300x")["development"]["workerGroupSpecs"]
    ports = {port["name"] for g in groups for port in g["template"]["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports
    for group in groups:
        assert monitor["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


def test_every_subject_of_the_house_has_its_alerts() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    assert {group["name"] for group in objects()["PrometheusRule"]["spec"]["groups"]} == {
        *("training", "data", "serving", "slo", "machines", "targets")
    }
    whole = {"VolumeNearlyFull": "persistentvolumeclaim", "DiskNearlyFull": "instance", "TargetDown": "instance"}
    whole |= dict.fromkeys(("EndpointFails", "ErrorBudgetSpent", "EndpointSlow", "LatencyBudgetSpent"), "application")
    for rule in alerts():
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = re.search(r"by \(([^)]*)\)", rule["expr"])
        if grouped:
            assert used <= set(re.split(r",\s*", grouped[1])), rule["alert"]
        else:
            assert used <= {whole.get(rule["alert"], "run")}, rule["alert"]


def test_every_alert_has_its_section_in_the_runbook() -> None:
    page, _, _ = alerts()[0]["annotations"]["runbook_url"].partition("#")
    titles = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.M)
    assert [rule["annotations"]["runbook_url"] for rule in alerts()] == [
        f"{page}#{rule['alert'].lower()}" for rule in alerts()
    ]
    assert titles == [rule["alert"] for rule in alerts()]


def test_the_dashboard_is_one_that_grafana_draws() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & places, panel["title"]
        places |= covered
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}" and panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert references and len(set(references)) == len(references)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables
    # One cluster, or all: every series is chosen by both.
    chosen = '{namespace=~"$namespace", ray_io_cluster=~"$cluster"'
    for panel in panels:
        for target in panel.get("targets", []):
            assert target["expr"].count(chosen) == len(
                re.findall(r"\b(?:ray_[a-z]+_\w+|instella:\S+?)\{", target["expr"])
            )
            assert chosen in target["expr"]
    assert {panel["title"] for panel in panels if panel["type"] == "row"} == {"Training", "Data", "Serving", "Machines"}


def test_series_of_this_package_are_shown_somewhere() -> None:
    """A metric that nobody looks at is one that nobody misses."""
    shown = set().union(*map(names_in, queries()))
    ours = {name.removesuffix("_sum").removesuffix("_count") for name in series() if "_instella_" in name}
    unseen = {name for name in ours if name not in shown and f"{name}_bucket" not in shown}
    assert unseen == {"ray_instella_steps_total", "ray_instella_training_flops_per_second"}
    assert "dashboard.json" in {Path(path).name for path, _ in texts()}
