"""``cluster/vm``: files for ``ray up``, checked as it checks them before it starts anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from instella_ray.operations.checks import DRIVERS

from ..kit.project import ROOT

FILES = sorted((ROOT / "cluster" / "vm").glob("*.yaml"))
NODE_TYPES = "available_node_types"


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return data


@pytest.fixture(autouse=True)
def _a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray looks for the files to mount, and a local cluster's state lies in the temporary folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_the_file(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_any_misspelt_key_is_refused(path: Path) -> None:
    sections = [(), ("auth",), ("docker",), *((NODE_TYPES, n) for n in load(path).get(NODE_TYPES, {}))]
    for section in sections:
        for key in within(load(path), section):
            data = load(path)
            place = within(data, section)
            place[key + "s"] = place.pop(key)
            with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, AssertionError)):
                validate_config(prepare_config(data))
                pytest.fail(f"{section} {key} may be misspelt")


def within(data: dict[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    for name in section:
        data = data[name]
    return data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_provider_has_its_keys_and_no_other(path: Path) -> None:
    """Ray leaves this section open, because providers may be anybody's."""
    provider = load(path)["provider"]
    keys = {"gcp": {"region", "availability_zone", "project_id"}, "local": {"head_ip", "worker_ips"}}
    assert set(provider) == {"type"} | keys[provider["type"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_cluster_asks_for_a_token_and_its_dashboard_listens_on_loopback(path: Path) -> None:
    data = load(path)
    assert "--env RAY_AUTH_MODE=token" in data["docker"]["run_options"]
    assert data["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    (start,) = [command for command in data["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_machines_on_google_cloud_have_a_driver_for_the_pinned_torch() -> None:
    """The image family names its driver; CUDA itself comes with the container."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for node_type in load(ROOT / "cluster" / "vm" / "gcp.yaml")[NODE_TYPES].values():
        (disk,) = node_type["node_config"]["disks"]
        driver = int(disk["initializeParams"]["sourceImage"].rpartition("-nvidia-")[2])
        assert driver >= DRIVERS[int(pins["cuda-toolkit"].split(".")[0])]


def test_mi300x_machines_give_their_devices_to_the_container() -> None:
    options = load(ROOT / "cluster" / "vm" / "onprem-mi300x.yaml")["docker"]["run_options"]
    assert {"--device=/dev/kfd", "--device=/dev/dri", "--group-add=video", "--group-add=render"} <= set(options)
