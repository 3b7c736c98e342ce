"""``cluster/docker``: images that build from what is here, with rules as hadolint has them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from instella_ray.evaluation.image_reward_actor import PACKAGES
from instella_ray.serving.serve_settings import SETTINGS

from ..kit.overlays import OVERLAYS, templates
from ..kit.project import PROJECT, ROOT, tracked

pytestmark = pytest.mark.process  # kubectl builds what they look at

FOLDER = ROOT / "cluster" / "docker"
ON_TOP = FOLDER / "Dockerfile.image-reward"
"""An image on top of another of this folder."""
FILES = sorted(set(FOLDER.glob("Dockerfile.*")) - {ON_TOP})
INSTALLER = FOLDER / "install.sh"
KNOWN = {"ARG", "FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile, an entry each."""
    steps, found, user, copied = instructions(text), [], "root", set[str]()
    arguments = dict(rest.split("=", 1) for name, rest in steps if name == "ARG" and "=" in rest)
    for name, rest in steps:
        if name not in KNOWN:
            found.append(f"{name}: not used here (COPY in place of ADD)")
        if name == "FROM" and arguments:
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), rest)
            tag = image.rpartition(":")[2] if ":" in image else ""
            if not re.search(r"\d+\.\d+", tag):
                found.append(f"FROM {image}: expected a tag with a version")
        if name == "USER":
            user = rest
        if name == "WORKDIR" and not rest.startswith("/"):
            found.append(f"WORKDIR {rest}: not absolute")
        if name == "COPY":
            *sources, _ = rest.split()
            copied |= set(sources)
            found += [f"COPY {source}: not there" for source in sources if not (ROOT / source).exists()]
            found += [f"COPY {source}: kept out by .dockerignore" for source in sources if not in_context(source)]
        if name == "RUN":
            found += problems_of_command(rest)
            if "install-instella-ray" in rest and not {"pyproject.toml", "instella_ray"} & copied:
                found.append("the package is installed before it is copied")
    if user.split(":")[0] in ("root", "0"):
        found.append("USER: root")
    return found


def problems_of_command(command: str) -> list[str]:
    found = []
    if "apt-get install" in command:
        if "apt-get update" not in command or "rm -rf /var/lib/apt/lists/*" not in command:
            found.append("apt-get install without update before it, or with the lists left behind")
        if "--no-install-recommends" not in command or not re.search(r"--yes|-y\b", command):
            found.append("apt-get install without --yes --no-install-recommends")
    without_packages = re.sub(r"apt-get install [^&|;]*", "", command)
    if re.search(r"\bsudo\b|\bcurl\b|\bwget\b|\bapt \b|apt-get (dist-)?upgrade", without_packages):
        found.append(f"RUN {command}: sudo, downloads, apt and upgrades are not for images")
    pinned = "--constraint" in command or "--no-deps --requirement" in command
    if "pip install" in command and ("--no-cache-dir" not in command or not pinned):
        found.append("pip install without --no-cache-dir or without the constraints")
    return found


def in_context(source: str) -> bool:
    """Whether .dockerignore leaves a file or folder in what the build sees."""
    inside = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch(source, pattern.lstrip("!").replace("**/", "")):
            inside = pattern.startswith("!")
    return inside


