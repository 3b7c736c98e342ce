"""Seeds of several demos, and the table of their results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray import cli
from instella_ray.data.scenes import CATEGORIES
from instella_ray.demo.seeds import DemoResult, parse_seeds, result_rows
from instella_ray.errors import UserError


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True))
def test_listed_seeds_are_read_in_their_order(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == seeds
    assert parse_seeds(f" {seeds[0]} - {seeds[0] + 3}") == list(range(seeds[0], seeds[0] + 4))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "0,,1", "1.5", "0-4,2", "0:4"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="seed"):
        parse_seeds(text)


def test_a_table_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--table", "--folder", str(tmp_path / "demo")]) == 2
    assert "--table: tabulates the demos of --seeds" in capsys.readouterr().err and not (tmp_path / "demo").exists()


def test_intervals_are_over_the_images_of_a_row() -> None:
    def result(seed: int, share: float) -> DemoResult:
        scores = {**dict.fromkeys(CATEGORIES, share), "position": share - 0.2, "overall": share}
        return DemoResult(seed, 400.0 + seed, 27.0, {"diffusion": scores, "ar": scores}, 40)

    first, second, mean = result_rows([result(0, 0.9), result(1, 0.8)])
    assert first["diffusion"] == "0.90 [0.86, 0.93]" and first["ar: lowest"] == "position 0.70 [0.55, 0.82]"
    assert second["seconds"] == 401 and mean["seed"] == "mean" and mean["PSNR dB"] == 27.0
    assert mean["diffusion"] == "0.85 [0.82, 0.88]"


PARENT = "import sys; from instella_ray.demo.seeds import _run; sys.exit(_run([sys.executable, '-c', sys.argv[1]]))"
CHILD = """
import signal, sys, time
def leave(number, frame):
    time.sleep(1)  # longer than an interpreter waits for its child after Ctrl-C
    print("saved", number, flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, leave); signal.signal(signal.SIGTERM, leave)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_is_waited_for(number: signal.Signals) -> None:
    """Ctrl-C reaches both processes, SIGTERM only the first."""
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.terminate()
        assert process.stdout.read() == f"saved {int(number)}\n"
    assert process.returncode == 130


def test_images_without_scores_are_not_tabulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seeds", "0,1", "--table", "--images", str(tmp_path), "--folder", str(tmp_path / "demo")]
    assert cli.main(["demo", *flags]) == 2
    assert "--table: only images of the scenes are scored" in capsys.readouterr().err
