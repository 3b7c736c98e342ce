"""What goes with a job: the code and configurations, and neither data nor weights nor what git ignores."""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from instella_ray.config import Config
from instella_ray.errors import UserError
from instella_ray.operations import packing
from instella_ray.operations.packing import EXCLUDES, Patterns, find_package
from instella_ray.runs import recorded

from ..kit.project import ROOT, tracked

WANTED = {"instella_ray/demo/run.py", "jobs/mine.py", "configs/a.yaml", "notes.txt", "out/metrics.jsonl.txt"}
UNWANTED = {
    *(".venv/bin/python", "__pycache__/a.pyc", "jobs/__pycache__/a.pyc", ".mypy_cache/x", "instella_ray.egg-info/PKG"),
    *("demo/report.html", "demo-tiny/state.json", "runs/bench.json", "models/bit/model.safetensors"),
    *("curated/0.tar", "codes/0.parquet", "secret/keys.txt", "big.log"),
    *("trained/config.yaml", "trained/metrics.jsonl", "trained/previews/1.png"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in WANTED | UNWANTED:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "project" / ".gitignore").write_text("/secret/\n*.log\n")
    return tmp_path / "project"


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def output(folder: Path) -> Path:
    """What a job has left in the project's folder."""
    made = folder / "measured" / "today"
    with recorded(str(made), "evaluate", Config(), ()):
        (made / "images").mkdir()
        (made / "images" / "1.png").touch()
        (made / "report.html").touch()
    return made


@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "no checkout"])
@pytest.mark.process
def test_code_and_configurations_are_packed_and_nothing_else(folder: Path, output: Path, checkout: bool) -> None:
    if checkout:
        git(folder, "init")
        git(
            folder, "add", "jobs/mine.py", "configs", "curated/0.tar"
        )  # untracked files go along, tracked data does not
    assert set(find_package(folder).sizes) == WANTED | {".gitignore"}


def test_a_file_of_the_name_of_a_run_record_keeps_no_code_out(folder: Path) -> None:
    (folder / "jobs" / "run.json").write_text('{"version": 1}')
    assert {"jobs/mine.py", "jobs/run.json"} <= set(find_package(folder).sizes)


def test_outputs_that_the_docs_name_are_ignored_by_git_and_the_code_is_not() -> None:
    shown = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = set(re.findall(r"\b(?:output|run_dir)=([\w-]+)|--folder ([\w-]+)|--output ([\w.-]+\.html)", shown))
    outputs = {name for names in named for name in names if name and not name.isupper()} - {"gs"}
    settings = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs").rglob("*.yaml")]
    for section in (each for config in settings for each in (config, *config.values()) if isinstance(each, dict)):
        outputs |= {str(section[key]).split("/")[0] for key in ("output", "run_dir") if key in section}
    assert {"runs", "samples", "samples-table3"} <= outputs
    ignored = Patterns.read(ROOT / ".gitignore")
    assert [name for name in outputs | {"demo", "demo-own"} if not ignored.match(ROOT / name, "/")] == []
    assert [path for path in tracked() if ignored.match(path)] == []


@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "no checkout"])
@pytest.mark.parametrize(
    ("ignore_files", "left_out"),
    [
        ({".gitignore": "*.txt\n!keep.txt"}, {"a.txt", "sub/a.txt", "sub/deep/a.txt"}),
        ({".gitignore": "deep/"}, {"sub/deep/a.txt", "sub/deep/keep.txt", "sub/deep/b.md"}),  # the file deep stays
        ({".gitignore": "/a.txt\nsub/*\n!sub/b.md"}, {"a.txt", "sub/a.txt", "sub/keep.txt", "sub/deep/*"}),
        ({".gitignore": "keep.txt", "sub/.gitignore": "/a.txt\n*.md"}, {"**/keep.txt", "sub/a.txt", "sub/**/b.md"}),
        ({".gitignore": "*.md", ".rayignore": "*.txt\n!keep.txt"}, {"**/*.md", "**/a.txt"}),
        ({".rayignore": "a.txt", "sub/.rayignore": "deep/"}, {"**/a.txt", "sub/deep/*"}),
    ],
    ids=["negation", "folder", "contents", "nested", "rayignore", "nested rayignore"],
)
@pytest.mark.process
def test_ignore_files_leave_out_what_rays_own_packages_leave_out(
    tmp_path: Path, ignore_files: dict[str, str], left_out: set[str], checkout: bool
) -> None:
    root = tmp_path / "project"
    for folder in ("", "sub/", "sub/deep/"):
        for name in ("a.txt", "keep.txt", "b.md"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_text(name)
    (root / "deep").write_text("a file")
    for name, text in ignore_files.items():
        (root / name).write_text(text)
    gone = {path for pattern in left_out for path in root.glob(pattern)}
    kept = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path not in gone}
    create_package(str(root), tmp_path / "ray.zip", include_gitignore=True, excludes=list(EXCLUDES))
    if checkout:
        git(root, "init")
        git(root, "add", ".")  # .rayignore holds for what git tracks, too
    packed = set(find_package(root).sizes)
    assert packed == kept
    with zipfile.ZipFile(tmp_path / "ray.zip") as archive:
        assert packed == {name for name in archive.namelist() if not name.endswith("/")}


def test_a_package_of_the_same_files_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    find_package(folder).write(tmp_path / "a.zip")
    os.utime(folder / "jobs" / "mine.py", (1, 1))
    find_package(folder).write(tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("jobs/mine.py") == b"jobs/mine.py" and set(archive.namelist()) == WANTED | {".gitignore"}


def test_too_much_is_refused_and_the_largest_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LIMIT", 1 << 20)
    for name, size in {"video.bin": 3 << 20, "deep/table.csv": 2 << 20}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    with pytest.raises(
        UserError, match=r"5\.0 MiB to pack, expected at most 1\.0 MiB.*video\.bin 3\.0 MiB, deep/table"
    ):
        find_package(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--working-dir .*nowhere: expected a folder"):
        find_package(tmp_path / "nowhere")


def test_this_project_packs_its_own_jobs_and_rooms() -> None:
    package = find_package(ROOT)
    assert {"jobs/curate.py", "configs/generator/tiny.yaml", "instella_ray/demo/run.py"} <= set(package.sizes)
    assert package.total < 20 << 20