@pytest.mark.parametrize("path", [*FILES, ON_TOP], ids=lambda path: path.suffix[1:])
def test_the_dockerfile_keeps_the_rules(path: Path) -> None:
    assert problems(path.read_text()) == []
    if hadolint := shutil.which("hadolint"):
        rules = ["--ignore", "DL3008", "--ignore", "DL3006"]  # apt's versions follow the base, which is an argument
        done = subprocess.run([hadolint, *rules, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_rules_find_what_they_are_for() -> None:
    good = FILES[0].read_text()
    for change, expected in {
        ("USER 1000:1000", "USER root"): "USER: root",
        ("USER 1000:1000", ""): "USER: root",
        (":3.11.14-slim-bookworm", ":latest"): "expected a tag",
        ("python:3.11.14-slim-bookworm", "python"): "expected a tag",
        ("COPY jobs jobs", "ADD https://example.org/jobs jobs"): "ADD: not used",
        ("COPY jobs jobs", "COPY jobz jobs"): "COPY jobz: not there",
        ("COPY jobs jobs", "COPY tests tests"): "COPY tests: kept out",
        (" && rm -rf /var/lib/apt/lists/*", ""): "lists left behind",
        ("apt-get update ", "wget https://example.org/x && apt-get update "): "downloads",
        ("--no-install-recommends", ""): "without --yes",
        ("WORKDIR /opt", "WORKDIR opt"): "not absolute",
    }.items():
        flat = re.sub(r"\\\n\s*", " ", good).replace("  ", " ")
        assert change[0] in flat, change
        assert any(expected in problem for problem in problems(flat.replace(*change))), change


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])
def test_extras_that_are_installed_exist(path: Path) -> None:
    (extras,) = re.findall(r"install-instella-ray (\S+)$", path.read_text(), re.M)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"]) - {"dev"}


def test_every_file_that_the_build_needs_of_the_project_is_copied() -> None:
    """What pyproject.toml names, and what jobs and their configurations are."""
    needed = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    needed |= {"instella_ray", "jobs", "configs", "cluster/docker/install.sh"}
    for path in FILES:
        copies = [rest.split()[:-1] for name, rest in instructions(path.read_text()) if name == "COPY"]
        assert {source for sources in copies for source in sources} == needed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])
def test_images_and_manifests_name_the_same_user(path: Path) -> None:
    (user,) = [rest for name, rest in instructions(path.read_text()) if name == "USER"]
    for overlay in OVERLAYS:
        for template in templates(overlay):
            context = template["spec"]["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def packages(text: str) -> set[str]:
    """The Debian packages that a Dockerfile installs."""
    commands = [rest for name, rest in instructions(text) if name == "RUN"]
    installed = re.findall(r"apt-get install ([^&]*)", " ".join(commands))
    return {word for words in installed for word in words.split() if not word.startswith("-")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])
def test_an_image_has_what_probes_and_filters_call(path: Path) -> None:
    """KubeRay 1.7 probes a RayService's workers with ``wget`` in ``bash``; OpenCV of the OCR filter loads libGL and GLib."""
    assert packages(path.read_text()) >= {"wget", "libgl1", "libglib2.0-0"}


@pytest.mark.process
def test_opencv_loads_the_libraries_that_images_install_for_it() -> None:
    """If it no longer does, the images need them no longer."""
    module = find_spec("cv2")
    if module is None or module.origin is None:
        pytest.skip("the extra 'curate' is not installed")
    (library,) = Path(module.origin).parent.glob("cv2*.so") if module.origin.endswith(".py") else [module.origin]
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libGL.so.1" in linked and "libglib-2.0.so.0" in linked


