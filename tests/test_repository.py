"""Rules of the repository that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from instella_ray.config import Config
from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.demo.recipe import DemoConfig
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.planning.plan import PlanOptions
from instella_ray.planning.simulation.run import SimulateConfig

from .conftest import MARKERS
from .kit.project import (
    DEPLOY,
    JOBS,
    MAKEFILE,
    PACKAGE,
    PROJECT,
    ROOT,
    SIMULATIONS,
    imports,
    job,
    job_config,
    python_files,
    texts,
)
from .tiers import PARTS, TIERS

# Which job reads the files of a folder of configs/, and what it needs beside them.
JOB_OF = {
    "data/curate": ("curate", ["input=a", "output=b"]),
    "data/folder": ("curate", ["input=a", "output=b"]),
    "paper/01-curate": ("curate", ["input=a", "output=b"]),
    "paper/02-recaption": ("recaption", ["input=a", "output=b"]),
    "paper/03-synthesize": ("synthesize", ["prompts=a", "output=b"]),
    "paper/04-import-dalle": ("curate", ["input=a", "output=b"]),
    "paper/05-tokenizer": ("train_tokenizer", []),
    "paper/06-evaluate-table2": ("evaluate", ["images=a", "tokenizer=b", "output=c"]),
    "paper/07-encode": ("encode", ["input=a", "output=b", "tokenizer=c"]),
    "paper/08-diffusion": ("train_generator", []),
    "paper/09-autoregressive": ("train_generator", []),
    "paper/sample": ("sample", []),
    "paper/evaluate": ("evaluate", ["samples=a", "output=b"]),
    "paper/21-synthesize-appendix-g": ("synthesize", ["prompts=a", "output=b"]),
    "icons/build": ("icons", ["output=a"]),
    "icons/curate": ("curate", ["input=a", "output=b"]),
    "icons/tokenizer": ("train_tokenizer", []),
    "icons/encode": ("encode", ["output=a"]),
    "icons/diffusion": ("train_generator", []),
    "icons/ar": ("train_generator", []),
    "data/encode": ("encode", ["input=a", "output=b", "tokenizer=c"]),
    "tokenizer": ("train_tokenizer", []),
    "generator": ("train_generator", []),
    "icons/classifier": ("train_classifier", ["output=a"]),
    "icons/sample": ("sample", ["sample.model=a", "sample.output=b"]),
    "icons/evaluate": ("evaluate", ["samples=a", "output=b"]),
    "serve": ("serve", []),
    "sample": ("sample", []),
    "bench": ("bench", []),
    "bench/gpu": ("bench_gpu", []),
    "evaluation": ("evaluate", ["samples=a", "output=b"]),
    "evaluation/reconstruction": ("evaluate", ["images=a", "tokenizer=b", "output=c"]),
}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in (DEPLOY, *SIMULATIONS))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_configuration_loads_into_its_job(path: Path) -> None:
    assert isinstance(loaded(path), Config)


def kind(recipe: Path) -> str:
    """The key of recipes of the paper that are read alike: ``paper/10-sample-geneval`` is of ``paper/sample``."""
    return f"{recipe.parent}/{recipe.name.split('-')[1]}" if recipe.parent.name == "paper" else ""


def loaded(path: Path) -> Config:
    """A configuration file as its job loads it."""
    relative = path.relative_to(ROOT / "configs").with_suffix("")
    name, given = JOB_OF.get(str(relative)) or JOB_OF.get(kind(relative)) or JOB_OF[str(relative.parent)]
    overrides = [word for item in given for word in ("--set", item)]
    return job_config(name, ["--config", str(path), *overrides])


def configurations() -> set[type[Config]]:
    """All that jobs and commands are configured with, down to the last section."""
    found: set[type[Config]] = set()
    new: set[type[Config]] = {DemoConfig, PlanOptions, SimulateConfig, *(type(loaded(path)) for path in CONFIGS)}
    while new:
        found |= new
        new = {section for cls in new for field in cls.model_fields.values() for section in sections(field.annotation)}
        new -= found
    return found


def sections(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def test_every_key_is_read_somewhere() -> None:
    """An option that nothing reads does nothing. Of filters and metrics each section is read in turn."""
    trees = [ast.parse(path.read_text()) for folder in (PACKAGE, ROOT / "jobs") for path in folder.rglob("*.py")]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = {f"{cls.__name__}.{name}" for cls in configurations() for name in cls.model_fields if name not in read} - {
        f"{cls.__name__}.{name}" for cls in (FilterConfig, MetricsConfig) for name in cls.model_fields
    }
    assert sorted(unread) == []


def test_every_job_has_a_configuration_to_start_from() -> None:
    assert {name for name, _ in JOB_OF.values()} == {path.stem for path in JOBS}
    assert all(
        list((ROOT / "configs").glob(f"{key}*")) or list((ROOT / "configs").glob(f"{key.replace('/', '/*-')}*"))
        for key in JOB_OF
    )


# --- the files around the code


def test_no_package_index_and_no_machine_is_named() -> None:
    address = re.compile(
        r"https?://\S*(?:/simple\b|/whl\b|pypi|conda|artifactory|nexus)"
        r"|\b[\w-]*pypi[\w-]*\.\w{2,}|pythonhosted\.\w|index[-]url|trusted[-]host"
        r"|(?<![\w.~])/(?:work|root|home)/\w"
    )
    assert [f"{path}: {match[0]}" for path, text in texts() if (match := address.search(text))] == []


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
