"""Errors: what the user can mend is one line with exit code 2, and a fault of the package stays a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from ray.exceptions import RayTaskError

from instella_ray import cli, storage
from instella_ray.errors import UserError, run_main

from .kit.project import ROOT, job
from .kit.shards import contents, image_bytes, tar_bytes


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_a_path_that_cannot_be_used_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(number, os.strerror(number), "/data/out")

    def fail() -> None:
        raise error

    def fail_on_a_worker() -> None:
        raise RayTaskError("write", "Traceback ...", error).as_instanceof_cause()

    reason = os.strerror(number)
    expected = f"error: /data/out: {reason[0].lower()}{reason[1:]}"
    for command in (fail, fail_on_a_worker):
        assert run_main(command) == 2
        assert refused(capsys) == expected


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/package/page.html"),
        FileExistsError(errno.EEXIST, "File exists", "/tmp/scratch"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a signal: names no path
        OSError("nothing known"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_errors_that_may_be_faults_of_the_package_stay_tracebacks(error: OSError) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_main(fail)


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "a.tar"
    kinds = (("jpg", image_bytes()), ("txt", b"a"))
    path.write_bytes(tar_bytes([(f"{number}.{end}", data) for number in range(4) for end, data in kinds]))
    return str(path)


def test_an_error_that_a_worker_finds_is_as_short_as_one_found_here(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_on_a_worker() -> None:
        raise RayTaskError("read", "Traceback ...", UserError("a.parquet: no column with images")).as_instanceof_cause()

    assert run_main(fail_on_a_worker) == 2
    assert refused(capsys) == "error: a.parquet: no column with images"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of its own, mounted with the given options, and again with others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk can be mounted by root only")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.ray
def test_a_full_and_a_read_only_disk_are_one_line_and_a_resume_is_exact(
    ray_session: None,
    disk: Callable[[str], Path],
    shard: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def curate(output: Path, mode: str = "new") -> int:
        sets = [f"input={shard}", f"output={output}", f"mode={mode}", "filters={resolution: {target_size: 16}}"]
        sets.append("filters.caption_length=null")
        return run_main(lambda: job("curate")([word for each in sets for word in ("--set", each)]))

    assert curate(tmp_path / "whole") == 0
    capsys.readouterr()
    out = disk("size=12k") / "out"
    assert curate(out) == 2
    said = capsys.readouterr().err.replace("\r", "\n")
    *_, line = said.splitlines()
    assert "Traceback" not in said
    assert line.startswith(f"error: {out}/") and line.endswith(": no space left on device")
    disk("remount,size=9m")
    assert curate(out, "resume") == 0
    assert contents(out) == contents(tmp_path / "whole")
    capsys.readouterr()
    disk("remount,ro")
    assert curate(out.parent / "other") == 2
    assert refused(capsys) == f"error: {out.parent}/other: read-only file system"


@pytest.mark.parametrize("below", ["", "/out"])
def test_a_job_whose_output_lies_below_a_file_is_refused_in_one_line(
    below: str, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    output = f"{file}/x{below}"
    jobs = {
        "curate": ["--local", "--set", f"input={shard}", "--set", f"output={output}"],
        "train_tokenizer": [
            *("--config", str(ROOT / "configs/tokenizer/tiny.yaml"), "--set", f"data={shard}"),
            *("--set", f"train.run_dir={output}", "--set", "train.workers.count=0"),
        ],
    }
    for name, argv in jobs.items():
        main = job(name)
        assert run_main(lambda main=main, argv=argv: main(argv)) == 2, name  # type: ignore[misc]
        assert refused(capsys) == f"error: {file}/x: not a directory"
    assert cli.main(["demo", "--tiny", "--folder", output]) == 2
    assert refused(capsys) == f"error: {file}/x: not a directory"


def test_a_folder_without_permission_to_write_is_one_line(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object, path: str, mode: str = "rb", **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(LocalFileSystem, "_open", refuse)
    argv = ["--local", "--set", f"input={shard}", "--set", f"output={tmp_path}/out"]
    assert run_main(lambda: job("curate")(argv)) == 2
    line = refused(capsys)
    assert line.startswith(f"error: {tmp_path}/") and line.endswith(": permission denied") and ".tmp" not in line


def test_a_store_that_names_no_path_in_its_refusal_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object, path: str, mode: str = "rb", **_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    for command in (lambda: storage.write_json("memory://box/a.json", {}), lambda: storage.read_json("memory://box/a")):
        with pytest.raises(PermissionError, match="memory://box/a"):
            command()
        assert run_main(command) == 2
        assert refused(capsys).startswith("error: memory://box/a")


def test_a_disk_without_space_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with storage.open_file(f"{tmp_path}/a.bin", "wb"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as write() raises it: without a path

    assert run_main(write) == 2
    assert refused(capsys) == f"error: {tmp_path}/a.bin: no space left on device"
    assert list(tmp_path.iterdir()) == []
