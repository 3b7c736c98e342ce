"""The set-up: what it decides on odd machines, what it installs beside a torch of the machine's own, and the pins.

Nothing here needs a network: the packages installed are stand-ins that carry the real ones' metadata.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIXED = re.search(r"^FIXED := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()  # type: ignore[index]
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
STAND_IN_TORCH = "2.99.0+rocm7.9"


# --- constraints.txt


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras.values()) for text in group]


def all_requirements() -> list[Requirement]:
    """What pyproject.toml asks for with all extras, and what each of those that is installed here at its pinned version
    asks for, in turn."""
    found, seen, todo, pinned = [], set(), direct_requirements(), pins()
    while todo:
        requirement = todo.pop()
        found.append(requirement)
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            if installed_version(requirement.name) != pinned.get(key[0]):
                continue
            inner = [Requirement(text) for text in metadata.distribution(requirement.name).requires or []]
            todo += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def test_every_requirement_has_a_pin_in_its_range() -> None:
    pinned = pins()
    wrong = [
        f"{requirement}: {pinned.get(canonicalize_name(requirement.name), 'no pin')}"
        for requirement in all_requirements()
        if not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"), prereleases=True)
        or canonicalize_name(requirement.name) not in pinned
    ]
    assert wrong == []


def test_what_the_tests_run_with_is_what_is_pinned() -> None:
    """A torch of the machine's own apart, which the set-up keeps."""
    asked = {canonicalize_name(requirement.name) for requirement in all_requirements()}
    versions = {name: (installed_version(name), pin) for name, pin in pins().items() if name in asked}
    kept = OF_TORCH if installed_version("torch") != pins()["torch"] else re.compile("")
    assert {n: v for n, v in versions.items() if v[0] not in (None, v[1]) and not kept.fullmatch(n)} == {}


def test_no_pin_is_there_that_nothing_asks_for() -> None:
    """As far as this environment can tell: a pin that is installed is asked for by something that is installed."""
    asked = {canonicalize_name(requirement.name) for requirement in all_requirements()}
    # Not what Ray carries along and puts on the path of a process that has imported it.
    folder = sysconfig.get_path("purelib")
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions(path=[folder])}
    assert sorted((pins().keys() & installed) - asked) == []


