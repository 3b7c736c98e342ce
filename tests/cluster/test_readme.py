"""``cluster/README.md``: its figures are those that its own commands print, and it names what is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from instella_ray import cli
from instella_ray.config import load_config
from instella_ray.planning.simulation.run import SimulateConfig
from instella_ray.planning.simulation.serving import simulate_serving

from ..kit.discovery import discovery
from ..kit.kubernetes import build, load_documents, program
from ..kit.manifests import as_text
from ..kit.overlays import FOLDER, objects
from ..kit.project import ROOT
from ..kit.shell_lines import commands, shell_lines

SITE = FOLDER / "components" / "site" / "site.env"
MONITORING = ROOT / "cluster" / "monitoring"
README = (ROOT / "cluster" / "README.md").read_text()
SIMULATIONS = [shlex.split(line)[1:] for line in shell_lines(README) if line.startswith("instella-ray simulate")]
PLANS = [shlex.split(line)[1:] for line in shell_lines(README) if line.startswith("instella-ray plan")]


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading starts with ``title``."""
    table = re.search(rf"^\| {title}.*\n(?:\|.*\n)+", README, re.M)
    assert table, title
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_figures_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for arguments in PLANS:
        assert cli.main([*arguments, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    *generators, tokenizer = plans
    told = rows("the paper's diffusion generator")
    for column, plan in enumerate([plan.get("", plan) for plan in generators]):
        step = 4096 / plan["gpus"] / plan["images_per_second"]
        sent = plan["network"]["sent_per_step"]
        for row, value in {
            "GPU-days": plan["gpu_days"],
            "days": plan["gpu_days"] / plan["gpus"],
            "memory a GPU, GB (micro-batch)": plan["memory_total"] / 1e9,
            "computing a step of 4,096, s": step,
            "a GPU sends each step, GB": sent / 1e9,
            "the same at 50 GB/s a GPU, s": sent / 50e9,
            "all read, MB/s": plan["network"]["read_per_second"] / 1e6,
        }.items():
            assert float(told[row][column].split()[0]) == pytest.approx(value, rel=0.02, abs=0.05), (row, column)
        assert plan["fits"]
    told = rows("the paper's tokenizer")
    for column, stage in enumerate(tokenizer.values()):
        assert float(told["days"][column]) == pytest.approx(stage["gpu_days"] / 8, abs=0.05)
        assert float(told["memory a GPU, GB"][column]) == pytest.approx(stage["memory_total"] / 1e9, abs=0.05)
        assert float(told["all read, MB/s"][column]) == pytest.approx(
            stage["network"]["read_per_second"] / 1e6, abs=0.5
        )


def test_the_simulated_figures_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    told = rows("600M images on MI300X")
    sized = [arguments for arguments in SIMULATIONS if "serving=null" in arguments]
    assert len(sized) == 3
    for column, arguments in enumerate(sized):
        assert cli.main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        data, training = found["data"], found["training"]
        for row, days in {
            "curating on the pool's 256 CPUs, days": data["curation"]["days"],
            "encoding with 11 CPUs a GPU, days": data["encoding"]["days"],
            "training 400,000 steps, days": training["days"],
        }.items():
            assert float(told[row][column]) == pytest.approx(days, rel=0.02, abs=0.005), (row, column)
        bottlenecks = [
            re.findall(r"^\| its bottleneck \|(.*)\|$", README, re.M)[i].split("|")[column] for i in range(3)
        ]
        assert [name.strip() for name in bottlenecks] == [
            part["bottleneck"] for part in (data["curation"], data["encoding"], training)
        ]
        cpus = data["cpus_to_keep_gpus_busy"]
        assert told["CPU workers that keep the GPUs at 95 %"][column] == ("none do" if cpus is None else str(cpus))
        assert told["its GPUs compute"][column] == f"{training['busy']:.0%}".replace("%", " %")


def test_the_endpoint_of_the_readme_meets_its_limits_and_not_with_a_generator_less() -> None:
    cfg = load_config(SimulateConfig, str(ROOT / "configs" / "simulation" / "mi300x.yaml"))
    assert cfg.serving is not None and cfg.slo is not None and (cfg.serving.load.rate, cfg.slo.p99_s) == (50, 6)
    told = {name: row for name, row in rows("50 requests/s").items() if row[0].isdigit()}
    replicas = {name: int(row[0]) for name, row in told.items()}
    outcome = simulate_serving(cfg.serving.model_copy(update={"replicas": replicas}), cfg.seed)
    assert cfg.slo.met(outcome)
    assert {name: f"{outcome.utilisation[name]:.0%}".replace("%", " %") for name in told} == {
        name: row[1] for name, row in told.items()
    }
    fewer = {**replicas, "diffusion": replicas["diffusion"] - 1}
    assert not cfg.slo.met(simulate_serving(cfg.serving.model_copy(update={"replicas": fewer}), cfg.seed))


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What kubectl would create or change by each line of the README that needs this checkout alone, in their order."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "cluster").symlink_to(ROOT / "cluster")
    (folder / "key.json").write_text("{}")
    certificate = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=host -keyout tls.key -out tls.crt"
    subprocess.run(shlex.split(certificate), cwd=folder, check=True, capture_output=True)
    kinds = [target for overlay in ("mi300x", "kind") for target in objects(overlay)] + build(MONITORING)
    found: dict[str, list[str]] = {}
    with discovery(kinds, folder / "kubeconfig"):
        environment = {**os.environ, "KUBECONFIG": str(folder / "kubeconfig"), "HOME": str(folder)}
        environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        dry = 'kubectl() { verb=$1; shift; "$PROGRAM" "$verb" --dry-run=client --output name "$@"; }'
        for line in shell_lines(README):
            if re.match(r"kubectl (apply|create) ", line) and "https://" not in line:
                valid = "" if " create secret " in line else " --validate=false"
                done = subprocess.run(
                    ["bash", "-c", f"set -eu; . {SITE}; {dry.replace('$PROGRAM', program('kubectl'))}; {line}{valid}"],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                found[line] = done.stdout.split()
    return found


@pytest.mark.process
def test_kubectl_takes_every_line_that_creates_or_applies(typed: dict[str, list[str]]) -> None:
    assert len(typed) > 12 and all(typed.values())


@pytest.mark.process
def test_helm_takes_the_lines_that_install_and_render(tmp_path: Path) -> None:
    """Rendered, which is all of an installation that needs no cluster."""
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    (tmp_path / "site.yaml").write_text("image: registry/instella-ray:1\n")
    lines = [line for line in shell_lines(README) if "cluster/helm" in line]
    assert len(lines) == 3
    for line in lines:
        words = next(commands(line))
        words[:2] = [program("helm"), "template"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        kinds = [target["kind"] for target in load_documents(done.stdout)]
        assert kinds == ["RayJob"] if "--show-only" in words else "RayJob" not in kinds


@pytest.mark.process
def test_a_line_that_starts_a_stage_starts_that_one_alone(typed: dict[str, list[str]]) -> None:
    started = {line: names for line, names in typed.items() if line.startswith("kubectl create -k")}
    assert len(started) == 2  # a cluster's, and kind's
    for line, names in started.items():
        assert names == [f"rayjob.ray.io/{line.rpartition('=')[2]}"]


@pytest.mark.process
def test_begin_makes_what_pods_ask_for_before_they_start(typed: dict[str, list[str]]) -> None:
    """In the order of the lines: the namespace, the secrets, then what needs them, and the endpoint last."""
    for overlay, section in {"mi300x": README, "kind": README[README.index("### On one machine") :]}.items():
        lines = [line for line in shell_lines(section) if line in typed]
        first = next(i for i, line in enumerate(lines) if f"apply -k cluster/kuberay/overlays/{overlay}" in line)
        before = {name for line in lines[:first] for name in typed[line]}
        needed = set(
            re.findall(r'"(?:secretName|secretKeyRef)": (?:{[^}]*"name": )?"([a-z-]+)"', as_text(objects(overlay)))
        )
        needed |= {"endpoint-tls"} if overlay != "kind" else set()
        assert {f"secret/{name}" for name in needed - {"bucket-key"}} | {"namespace/instella-ray"} <= before
        assert not {name for name in typed[lines[first]] if name.endswith("/endpoint")}
        assert any("rayservice.ray.io/endpoint" in typed[line] for line in lines[first:]) or overlay == "kind"


def test_the_lines_fill_in_what_they_name_from_one_file() -> None:
    """Capitals that a reader would have to replace are in site.env; what a line reads is set there or by a line before."""
    begin = README[README.index("## Begin") : README.index("A job on a cluster that runs already")]
    known = {line.split("=", 1)[0] for line in SITE.read_text().splitlines() if "=" in line and line[0] != "#"}
    for line in shell_lines(begin):
        known |= set(re.findall(r"^(\w+)=", line))
        read = set(re.findall(r"\$(\w+)", line))
        assert read <= known | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, line
        words = set(re.findall(r"(?<![\w$-])[A-Z][A-Z_]{3,}\b", line))
        assert words <= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"}, line


def test_files_secrets_and_components_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:kuberay|vm|docker|components)/[\w./{},-]+)`", README):
        head, _, options = name.partition("{")
        names = [head + option for option in options.rstrip("}").split(",")] if options else [head]
        for path in names:
            assert (ROOT / "cluster" / path).exists() or (FOLDER / path).exists(), path
    written = "".join(path.read_text() for path in FOLDER.rglob("*.yaml"))
    for secret in re.findall(r"create secret (?:generic|tls) (\S+)", README):
        assert re.search(rf"\b{secret}\b", written), secret
    table = rows("component")
    named = {name for cell in table for name in re.findall(r"`([\w-]+)`", cell)}
    assert {path.name for path in (FOLDER / "components").iterdir()} == named
    assert "## Sizes by simulation" in README.splitlines()