@pytest.mark.parametrize("path", [*FILES, ON_TOP], ids=lambda path: path.suffix[1:])
@pytest.mark.process
def test_every_command_of_a_dockerfile_is_a_line_for_bash(path: Path) -> None:
    for name, rest in instructions(path.read_text()):
        if name == "RUN":
            done = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_bases_are_those_of_the_pinned_torch() -> None:
    """A CUDA base of torch's own version, a ROCm base with the pinned torch, and wheels without CUDA for CPUs."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    bases = {path.suffix[1:]: re.findall(r"^ARG BASE=(.*)$", path.read_text(), re.M)[0] for path in FILES}
    cuda = ".".join(pins["cuda-toolkit"].split(".")[:2])
    assert bases["cuda"].startswith(f"nvidia/cuda:{cuda}.")
    assert bases["rocm"].endswith(f"_pytorch_release_{pins['torch']}")
    cpu = (FOLDER / "Dockerfile.cpu").read_text()
    assert "ARG UV_TORCH_BACKEND=cpu\n" in cpu
    pair = "uv pip install --system --no-cache --constraint constraints.txt torch torchvision"
    assert cpu.index(pair) < cpu.index("KEEP_TORCH=1 sh /usr/local/bin/install-instella-ray")


def test_a_rocm_image_keeps_its_torch_and_lets_ray_hand_out_gpus() -> None:
    text = (FOLDER / "Dockerfile.rocm").read_text()
    assert "KEEP_TORCH=1 sh /usr/local/bin/install-instella-ray" in text
    assert re.search(r"RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES= ", text) and "ROCR_VISIBLE_DEVICES=" not in text


def test_the_installer_leaves_torch_and_its_libraries_out_where_they_stay(tmp_path: Path) -> None:
    """Run with a python that only tells what it was asked for."""
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncase "$1" in -c) echo 2.9.1;; *) echo "$@"; cat "$6";; esac\n')
    fake.chmod(0o755)

    def run(keep: str) -> str:
        environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "KEEP_TORCH": keep}
        command = ["sh", str(INSTALLER), "gcs,gguf"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    kept, whole = run("1"), run("0")
    assert whole.splitlines()[0].endswith("--constraint constraints.txt .[gcs,gguf]")
    left_out = set(whole.splitlines()[1:]) - set(kept.splitlines())
    assert {line.split("==")[0] for line in left_out} >= {"torch", "torchvision"}
    assert all(re.match(r"torch|torchvision|triton|cuda-|nvidia-", line) for line in left_out)
    assert "ray==" in kept and "transformers==" in kept


@pytest.mark.process
@pytest.mark.nightly
def test_the_installer_installs_the_package_beside_a_torch_that_is_there(tmp_path: Path) -> None:
    """For real, in a virtual environment that has this one's packages but not this one's own package."""
    venv, source = tmp_path / "venv", tmp_path / "source"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source.mkdir()
    for name in (
        "pyproject.toml",
        "constraints.txt",
        PROJECT["project"]["readme"],
        *PROJECT["project"]["license-files"],
    ):
        shutil.copy(ROOT / name, source)
    for name in ("instella_ray", "jobs", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PATH": f"{venv}/bin:{os.environ['PATH']}", "KEEP_TORCH": "1"}
    subprocess.run(["sh", str(INSTALLER), "gguf"], cwd=source, env=environment, check=True)
    assert not (source / "instella_ray").exists()
    where = "import instella_ray, torch; print(instella_ray.__file__, torch.__version__)"
    command = [f"{venv}/bin/python", "-c", where]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    module, torch = done.stdout.split()
    assert module == str(site / "instella_ray" / "__init__.py") and torch.startswith(version("torch"))


def test_the_files_of_the_folder_are_known() -> None:
    assert {path.name for path in tracked() if path.parent == FOLDER} == {
        *(path.name for path in (*FILES, ON_TOP)),
        "install.sh",
    }


def test_the_packages_of_image_reward_have_exact_versions() -> None:
    """They are installed without their dependencies, so nothing else would keep them together."""
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", pin) for pin in PACKAGES)
    assert any(pin.startswith("transformers==4.") for pin in PACKAGES)
    (command,) = (rest for name, rest in instructions(ON_TOP.read_text()) if name == "RUN")
    listed = re.findall(r'python3 -c "(.*?)"', command)
    done = subprocess.run([sys.executable, "-c", *listed], capture_output=True, text=True, check=True)
    assert "--no-deps --requirement" in command and done.stdout.split() == list(PACKAGES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])
def test_nodes_have_the_settings_of_serve(file: Path) -> None:
    variables = {
        name: value
        for instruction, rest in instructions(file.read_text())
        if instruction == "ENV"
        for name, _, value in (pair.partition("=") for pair in rest.split())
    }
    assert SETTINGS.items() <= variables.items()