def test_the_file_holds_exact_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[0].startswith("#") and any("make constraints" in line for line in lines if line.startswith("#"))
    assert [x for x in lines if not x.startswith("#") and not re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", x)] == []
    assert [x for x in lines if "://" in x or " @ " in x] == []


def test_the_versions_seen_to_work_together_are_pinned() -> None:
    assert {text.split("==")[0] for text in FIXED} >= {"torch", "torchvision", "ray", "transformers", "deepspeed"}
    assert {name: pins()[name] for name in (text.split("==")[0] for text in FIXED)} == dict(
        text.split("==") for text in FIXED
    )


@pytest.mark.process
def test_resolving_again_changes_nothing(tmp_path: Path, uv: str) -> None:
    house = copy_of_the_house(tmp_path / "house")
    (house / ".uv" / "bin").mkdir(parents=True)
    (house / ".uv" / "bin" / "uv").symlink_to(uv)
    done = subprocess.run(["make", "constraints"], cwd=house, capture_output=True, text=True)
    if done.returncode and re.search("dns|connect|network|timed out|client error", done.stderr, re.I):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    assert (house / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()


# --- .ci/setup.sh


@pytest.fixture(scope="session")
def uv() -> str:
    found = ROOT / ".uv" / "bin" / "uv"
    path = str(found.resolve()) if found.exists() else shutil.which("uv")
    if not path:
        pytest.skip("no uv here: run make venv")
    return path


def copy_of_the_house(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for name in (".ci", "instella_ray"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def clean_environment(**more: str) -> dict[str, str]:
    """Without the settings of the environment that runs the tests."""
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX", "MAKEFLAGS")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("PIP_", "UV_"))}
    return {**kept, **more}


def set_up(house: Path, python: Path | str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(house / ".ci" / "setup.sh"), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(PYTHON=str(python), **env), timeout=300
    )


def bare_python(folder: Path) -> Path:
    """An interpreter without pip."""
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def add_module(python: Path, name: str, version: str) -> None:
    folder = site_packages(python) / name
    folder.mkdir()
    (folder / "__init__.py").write_text(f"__version__ = {version!r}\n")


def wrapped(path: Path, python: Path | str, cases: str) -> Path:
    """``python`` behind a script that takes some calls itself."""
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\nesac\nexec "{python}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def house(tmp_path: Path) -> Path:
    return copy_of_the_house(tmp_path / "a house")


@pytest.mark.process
def test_a_python_that_is_not_there_is_named(house: Path) -> None:
    done = set_up(house, "python-of-nowhere", "--plan")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no python-of-nowhere here; install Python 3.11")
    assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_an_old_python_is_refused_in_one_line(house: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 9, 2, 'final', 0)\n")
    python = wrapped(tmp_path / "old-python", sys.executable, f'*) PYTHONPATH="{tmp_path}/old"; export PYTHONPATH;;')
    done = set_up(house, python)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"error: Python 3.11 or newer is needed, {python} is 3.9; name another with PYTHON=...\n")
    assert not (house / ".venv").exists() and not (house / ".uv").exists()


@pytest.mark.process
def test_where_uv_comes_from(house: Path, tmp_path: Path) -> None:
    python = bare_python(tmp_path / "bare")
    nothing = wrapped(tmp_path / "nothing", python, "-m\\ pip*|-m\\ venv*|*ensurepip*) exit 1;;")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"

    def plan(interpreter: Path) -> subprocess.CompletedProcess[str]:
        return set_up(house, interpreter, "--plan", PATH=path)

    assert "uv: with pip\n" in plan(wrapped(tmp_path / "pip", python, "-m\\ pip*) exit 0;;")).stdout
    if importlib.util.find_spec("ensurepip"):
        assert "uv: with pip of a temporary virtual environment\n" in plan(python).stdout
    if not shutil.which("uv", path=path):
        refused = plan(nothing)
        assert refused.returncode == 2
        assert refused.stderr.startswith(
            f"error: {nothing} has neither pip nor ensurepip; install one (Debian: apt-get"
        )
        assert refused.stderr.count("\n") == 1
    wrapped_uv = tmp_path / "bin" / "uv"
    wrapped_uv.parent.mkdir()
    wrapped(wrapped_uv, "/bin/true", "")
    assert "uv: from the PATH\n" in plan(nothing).stdout
    (house / ".uv" / "bin").mkdir(parents=True)
    wrapped(house / ".uv" / "bin" / "uv", "/bin/true", "")
    assert "uv: in .uv already\n" in plan(nothing).stdout
    assert not (house / ".venv").exists()


@pytest.mark.parametrize(
    ("modules", "line"),
    [
        ({}, "torch: the pair of constraints.txt\n"),
        ({"torch": "2.9.0+cu129", "torchvision": "0.24.0+cu129"}, "torch: kept, 2.9.0+cu129 in {folder}\n"),
        ({"torch": STAND_IN_TORCH, "torchvision": "0.99"}, "torch: kept, 2.99.0+rocm7.9 in {folder}\n"),
        (
            {"torch": "2.8.1", "torchvision": "0.23"},
            "torch: the pair of constraints.txt (torch 2.8.1 in {folder} is older than 2.9)\n",
        ),
        (
            {"torch": "2.13.0"},
            "torch: the pair of constraints.txt (torch 2.13.0 in {folder} has no torchvision that imports)\n",
        ),
    ],
)
@pytest.mark.process
def test_which_torch_is_used(house: Path, tmp_path: Path, modules: dict[str, str], line: str) -> None:
    python = bare_python(tmp_path / "bare")
    for name, version in modules.items():
        add_module(python, name, version)
    assert line.format(folder=site_packages(python)) in set_up(house, python, "--plan").stdout


@pytest.mark.process
def test_the_torch_that_the_set_up_installed_is_not_one_to_keep(house: Path) -> None:
    """With .venv activated, `python3` is the one in it."""
    python = bare_python(house / ".venv")
    for name in ("torch", "torchvision"):
        add_module(python, name, "2.13.0")
    assert "torch: the pair of constraints.txt\n" in set_up(house, python, "--plan").stdout


# --- a whole set-up, with stand-ins for the packages


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes | str]) -> None:
    stem = f"{re.sub('[-_.]+', '_', name)}-{version}"
    info = f"{stem}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **{path.replace("DIST-INFO", info): text for path, text in files.items()},
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            wheel.writestr(entry, text)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, uv: str) -> Path:
    """Wheels of every package installed here: nothing in them but the real metadata, save for setuptools and uv."""
    if installed_version("torch") != pins()["torch"]:
        pytest.skip("runs with a torch of the machine's own: the pinned one's metadata is not here")
    folder = tmp_path_factory.mktemp("wheels")
    for dist in metadata.distributions():
        name, text = dist.metadata["Name"], dist.read_text("METADATA")
        if not text or canonicalize_name(name) in ("instella-ray", "uv"):
            continue
        files: dict[str, bytes | str] = {"DIST-INFO/METADATA": text}
        if name == "setuptools":  # it builds the package
            paths = [p for p in dist.files or [] if p.suffix != ".pyc" and not str(p).startswith("..")]
            files |= {str(p): Path(str(p.locate())).read_bytes() for p in paths if p.name != "RECORD"}
        write_wheel(folder, name, dist.version, files)
    version = pins()["uv"]
    write_wheel(folder, "uv", version, {f"uv-{version}.data/scripts/uv": f'#!/bin/sh\nexec "{uv}" "$@"\n'})
    return folder


