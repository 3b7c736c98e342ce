"""The evaluation job as a whole: a driver or an actor that is killed costs time and changes no number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instella_ray.bulk.plan import SampleConfig
from instella_ray.bulk.sample import run_sample
from instella_ray.data.prompts import read_prompts
from instella_ray.errors import UserError
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate

from ..kit.evaluation import numbers
from ..kit.models import make_generator, make_tokenizer, write_tokenizer
from ..kit.processes import descendants, wait_until
from ..kit.sample_sets import noise, write_samples

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"
FILES = 60


def finished(output: Path) -> set[str]:
    """Units that are."""
    return {path.parent.name for path in output.glob("states/single/*/rows.json")}


def measuring_processes() -> list[int]:
    """Processes below this one in which a Measurer lives."""
    return descendants(b"Measurer")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., EvaluateConfig]:
    tokenizer = write_tokenizer(tmp_path / "bit")
    prompts = read_prompts("scenes", count=2 * FILES)
    samples = write_samples(tmp_path / "s", prompts, noise(2 * FILES, 4), tokenizer, rows_per_file=8)

    def make(output: str, **more: object) -> EvaluateConfig:
        given = {"samples": samples, "tokenizer": tokenizer, "output": str(tmp_path / output), "actors": 2}
        # No images: that would be further actors to start.
        return EvaluateConfig.model_validate({**given, "show": {"prompts": 0, "extremes": 0}, **more})

    return make


@pytest.fixture
def expected(config: Callable[..., EvaluateConfig], tmp_path: Path) -> dict[str, Any]:
    """The numbers of an evaluation that nothing has disturbed."""
    run_evaluate(config("whole", local=True))
    found = numbers(tmp_path / "whole")
    assert len(finished(tmp_path / "whole")) == FILES and found[""]["bit_usage"]["count"] == 8 * FILES
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_numbers(
    ray_session: None, config: Callable[..., EvaluateConfig], expected: dict[str, Any], tmp_path: Path
) -> None:
    import ray

    cfg = config("driver")
    sets = [f"{name}={getattr(cfg, name)}" for name in ("samples", "tokenizer", "output", "actors")]
    sets += ["show.prompts=0", "show.extremes=0"]
    command = [sys.executable, str(JOB), *(word for item in sets for word in ("--set", item))]
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(JOB.parents[1])}
    driver = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_until(lambda: len(finished(tmp_path / "driver")) >= 3, 120), driver.communicate(timeout=10)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)
    done = finished(tmp_path / "driver")
    assert 3 <= len(done) < FILES and not (tmp_path / "driver" / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for unit in done for path in (tmp_path / "driver").rglob(f"{unit}/*")}
    run_evaluate(config("driver", mode="resume", local=True))
    assert numbers(tmp_path / "driver") == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.ray
@pytest.mark.nightly
def test_a_killed_measurer_is_replaced_and_changes_no_number(
    ray_session: None, config: Callable[..., EvaluateConfig], expected: dict[str, Any], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        if wait_until(lambda: len(finished(tmp_path / "actor")) >= 3, 120):
            killed.extend(measuring_processes()[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    run_evaluate(config("actor"))
    watcher.join()
    assert killed and killed[0] not in measuring_processes()
    assert numbers(tmp_path / "actor") == expected


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=[pytest.mark.ray, pytest.mark.nightly])])
def test_a_bad_file_and_bad_weights_end_the_job_in_one_line(
    config: Callable[..., EvaluateConfig], tmp_path: Path, local: bool, request: pytest.FixtureRequest
) -> None:
    if not local:
        request.getfixturevalue("ray_session")
    metrics = {"diversity_features": {"weights": "nothing.pth"}}
    with pytest.raises(UserError, match=r"metric fid: weights nothing\.pth: expected a local file"):
        run_evaluate(config("o", metrics=metrics, actors=1, local=local))
    (tmp_path / "s" / "00031.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"00031\.parquet: damaged"):
        run_evaluate(config("p", actors=1, local=local))
    assert not (tmp_path / "p" / "results.json").exists()


def test_a_sweep_of_the_sampling_job_becomes_a_report(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "bit")
    model = make_generator(tmp_path / "model", tokenizer)
    sampling = {"num_inference_steps": 2, "temperature": 0.5}
    places = {"model": model, "output": str(tmp_path / "s")}
    sampled = {**places, "count": 12, "images_per_prompt": 2, "text_length": 24, "local": True}
    run_sample(SampleConfig.model_validate({**sampled, "sampling": sampling, "sweep": {"guidance_scale": [0, 2.5]}}))
    cfg = EvaluateConfig(
        samples=str(tmp_path / "s"), tokenizer=str(tmp_path / "bit"), output=str(tmp_path / "o"), local=True
    )
    page = Path(run_evaluate(cfg)).read_text()
    found = numbers(tmp_path / "o")
    assert len(found) == 2 and all(m["diversity_bits"]["count"] == 24 for m in found.values())
    assert all(name in page for name in found) and "diversity_bits over guidance_scale" in page
