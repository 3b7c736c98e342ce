"""The doctor: every check finds what it is for, and says what to do; a machine in order has none of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from instella_ray import cli, storage
from instella_ray.errors import UserError
from instella_ray.operations.checks import GIB, Finding, check_machine
from instella_ray.operations.doctor import (
    check_encoder,
    check_store,
    cluster_facts,
    encoder_names,
    examine,
    model_names,
    report,
)
from instella_ray.operations.facts import MachineFacts, _amd_gpus, _nvidia_driver, gather

from ..kit.models import TEXT, make_tokenizer

WELL = MachineFacts(
    host="a",
    python="3.12.1",
    requires_python=">=3.11",
    requirements=("ray[train]<2.62,>=2.60", "torch>=2.9", "gguf>=0.18; extra == 'gguf'", "timm; extra == 'eval'"),
    versions={"ray": "2.60.0", "torch": "2.10.0+cu128", "timm": "1.0"},
    memory=64 * GIB,
    memory_free=50 * GIB,
    shm=32 * GIB,
    temp_dir="/tmp",
    disk=500 * GIB,
    disk_free=300 * GIB,
    open_files=65_536,
    torch_build="cuda 12.8",
    nvidia=1,
    nvidia_driver="570.86.15",
    devices=(("NVIDIA H100", 80 * GIB),),
    environment={"RAY_AUTH_MODE": "token"},
    token=True,
)
AMD: dict[str, Any] = {"torch_build": "rocm 7.0", "nvidia": 0, "nvidia_driver": None, "amd": 8}
ROCM_ENV = {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}


def wrong(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(each.name, each.level) for each in findings if each.level != "ok"]


def test_a_machine_in_order_has_no_findings_but_what_it_is() -> None:
    found = check_machine(WELL)
    assert wrong(found) == [] and not any(each.advice for each in found)
    shown = report(found)
    for words in (
        "ray 2.60.0",
        "cuda 12.8",
        "NVIDIA H100 80 GiB",
        "eval; not installed: gguf",
        "50.0 GiB of 64.0 GiB free",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("change", "name", "level", "words"),
    [
        ({"python": "3.10.4"}, "python", "problem", "use one >=3.11"),
        ({"requirements": ()}, "packages", "warning", "pip install -e ."),
        ({"versions": {"torch": "2.10"}}, "packages", "problem", "ray is not installed"),
        ({"versions": {"ray": "2.59.0", "torch": "2.10"}}, "packages", "problem", "pip install 'ray[train]<2.62,>=2.60'"),
        ({"requirements": ("a", "b; extra == 'x'", "ray; extra == 'x'"), "versions": {"a": "1", "ray": "2"}}, "extras",
         "warning", "x without b"),
        ({"torch_build": "cpu", "devices": ()}, "accelerators", "problem", "PyTorch's build for CUDA"),
        ({**AMD, "torch_build": "cuda 12.8", "devices": ()}, "accelerators", "problem", "PyTorch's build for ROCm"),
        ({"devices": (), "device_error": "no device"}, "accelerators", "problem", "sees none: no device"),
        ({"nvidia_driver": "470.57.02"}, "accelerators", "problem", "driver 525 or newer"),
        ({"environment": {"ROCR_VISIBLE_DEVICES": "0"}}, "visible devices", "problem", "Ray does not start"),
        ({**AMD, "environment": ROCM_ENV}, "visible devices", "warning", "HIP ignores it"),
        ({"environment": {"RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1"}}, "visible devices", "warning", "first GPU"),
        ({"shm": 64 << 20}, "shared memory", "warning", "--shm-size"),
        ({"memory_free": GIB}, "memory", "problem", "95 %"),
        ({"memory": 8 * GIB, "memory_free": 3 * GIB // 2}, "memory", "warning", "stop other processes"),
        ({"disk_free": 20 * GIB}, "disk", "problem", "RAY_TMPDIR"),
        ({"disk": 20 * GIB, "disk_free": 8 * GIB}, "disk", "warning", "larger disk"),
        ({"open_files": 1024}, "open files", "problem", "ulimit -n 65536"),
        ({"open_files": 8192}, "open files", "warning", "ulimit -n 65536"),
        ({"environment": {"RAY_AUTH_MODE": "disabled"}}, "authentication", "warning", "they could run code"),
        ({"token": False}, "authentication", "problem", "get-auth-token --generate"),
    ],
)  # fmt: skip
def test_each_check_finds_what_it_is_for(change: dict[str, Any], name: str, level: str, words: str) -> None:
    found = check_machine(replace(WELL, **change))
    assert wrong(found) == [(name, level)]
    (finding,) = [each for each in found if each.level != "ok"]
    assert finding.advice and words in f"{finding.found} {finding.advice}"


def test_an_amd_node_in_order_is_in_order() -> None:
    assert wrong(check_machine(replace(WELL, **AMD, devices=(("AMD Instinct MI300X", 192 * GIB),) * 8))) == []


def test_drivers_are_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module  570.86.15  Release Build\nGCC\n")
    assert _nvidia_driver(tmp_path / "version") == "570.86.15" and _nvidia_driver(tmp_path / "none") is None
    for number, units in enumerate((0, 912, 912)):
        (tmp_path / "nodes" / str(number)).mkdir(parents=True)
        (tmp_path / "nodes" / str(number) / "properties").write_text(f"cpu_cores_count 8\nsimd_count {units}\n")
    assert _amd_gpus(tmp_path / "nodes") == 2 and _amd_gpus(tmp_path / "none") == 0


def test_this_machine_has_facts() -> None:
    facts = gather()
    assert facts.memory >= facts.memory_free > 0 and facts.disk >= facts.disk_free and facts.open_files > 0
    assert "RAY_AUTH_TOKEN" not in facts.environment and facts.environment["RAY_AUTH_MODE"] == "disabled"
    assert {each.name for each in check_machine(facts)} >= {"python", "memory", "disk", "open files", "authentication"}


def test_a_store_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert check_store(str(tmp_path)).level == "ok" and list(tmp_path.iterdir()) == []
    assert check_store(str(tmp_path / "new" / "and" / "deep")).level == "ok" and list(tmp_path.iterdir()) == []
    before = (*MemoryFileSystem.pseudo_dirs, *MemoryFileSystem.store)
    assert check_store("memory://doctor/runs").level == "ok"
    assert (*MemoryFileSystem.pseudo_dirs, *MemoryFileSystem.store) == before
    (tmp_path / "file").write_text("")
    found = check_store(str(tmp_path / "file"))
    assert found.level == "problem" and "cannot write" in found.found and "credentials" in found.advice
    assert "no-such-protocol" in check_store("no-such-protocol://x").found


def test_a_store_that_cannot_list_or_delete_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "glob", lambda pattern: [])
    assert "cannot list" in check_store(str(tmp_path / "new")).found and list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    def refuse(self: object, path: str) -> None:
        raise PermissionError("no right to delete")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.rm_file", refuse)
    assert "cannot delete (PermissionError: no right to delete)" in check_store(str(tmp_path)).found


def test_models_that_a_configuration_names_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(tmp_path / "bit")
    (tmp_path / "serve.yaml").write_text(
        f"app:\n  tokenizer: {tmp_path}/bit\n  models: {{ar: {{path: {tmp_path}/nowhere}}}}\n"
        f"text_encoder: {{name: '{TEXT['name']}'}}\n"
    )
    findings = examine(configs=[str(tmp_path / "serve.yaml")])
    weights, text = ([each for each in findings if each.name == name] for name in ("weights", "text encoder"))
    assert [each.level for each in weights] == ["ok", "problem"] and "BIT" in weights[0].found
    assert "not a model folder" in weights[1].found and "app.models.ar.path" in weights[1].found
    assert [each.level for each in text] == ["ok"]
    (tmp_path / "bit" / "model.safetensors").write_bytes(b"half")
    assert cli.main(["doctor", "--models", str(tmp_path / "bit"), "--json"]) == 1
    assert "not a complete safetensors file" in json.loads(capsys.readouterr().out)[-1]["found"]


def test_names_are_found_where_configurations_have_them() -> None:
    config = {"sample": {"model": "m", "prompts": "p"}, "model": "captioner", "start_from": None, "codes": "c"}
    assert list(model_names(config)) == [("sample.model", "m")]
    assert list(encoder_names({"x": {"text_encoder": {"name": "n"}}})) == ["n"]
    assert "hf download no/such-model" in check_encoder("no/such-model", "a.yaml").advice
    assert check_encoder("package:no_such_package/x", "a.yaml").level == "problem"


def test_a_cluster_that_does_not_answer_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"--address auto: no cluster there \(Could not find any running Ray instance"):
        cluster_facts("auto")


@pytest.mark.ray
def test_every_node_of_a_cluster_is_looked_at(ray_session: None) -> None:
    (facts,) = cluster_facts("auto")
    assert facts.host and facts.memory > 0
