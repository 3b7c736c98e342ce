"""The wheel: what is in it, and its commands in an environment and a folder where nothing else of the project is."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from .kit.head import free_port
from .kit.project import PACKAGE, ROOT, tracked
from .kit.serve_process import rest_until_the_end, serve_process
from .kit.shards import sample, tar_bytes

CONFIGS = ROOT / "configs"


def uv(*words: str) -> None:
    own = ROOT / ".uv" / "bin" / "uv"
    found = str(own) if own.exists() else shutil.which("uv")
    if not found:
        pytest.skip("no uv here: run make venv")
    done = subprocess.run([found, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files under version control."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        if path.is_relative_to(PACKAGE) or path.is_relative_to(CONFIGS) or path.parent == ROOT:
            (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / path.relative_to(ROOT))
    uv(
        "build",
        "--wheel",
        "--offline",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "-o",
        str(made),
        str(source),
    )
    (wheel,) = made.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``instella-ray`` of an environment with the wheel, and with this environment's packages as its dependencies."""
    env = tmp_path_factory.mktemp("env")
    uv("venv", "--quiet", "--allow-existing", "--python", sys.executable, str(env))
    python = env / "bin" / "python"
    uv("pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), str(wheel))
    (packages,) = env.glob("lib/python*/site-packages")
    # Python reads no .pth file of a folder that a .pth file names, so this project's own checkout stays outside.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(env / "bin" / "instella-ray")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}


def run(command: str, folder: Path, *words: str) -> str:
    done = subprocess.run([command, *words], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_it_holds_every_file_of_the_package_and_every_recipe(wheel: Path) -> None:
    files = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(PACKAGE)}
    recipes = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(CONFIGS)}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {name.partition("share/instella_ray/")[2] for name in packed if ".data/" in name}
    assert {name for name in packed if ".data/" not in name} == files and data == recipes
    assert any(name.endswith(".j2") for name in files) and "configs/data/curate.yaml" in recipes


@pytest.mark.process
def test_shards_are_curated_by_a_recipe_and_images_generated(command: str, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_bytes([m for i in range(4) for m in sample(f"{i:04d}", i)]))
    given = ("--set", "input=*.tar", "--set", "output=curated", "--set", "filters.resolution.target_size=32", "--local")
    assert "curated: " in run(command, tmp_path, "curate", "--config", "data/curate", *given)
    assert list((tmp_path / "curated").glob("*.tar")) and (tmp_path / "curated" / "curation.html").is_file()
    assert run(command, tmp_path, "generate", "a red heart, flat style", "--seed", "0") == "out.png: 96x96, seed 0\n"
    image = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    middle, corner = image[32:64, 32:64].mean((0, 1)), image[:8, :8].mean((0, 1))
    assert middle[0] > middle[1] + 100 and middle[0] > middle[2] + 100 and corner.min() > 240


@pytest.mark.process
def test_the_models_of_the_package_are_served_without_any_path(command: str, tmp_path: Path) -> None:
    port = free_port()
    # In one process, which starts sooner: tests/serving/test_job.py has the same command on Ray.
    serving = [command, "serve", "--local", "--set", f"port={port}"]
    with serve_process(serving, environment(), tmp_path) as (serve, said):
        assert said.startswith("listening on ")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            diffusion, ar = client.get("/v1/models").json()["data"]
            assert (diffusion["id"], ar["id"]) == ("diffusion", "ar") and diffusion["instella_ray"]["sizes"] == [96]
            assert client.get("/").text.startswith("<!doctype html>")
            for model in (diffusion, ar):
                asked = {"model": model["id"], "prompt": model["instella_ray"]["prompts"][0], "seed": 1}
                answer = client.post("/v1/images/generations", json={**asked, "response_format": "b64_json"})
                file = base64.b64decode(answer.json()["data"][0]["b64_json"])
                assert Image.open(io.BytesIO(file)).size == (96, 96)
        serve.send_signal(signal.SIGTERM)
        rest_until_the_end(serve)
