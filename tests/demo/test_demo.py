"""The demo end to end at its smallest size: real Ray Data, Ray Serve and HTTP, in a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from instella_ray import cli, storage
from instella_ray.commands import serve
from instella_ray.demo.recipe import DemoConfig
from instella_ray.demo.seeds import read_result
from instella_ray.demo.state import DemoState, read_demo
from instella_ray.errors import UserError
from instella_ray.operations.lineage import trace
from instella_ray.operations.packing import find_package
from instella_ray.rendering import svg_curves
from instella_ray.serving.setup import Setup

from ..kit.chain import below
from ..kit.head import free_port
from ..kit.icons import write_sets
from ..kit.project import ROOT
from ..kit.serve_process import rest_until_the_end, serve_process

OF_SETS = "import sys; from tests.kit.icons import use_sets; use_sets(sys.argv.pop(1)); from instella_ray import cli; "
"""The command line, with the sets in a folder that is its first argument in the place of those that npm fetches."""


def start(folder: Path, *flags: str, packages: Path | None = None) -> subprocess.Popen[str]:
    program = ["-m", "instella_ray"] if packages is None else ["-c", f"{OF_SETS}sys.exit(cli.main())", str(packages)]
    command = [sys.executable, *program, "demo", "--tiny", "--folder", str(folder), *flags]
    # A session of its own, so that Ctrl-C can be sent to it as a terminal does, and its processes be found.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )


def session_processes(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (OSError, IndexError):
            continue
    return found


def wait_until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.5)
    return False


def assert_complete(folder: Path) -> None:
    """A report with all stages and images, and a lineage from an image to the scenes."""
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 16 + 2 * 12 and "http://" not in page and "https://" not in page
    for words in ("two objects", "PSNR", "diffusion generator", "ar generator", "total"):
        assert words in page
    state = storage.read_json(str(folder / "state.json"))["stages"]
    assert set(state["score"]) >= {"diffusion", "ar"}
    image = trace(str(folder / "samples" / "diffusion" / "0000.png"), [str(folder / "runs")])
    curated = below(image, "generator", "codes", "shards")
    assert curated.path == str(folder / "curated") and curated.facts["kept"] == 240
    assert below(curated, "shards").facts["files"] == 1
    assert {each.state for each in image.walk() if each.role != "text encoder"} == {"here", "moved"}
    assert state["curate"]["ledger"] == {"in": 240, "kept": 240, "dropped": {}, "quarantined": {}}


class Finished(NamedTuple):
    """A demo that has ended."""

    folder: Path
    output: list[str]
    """Lines that it has printed."""

    def command(self, name: str) -> list[str]:
        """Return what may be typed next, as it says at its end."""
        (line,) = (line for line in self.output[-2:] if line.startswith(f"{name}:"))
        program, *words = shlex.split(line.partition(":")[2])
        assert program == "instella-ray"
        return words


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("demo") / "a first try" / "seed-0"  # no name that ignore files know
    # Trained in the demo's own process: tests/training shows that a worker of Ray Train learns the same.
    demo = start(folder, "--set", "workers.count=0")
    output, _ = demo.communicate(timeout=900)
    assert demo.returncode == 0, output
    assert wait_until(lambda: not session_processes(demo.pid), 30), session_processes(demo.pid)
    return Finished(folder, output.strip().splitlines())


@pytest.mark.nightly
@pytest.mark.ray
def test_the_demo_ends_with_a_report_and_no_process(finished: Finished, tmp_path: Path) -> None:
    assert_complete(finished.folder)
    assert find_package(finished.folder.parent).sizes == {}
    command = finished.command("more")
    assert command[0] == "generate" and command[-4:] == ["--model", str(finished.folder), "-o", "out.png"]
    assert cli.main([*command[:-1], str(tmp_path / "out.png")]) == 0 and (tmp_path / "out.png").exists()


@pytest.mark.nightly
@pytest.mark.ray
def test_finished_demos_of_several_seeds_are_tabulated(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tiny", "--set", "workers.count=0", "--folder", str(finished.folder.parent)]
    assert cli.main(["demo", "--seeds", "0", "--table", *flags]) == 0
    head, _, row, mean = capsys.readouterr().out.strip().splitlines()
    assert head.split("|")[1].strip() == "seed" and row.split("|")[1].strip() == "0" and "mean" in mean
    (result,) = [read_result(str(finished.folder))]
    assert f"| {result.seconds:.0f} " in row and result.seconds > 0
    # Twelve images of a generator: 0 right of 12 is anything up to a quarter.
    assert all(re.search(r"0\.\d\d \[0\.\d\d, \d\.\d\d\]", cell) for cell in row.split("|")[4:8])

    assert cli.main(["demo", "--seeds", "0", "--folder", str(finished.folder.parent)]) == 2
    assert "other settings" in capsys.readouterr().err
    assert cli.main(["demo", "--seeds", "0", *flags[:3], "--folder", str(finished.folder)]) == 2
    assert "contains a demo" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.ray
def test_a_demos_folder_is_served_as_it_says_at_its_end(finished: Finished) -> None:
    assert finished.command("serve") == ["serve", str(finished.folder)]
    port = free_port()
    # In one process, which starts sooner: tests/serving/test_job.py has the same command on Ray.
    argv = [sys.executable, "-m", "instella_ray", *finished.command("serve"), "--set", f"port={port}", "--local"]
    with serve_process(argv, dict(os.environ)) as (endpoint, said):
        assert said.startswith(f"listening on http://127.0.0.1:{port}")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["diffusion", "ar"]
            for kind in ("diffusion", "ar"):
                body = {"prompt": "a photo of a red circle", "model": kind}
                assert client.post("/v1/images/generations", json=body).status_code == 200
        endpoint.send_signal(signal.SIGTERM)
        rest_until_the_end(endpoint)


@pytest.mark.nightly
@pytest.mark.ray
def test_icons_are_built_and_end_in_a_report(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra 'icons' is not installed")
    folder, packages = tmp_path / "first" / "seed-0", tmp_path / "packages"
    write_sets(packages, "one", "two", drawings=90)
    flags = [f"icons.sources={packages}", "icons.sets=[one,two]", "workers.count=0"]
    flags += [f"steps.{name}=2" for name in ("tokenizer", "diffusion", "ar")]
    arguments = ["--data", "icons", *(word for flag in flags for word in ("--set", flag))]
    demo = start(folder, *arguments, packages=packages)
    output, _ = demo.communicate(timeout=900)
    assert demo.returncode == 0, output
    state = storage.read_json(str(folder / "state.json"))["stages"]
    page = (folder / "report.html").read_text()
    held_out = state["tokenizer quality"]["images"]
    assert page.count("data:image/png;base64,") == 2 * min(held_out, 16) + 2 * 2 and "https://" not in page
    for words in (", style one style", "PSNR", "2 sets of icons", "someone", "MIT", "256 bytes"):
        assert words in page
    assert "scene score" not in page and state["score"].keys() == {"seconds"}
    assert held_out == sum(about["splits"]["held-out"] for about in state["icons"]["sets"].values())
    image = trace(str(folder / "samples" / "ar" / "0000.png"), [str(folder / "runs")])
    assert below(image, "generator", "codes", "shards", "shards").path == str(folder / "icons" / "train" / "*.tar")
    assert find_package(folder.parent).sizes == {}


@pytest.mark.nightly
@pytest.mark.slow
def test_interrupted_and_resumed_the_demo_ends_with_a_report_and_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = start(folder)
    # Ctrl-C in the middle of the tokenizer's training.
    assert wait_until((folder / "runs" / "tokenizer" / "config.yaml").exists, 240), first.communicate(timeout=5)
    assert wait_until(lambda: any("RayTrainWorker" in line for line in session_processes(first.pid)), 120)
    os.killpg(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    assert wait_until(lambda: not session_processes(first.pid), 30), session_processes(first.pid)
    done = set(storage.read_json(str(folder / "state.json"))["stages"])
    assert done == {"scenes", "curate"}

    refused = start(folder)
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "--resume continues it, --fresh starts over" in output

    second = start(folder, "--resume")
    output, _ = second.communicate(timeout=900)
    assert second.returncode == 0, output
    assert wait_until(lambda: not session_processes(second.pid), 30), session_processes(second.pid)
    assert_complete(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for mode in ("new", "resume", "fresh"):
        with pytest.raises(UserError, match="not written by the demo"):
            DemoState(DemoConfig(folder=str(tmp_path)), mode)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_is_gone_on_with_only_as_asked(tmp_path: Path) -> None:
    demo = DemoConfig(folder=str(tmp_path / "d"))
    calls: list[int] = []

    def stage() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    DemoState(demo, "new").run("one", stage)
    with pytest.raises(UserError, match="--resume continues it, --fresh starts over"):
        DemoState(demo, "new")
    with pytest.raises(UserError, match="other settings"):
        DemoState(demo.model_copy(update={"seed": 1}), "resume")
    assert DemoState(demo, "resume").run("one", stage)["answer"] == 42 and len(calls) == 1
    assert DemoState(demo, "fresh").stages == {}


def test_a_demos_folder_says_what_is_to_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = DemoConfig(folder=str(tmp_path / "mine"), size=32, seed=3)
    DemoState(demo, "new").begin()
    assert read_demo(f"{demo.folder}/") == demo
    args = serve.job.load([demo.folder, "--set", "app.threads=3", "--set", "app.models.ar.slots=2"]).app
    assert (args.sizes, args.threads, list(args.models), args.models["ar"].slots) == ((32,), 3, ["diffusion", "ar"], 2)
    assert args.models["ar"].path == f"{demo.folder}/runs/ar/latest"
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not the folder of a demo (no state.json with its settings)\n"
    with pytest.raises(UserError, match=r"mine/runs/diffusion: no "):
        Setup.of(args)


def test_curves_are_drawn_inside_their_frame() -> None:
    chart = svg_curves({"a": [(1, 5.0), (10, 0.5)], "b": [(5, 2.0)]}, log=True)
    assert chart.count("<polyline") == 2 and "nan" not in chart
    assert "nothing was logged" in svg_curves({"a": []})
