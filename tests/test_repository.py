"""Rules of the house that a program can check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from instella_ray import cli
from instella_ray.config import Config, job_config

from .conftest import MARKERS
from .kit.project import DEPLOY, JOBS, MAKEFILE, PACKAGE, PROJECT, ROOT, SIMULATIONS, job, texts, tracked
from .tiers import PARTS, TIERS

# From the ground up: a room imports from the floors below its own, and from nothing beside it.
FLOORS = [
    {"logs"},
    {"errors", "retries"},
    {"transient"},
    {"config", "storage", "packages", "accelerator", "rendering"},
    {"models", "runs"},
    {"flops", "engine"},
    {"data"},
    {"training"},
    {"serving", "bulk"},
    {"evaluation"},
    {"planning"},
    {"demo", "bench", "operations"},
    {"cli"},
]
WITHOUT_RAY = (
    "models",
    "flops.py",
    "engine",
    "serving/batching.py",
    "serving/runner.py",
    "serving/safety.py",
    "data/scenes.py",
    "data/formats",
    "data/generation/captioner.py",
    "data/generation/diffusers_pipeline.py",
    "data/prompts.py",
    "evaluation/metrics",
    "evaluation/statistics.py",
    "bulk/sampler.py",
    "bulk/sample_set.py",
    "planning/simulation",
)
# Which job reads the files of a folder of configs/, and what it needs beside them.
JOB_OF = {
    "data/curate": ("curate", ["input=a", "output=b"]),
    "data/recaption": ("recaption", ["input=a", "output=b"]),
    "data/synthesize": ("synthesize", ["prompts=a", "output=b"]),
    "data/encode": ("encode", ["input=a", "output=b", "tokenizer=c"]),
    "tokenizer": ("train_tokenizer", []),
    "generator": ("train_generator", []),
    "serve": ("serve", []),
    "sample": ("sample", []),
    "bench": ("bench", []),
    "evaluation": ("evaluate", ["samples=a", "output=b"]),
    "evaluation/reconstruction": ("evaluate", ["images=a", "tokenizer=b", "output=c"]),
}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in (DEPLOY, *SIMULATIONS))


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, inside functions too."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# --- code


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms - set().union(*FLOORS) == set()


def test_rooms_import_only_from_floors_below() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = set()
    for path in PACKAGE.rglob("*.py"):
        here = room_of(path)
        for name in imports(path):
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "instella_ray" and room in floor and room != here and floor[room] >= floor.get(here, -1):
                wrong.add((str(path.relative_to(PACKAGE)), room))
    assert wrong == set()


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that a file of it imports, inside functions too; not what is imported for types alone."""
    found = set()
    for name in imports(path):
        while name and not (ROOT / Path(*name.split("."))).with_suffix(".py").is_file():
            name = name.rpartition(".")[0]
        found |= {name} if name.startswith(f"{PACKAGE.name}.") else set()
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): modules_imported(p) for p in PACKAGE.rglob("*.py")}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    # What is left imports a circle, or is in one.
    while tops := graph.keys() - set().union(*graph.values()):
        graph = {module: needs for module, needs in graph.items() if module not in tops}
    assert sorted(graph) == []


def test_formats_know_nothing_of_what_is_done_with_them() -> None:
    others = {".".join(("instella_ray.data", room)) for room in ("curation", "generation", "loading", "job", "encode")}
    files = (PACKAGE / "data" / "formats").glob("*.py")
    found = {(path.name, name) for path in files for name in modules_imported(path)}
    assert [pair for pair in found if pair[1].startswith(tuple(others))] == []


def test_files_from_outside_are_opened_in_formats_alone() -> None:
    """One reader for each kind of them, or the same fault is mended in one job and not in the others."""
    readers = re.compile(r"\b(Image\.open|tarfile\.open|fsspec\.core|url_to_fs)\(")
    allowed = {PACKAGE / "data" / "formats", PACKAGE / "storage.py"}
    files = [path for path in PACKAGE.rglob("*.py") if allowed.isdisjoint((path, *path.parents))]
    assert [f"{path}: {found[0]}" for path in files if (found := readers.search(path.read_text()))] == []


