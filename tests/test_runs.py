"""Run records: how each attempt ended stays known, and a record that cannot be read is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from instella_ray import __version__, runs, storage
from instella_ray.config import Config
from instella_ray.errors import UserError
from instella_ray.runs import Provenance, RunRecord, code_label, code_version, read_record, recorded


class Settings(Config):
    """Of a job."""

    rows: int = 3


READ = (Provenance(role="shards", kind="files", path="a/*.tar", identity="0" * 64),)


def record_of(folder: Path) -> RunRecord:
    record = read_record(str(folder))
    assert record is not None
    return record


def test_a_record_says_who_made_a_folder_from_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTELLA_RAY_RUN_ID", "night-7")
    with recorded(str(tmp_path), "curate", Settings(), READ) as outputs:
        assert record_of(tmp_path).attempts[0].status == "running"
        outputs.append(Provenance(role="shards", kind="data", path="b"))
    record = record_of(tmp_path)
    (attempt,) = record.attempts
    assert (record.run, record.job, record.inputs) == ("night-7", "curate", READ)
    assert [each.path for each in record.outputs] == ["b"]
    assert attempt.status == "finished" and attempt.config == {"rows": 3} and attempt.command == tuple(sys.argv)
    assert attempt.ended is not None and attempt.started <= attempt.ended
    assert attempt.code["version"] == __version__ and {"python", "ray", "torch"} == set(attempt.versions)


def test_attempts_are_a_list_that_says_how_each_ended(tmp_path: Path) -> None:
    for error in (UserError("no room"), KeyboardInterrupt()):
        with pytest.raises(type(error)), recorded(str(tmp_path), "encode", Settings(), READ):
            raise error
    with recorded(str(tmp_path), "encode", Settings(rows=4), READ):
        pass
    attempts = record_of(tmp_path).attempts
    assert [each.status for each in attempts] == ["failed", "interrupted", "finished"]
    assert attempts[0].error == "UserError: no room" and attempts[2].error is None
    assert [each.config["rows"] for each in attempts] == [3, 3, 4]


def test_an_attempt_that_ends_late_does_not_undo_what_a_newer_one_wrote(tmp_path: Path) -> None:
    with recorded(str(tmp_path), "train", Settings(), READ) as old:
        with recorded(str(tmp_path), "train", Settings(), ()) as new:
            new.append(Provenance(role="checkpoint", kind="model", path="new"))
        old.append(Provenance(role="checkpoint", kind="model", path="old"))
    record = record_of(tmp_path)
    assert [each.status for each in record.attempts] == ["finished", "finished"] and record.inputs == ()
    assert [each.path for each in record.outputs] == ["new"]


def test_a_store_that_refuses_the_last_word_does_not_fail_the_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def refuse(url: str, value: object) -> None:
        raise OSError("quota")

    monkeypatch.setattr(runs.log.parent, "propagate", True)
    with recorded(str(tmp_path), "sample", Settings(), READ):
        monkeypatch.setattr(storage, "write_json", refuse)
    assert "run.json: could not be written (OSError: quota)" in caplog.text


@pytest.mark.parametrize("text", ['{"schema_version": 2}', "[]", "{"])
def test_a_record_of_another_version_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: not "):
        read_record(str(tmp_path))


def test_code_is_named_by_version_commit_and_changes() -> None:
    assert code_label({"version": "1.0"}) == "1.0"
    assert (
        code_label({"version": "1.0", "commit": "abcdef0123456789", "dirty": True})
        == "1.0 at abcdef012345 with changes"
    )
    checkout = (Path(runs.__file__).parents[1] / ".git").exists()
    assert ("commit" in code_version()) == checkout