def installed_in(house: Path) -> set[str]:
    folders = (house / ".venv").glob("lib/python*/site-packages/*.dist-info")
    return {canonicalize_name(folder.name.split("-")[0]) for folder in folders}


def offline(tmp_path: Path, stand_ins: Path) -> dict[str, str]:
    if not importlib.util.find_spec("ensurepip"):
        pytest.skip("this Python cannot make pip: the set-up would refuse the bare one")
    (tmp_path / "uv.toml").write_text(f'no-index = true\nfind-links = ["{stand_ins}"]\n')
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(stand_ins),
        "UV_CONFIG_FILE": str(tmp_path / "uv.toml"),
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }


@pytest.mark.process
def test_without_a_torch_the_pinned_pair_is_installed(house: Path, tmp_path: Path, stand_ins: Path) -> None:
    """The control of the next test; and Python has no pip here, and the path has a space."""
    done = set_up(house, bare_python(tmp_path / "bare"), **offline(tmp_path, stand_ins))
    assert done.returncode == 0, done.stderr
    found = installed_in(house)
    assert {"torch", "torchvision", "triton", "ray", "timm", "instella-ray"} <= found
    assert any(name.startswith("nvidia-") for name in found)
    script = house / ".venv" / "bin" / "instella-ray"
    python = house / ".venv" / "bin" / "python"
    assert script.is_file()
    code = "import instella_ray; print(instella_ray.__path__[0])"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean_environment())
    assert where.stdout.strip() == str(house / "instella_ray")


@pytest.mark.process
@pytest.mark.nightly
def test_a_torch_that_python_brings_is_kept(house: Path, tmp_path: Path, stand_ins: Path) -> None:
    python, environment = bare_python(tmp_path / "bare"), offline(tmp_path, stand_ins)
    add_module(python, "torch", STAND_IN_TORCH)
    add_module(python, "torchvision", "0.99.0+rocm7.9")
    inner = house / ".venv" / "bin" / "python"

    def check(done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stderr
        assert f"torch: kept, {STAND_IN_TORCH} in {site_packages(python)}\n" in done.stdout
        found = installed_in(house)
        assert {"ray", "timm", "lpips", "transformers", "instella-ray"} <= found
        assert sorted(name for name in found if OF_TORCH.fullmatch(name)) == []
        code = "import torch, torchvision; print(torch.__version__)"
        seen = subprocess.run([inner, "-c", code], capture_output=True, text=True, env=clean_environment())
        assert seen.stdout.strip() == STAND_IN_TORCH, seen.stderr

    check(set_up(house, python, **environment))
    check(set_up(house, python, **environment))  # again, over what is there
    check(set_up(house, inner, **environment))  # and from the activated environment


@pytest.mark.process
@pytest.mark.nightly
def test_a_torch_that_came_later_takes_over(house: Path, tmp_path: Path, stand_ins: Path) -> None:
    python, environment = bare_python(tmp_path / "bare"), offline(tmp_path, stand_ins)
    assert set_up(house, python, **environment).returncode == 0
    add_module(python, "torch", STAND_IN_TORCH)
    add_module(python, "torchvision", "0.99")
    assert set_up(house, python, **environment).returncode == 0
    assert not {"torch", "torchvision", "triton"} & installed_in(house)