def test_no_class_name_stands_twice() -> None:
    """A class says what it is the task, the worker or the limits *of*."""
    names = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name, times in Counter(names).items() if times > 1) == []


@pytest.mark.parametrize("part", WITHOUT_RAY)
def test_models_samplers_and_engine_never_import_ray(part: str) -> None:
    path = PACKAGE / part
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    assert files
    assert [f"{f}: {name}" for f in files for name in imports(f) if name.split(".")[0] == "ray"] == []


@pytest.mark.process
def test_curation_its_workers_and_the_loader_never_load_torch() -> None:
    """Half of what a worker's start would take, and most of its memory; filters with networks load it where they run.

    Training's batches are made without it too: tests/data/loading/test_loader.py makes some.
    """
    modules = ("curation.job", "curation.prefilter", "views", "formats.codes", "loading.loader", "loading.image_data")
    parts = ", ".join(f"instella_ray.data.{name}" for name in modules)
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_can_be_read_in_one_sitting() -> None:
    by_machine = ("LICENSE", "constraints.txt")

    def longest(path: str, text: str) -> int:
        """Lines; a page is three texts in one file: its style, its elements and its script."""
        parts = re.split(r"^</?(?:style|script)\b", text, flags=re.M) if path.endswith(".html") else [text]
        return max(len(part.splitlines()) for part in parts)

    assert {p: n for p, text in texts() if p not in by_machine and (n := longest(p, text)) > 400} == {}


def test_nothing_is_left_to_do_or_hollow() -> None:
    marks = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b")
    left = [f"{path}: {match[0]}" for path, text in texts() if (match := marks.search(text))]
    for path in python_files():
        tree = ast.parse(path.read_text())
        interfaces = {
            id(function)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in ("Protocol", "ABC") for base in node.bases)
            for function in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in interfaces:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                hollow = [isinstance(x, ast.Pass) or ast.unparse(x) == "..." for x in body]
                if body and all(hollow):
                    left.append(f"{path.relative_to(ROOT)}: {node.name} does nothing")
    assert left == []


# --- jobs, commands and configurations


def test_jobs_do_no_work_at_import() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Expr, ast.If)
    assert JOBS
    for path in JOBS:
        tree = ast.parse(path.read_text())
        assert all(isinstance(node, allowed) for node in tree.body), path
        assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.parametrize("name", [path.stem for path in JOBS])
