"""The tiers' runner: every part is run, one summary names what failed and what took too long, and the exit code says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import tiers
from .tiers import Outcome, summarise

BAD = """
import pytest

def test_bad():
    assert 1 == 2

@pytest.fixture
def torn():
    yield
    assert 3 == 4

def test_torn(torn):
    assert 5 == 6

def test_skipped():
    pytest.skip("not today")
"""


@pytest.mark.process
def test_a_part_that_fails_keeps_no_other_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"bad": BAD, "good": "def test_good(): pass", "broken": "import nothing_of_that_name"}
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    options = ("-p", "no:cacheprovider", "-c", "/dev/null", "-o", "testpaths=")
    parts = {name: ("", (*options, str(tmp_path / f"test_{name}.py"))) for name in files}
    monkeypatch.setattr(tiers, "PARTS", parts)
    monkeypatch.setattr(tiers, "TIERS", {"all": tuple(files), "fast": ("good",)})
    assert tiers.main(["all"]) == 1
    said = capfd.readouterr().out.partition("=== the")[2]
    assert "FAILED test_bad::test_bad (bad)" in said and "FAILED test_bad::test_torn (bad)" in said
    assert "FAILED broken: pytest ended with 2" in said
    assert said.splitlines()[-1] == "1 passed, 3 failed, 1 skipped"
    assert tiers.main(["fast"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"


def test_a_test_over_the_budget_fails_the_run_unless_it_is_nightly(capsys: pytest.CaptureFixture[str]) -> None:
    slow = Outcome("tests.a::test_slow", "passed", 91.0, "on Ray")
    assert summarise([slow._replace(seconds=89.0)], [], {}, 90.0) == 0
    assert summarise([slow._replace(part="nightly")], [], {}, 90.0) == 0
    capsys.readouterr()
    assert summarise([slow], [], {"on Ray": 95.0}, 90.0) == 1
    said = capsys.readouterr().out
    assert "over budget: tests.a::test_slow took 91 s, 90 are allowed" in said and "on Ray: 95 s" in said


def test_no_test_at_all_is_no_success() -> None:
    assert summarise([], [], {}, 90.0) == 1


def test_an_unknown_tier_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers.main(["quick"]) == tiers.main([]) == 2
    assert "expected one of fast, default, all" in capsys.readouterr().err
