"""``cluster/helm``: the chart is what the overlays build, and is written anew when they change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..kit.kubernetes import KubernetesError, Object, load_documents, program, run
from ..kit.overlays import applied, created
from ..kit.project import ROOT

pytestmark = pytest.mark.process  # kubectl builds what they look at

CHART = ROOT / "cluster" / "helm" / "instella-ray"
MAKES = {"amd": "mi300x", "nvidia": "nvidia"}


def rendered(*flags: str) -> list[Object]:
    return load_documents(run("helm", "template", "instella-ray", CHART, "--namespace", "instella-ray", *flags))


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(target["kind"], target["metadata"]["name"]): target for target in objects}


def test_the_chart_is_current(tmp_path: Path) -> None:
    """A change of ``cluster/kuberay`` asks for ``make chart``."""
    path = f"{Path(program('kubectl')).parent}:{os.environ['PATH']}"
    command = [sys.executable, str(ROOT / "cluster" / "helm" / "generate.py"), str(tmp_path / "chart")]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    made, kept = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "chart", CHART)
    )
    assert made == kept


def test_helm_finds_nothing_wrong_with_it() -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in run("helm", "lint", "--strict", CHART)


@pytest.mark.parametrize("make", MAKES)
def test_a_release_is_what_the_overlay_applies(make: str) -> None:
    expected = by_name(applied(MAKES[make]))
    del expected["Namespace", "instella-ray"]  # Helm's own affair
    assert by_name(rendered("--set", f"accelerator={make}")) == expected


@pytest.mark.parametrize("make", MAKES)
def test_a_stage_is_what_the_overlay_creates_and_no_part_of_a_release(make: str) -> None:
    release = by_name(rendered("--set", f"accelerator={make}"))
    jobs = by_name(created(MAKES[make]))
    for kind, name in jobs:
        one = rendered(
            *("--set", f"accelerator={make}", "--set", f"job={name}"),
            *("--show-only", f"templates/jobs/rayjob-{name}.yaml"),
        )
        assert one == [jobs[kind, name]] and (kind, name) not in release


def test_without_the_endpoint_nothing_waits_for_models() -> None:
    left = by_name(rendered("--set", "endpoint=false"))
    assert not [name for name in left if name[1] == "endpoint"] and ("RayCluster", "development") in left


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("acelerator=amd", "additional properties 'acelerator' not allowed"),
        ("accelerator=intel", "must be one of 'amd', 'nvidia'"),
        ("job=curat", "must be one of 'none', 'curate'"),
        ("gpus=many", "got string, want integer"),
    ],
)
def test_a_slip_in_a_value_is_refused(flag: str, message: str) -> None:
    with pytest.raises(KubernetesError, match=message):
        rendered("--set", flag)