def test_every_job_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        job(name)(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: {name}.py" in out and "--config FILE" in out and "configuration keys:" in out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M)
    assert "demo" in commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0 and f"usage: instella-ray {command}" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_configuration_loads_into_its_job(path: Path) -> None:
    relative = path.relative_to(ROOT / "configs").with_suffix("")
    name, given = JOB_OF.get(str(relative)) or JOB_OF[str(relative.parent)]
    overrides = [word for item in given for word in ("--set", item)]
    assert isinstance(job_config(job(name), ["--config", str(path), *overrides]), Config)


def test_every_job_has_a_configuration_to_start_from() -> None:
    assert {name for name, _ in JOB_OF.values()} == {path.stem for path in JOBS}
    assert all(list((ROOT / "configs").glob(f"{key}*")) for key in JOB_OF)


# --- the files around the code


def test_no_package_index_and_no_machine_is_named() -> None:
    address = re.compile(
        r"https?://\S*(?:/simple\b|/whl\b|pypi|conda|artifactory|nexus)"
        r"|\b[\w-]*pypi[\w-]*\.\w{2,}|pythonhosted\.\w|index[-]url|trusted[-]host"
        r"|(?<![\w.~])/(?:work|root|home)/\w"
    )
    assert [f"{path}: {match[0]}" for path, text in texts() if (match := address.search(text))] == []


def test_the_readme_names_every_folder_and_room() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The house")[1].split("```")[1]
    folders = {p.relative_to(ROOT).parts[0] for p in tracked() if p.parent != ROOT}
    rooms = {room_of(p) for p in tracked() if p.is_relative_to(PACKAGE) and p.parent != PACKAGE}
    modules = {p.name for p in tracked() if p.parent == PACKAGE and p.suffix == ".py"} - {"__init__.py"}
    named = set(re.findall(r"(?:^|\s)([\w.]+)/(?=\s|$)", tree, re.M))
    assert named == folders | rooms
    assert {name for name in modules if not re.search(rf"^  .*\b{re.escape(name)}(\s|$)", tree, re.M)} == set()


def test_markers_are_declared_and_every_test_is_in_one_part() -> None:
    declared = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    of_pytest = {"parametrize", "skipif", "skip", "xfail", "usefixtures", "filterwarnings"}
    used = {name for path in python_files() for name in re.findall(r"pytest\.mark\.(\w+)", path.read_text())}
    assert used - of_pytest <= declared and set(MARKERS) == declared
    others = sorted(declared - {"unit"})
    for markers in ({"unit"}, *({*names} for count in (1, 2) for names in combinations(others, count))):
        chosen = [part for part in TIERS["all"] if eval(PARTS[part][0], {}, {m: m in markers for m in declared})]
        assert len(chosen) == 1, (markers, chosen)
        assert (chosen[0] in TIERS["default"]) == ("nightly" not in markers)


def test_no_module_imports_a_file_of_tests() -> None:
    """What several of them need is in ``tests/kit``: any file of tests can be read, run and deleted by itself."""
    files = [path for path in python_files() if path.is_relative_to(ROOT / "tests")]
    of_tests = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.match("test_*.py")}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports(path)
        if not of_tests.isdisjoint((name, name.rpartition(".")[0]))
    ]
    assert of_tests and found == []


def test_unit_tests_are_of_one_process(request: pytest.FixtureRequest) -> None:
    """Neither they nor what their file gives them begin another."""
    trees: dict[Path, set[str]] = {}
    found = []
    for item in request.session.items:
        if item.get_closest_marker("unit"):
            if item.path not in trees:
                trees[item.path] = functions_with_processes(item.path)
            found += [item.nodeid] if item.originalname in trees[item.path] else []  # type: ignore[attr-defined]
    assert found == []


def functions_with_processes(path: Path) -> set[str]:
    """Functions at the top of a file that start a process, or name one that does."""
    top = ast.parse(path.read_text()).body
    names = {node.name: set(re.findall(r"\w+(?:\.\w+)*", ast.unparse(node))) for node in top if hasattr(node, "name")}
    found = {name for name, words in names.items() if words & {f"subprocess.{start}" for start in ("run", "Popen")}}
    while more := {name for name, words in names.items() if words & found} - found:
        found |= more
    return found


def test_tests_that_start_ray_are_marked(request: pytest.FixtureRequest) -> None:
    started = [item for item in request.session.items if "ray_session" in getattr(item, "fixturenames", ())]
    assert [item.nodeid for item in started if not item.get_closest_marker("ray")] == []


def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert recipe

    def tool(command: str) -> str:
        """Without what differs by purpose: make says what is wrong with all files, a hook mends those of a commit."""
        return re.sub(r"^(\$\(BIN\)|\.venv/bin)/| (--fix|--check|\.)(?= |$)", "", command)

    assert [tool(hook["entry"]) for hook in hooks] == [tool(line.strip()) for line in recipe[1].splitlines()]
    assert all(hook["language"] == "system" for hook in hooks)
    from pre_commit.clientlib import load_config as load_hooks

    load_hooks(str(ROOT / ".pre-commit-config.yaml"))


@pytest.mark.process
def test_make_explains_itself() -> None:
    out = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert targets
    assert [name for name in targets[1].split() if not re.search(rf"\bmake {name}\b", out)] == []
    assert all(re.search(rf"^{name}:", MAKEFILE, re.M) for name in targets[1].split())


@pytest.mark.process
def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    found = ROOT / ".uv" / "bin" / "uv"
    uv = str(found) if found.exists() else shutil.which("uv")
    if not uv:
        pytest.skip("no uv here: run make venv")
    files = {str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(PACKAGE)}
    source = tmp_path / "source"
    for name in (*files, "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # As the later rooms will have them: a page beside the code that serves it.
    (source / "instella_ray" / "serving" / "page.html").write_text("<p>hello</p>")
    command = [uv, "build", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable]
    done = subprocess.run([*command, "-o", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files | {"instella_ray/serving/page.html"}
    assert any(name.endswith(".j2") for name in packed)
