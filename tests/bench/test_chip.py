"""The benchmark of one GPU at small sizes on this machine's device: its parts, its limits, and what it keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from instella_ray.bench.chip.part import FUNCTIONS
from instella_ray.bench.chip.rows import LAUNCHES, Bench, ChipRow, bound_by, cells
from instella_ray.bench.chip.run import run_gpu_bench
from instella_ray.bench.chip.sampling import PRECISIONS
from instella_ray.bench.chip.settings import PARTS, GpuBenchConfig, Part
from instella_ray.bench.measure import Spread
from instella_ray.bench.usage import command_of, with_descendants
from instella_ray.commands.bench_gpu import job
from instella_ray.engine.buckets import bucket_sizes
from instella_ray.engine.compilation import Compilation
from instella_ray.errors import UserError
from instella_ray.flops import ACCELERATORS, AMD_OLMO_1B, DeviceWork, bit_decode, generator_pass, generator_training
from instella_ray.rendering import Goal
from instella_ray.training.memory import generator_activations

from ..kit.processes import wait_until
from ..kit.project import MAKEFILE, ROOT

CPU = torch.device("cpu")
ORDER = (
    *("diffusion", "ar", "bits", "restart", "mixed", "stages", "training", "tokenizer"),
    *("compiled_sampling", "compiled_training", "precisions", "sharding", "loop"),
)


def settings(output: Path, *parts: Part, **changes: Any) -> GpuBenchConfig:
    given = {"tiny": True, "device": "cpu", "output": str(output), "parts": parts or PARTS, **changes}
    return GpuBenchConfig.model_validate(given)


def command_line(cfg: GpuBenchConfig) -> list[str]:
    """The command line of a run, with its configuration in a file beside the output."""
    file = Path(cfg.output).with_suffix(".yaml")
    file.write_text(json.dumps(cfg.model_dump(mode="json")))
    return [sys.executable, "-m", "instella_ray", "bench-gpu", "--config", str(file)]


def parts_of(cfg: GpuBenchConfig) -> dict[str, dict[str, Any]]:
    path = Path(cfg.output)
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["parts"] if path.exists() else {}
    return found


def whole_parts(cfg: GpuBenchConfig) -> list[str]:
    return [name for name, part in parts_of(cfg).items() if part["state"] == "whole"]


@pytest.fixture(scope="session")  # tests that kill things run later than the others
def measured(tmp_path_factory: pytest.TempPathFactory) -> GpuBenchConfig:
    """A finished run of few parts."""
    cfg = settings(tmp_path_factory.mktemp("chip") / "out.json", "diffusion", "bits", "restart")
    done = subprocess.run(command_line(cfg), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "diffusion (part 1 of 3): at most 120 s" in done.stdout and "whole after" in done.stdout
    return cfg


# --- what bounds a row


def test_what_took_about_as_long_as_the_chip_needs_is_bound_by_it() -> None:
    chip = ACCELERATORS["h200"]
    compute, memory = DeviceWork(chip.peak, 0), DeviceWork(0, chip.bandwidth)
    assert bound_by(1.9, compute, chip, launches=1.9) == "compute"
    assert bound_by(1.9, memory, chip) == "memory"
    # Ten times what the chip needs: as long as the same launches take with less work, or longer.
    assert bound_by(10, compute, chip, launches=9) == bound_by(10, memory, chip, launches=10) == LAUNCHES
    assert bound_by(10, compute, chip, launches=1) == bound_by(10, compute, chip) == "other"
    assert bound_by(10, compute, None, launches=10) == "-"


def test_a_row_says_its_shares_of_the_chip_and_a_dash_where_it_knows_none() -> None:
    rows: list[ChipRow] = []
    bench = Bench(settings(Path("none.json")), CPU, rows.append, {}, Path("none"))
    goal = Goal("alone", 2.0, 1.0, "<=")
    bench.add("on a CPU", Spread(2, 2, 2), DeviceWork(4e12, 2e12), images=8, goal=goal)
    chip = bench.chip = ACCELERATORS["h200"]
    bench.cfg = GpuBenchConfig()
    bench.add("on a chip", Spread(2, 1, 3), DeviceWork(chip.peak, chip.bandwidth), forecast=5e9, goal=goal)
    plain, shared = (cells(json.loads(json.dumps(row.as_dict()))) for row in rows)
    assert (plain["images/s"], plain["TFLOP/s"], plain["TB/s"]) == ("4", "2", "1")
    assert plain["of peak"] == plain["of bandwidth"] == plain["bound by"] == plain["plan GB"] == "-"
    assert shared["ms"] == "2000.00 (1000.00..3000.00)" and shared["plan GB"] == "5"
    assert (shared["of peak"], shared["of bandwidth"], shared["bound by"]) == ("50 %", "50 %", "memory")
    # Goals are for full size.
    assert rows[0].goal is None and rows[1].goal == goal


# --- settings and parts


def test_parts_are_in_order_of_worth_and_each_has_its_function() -> None:
    assert PARTS == ORDER == tuple(FUNCTIONS) == get_args(Part) == GpuBenchConfig().parts


def test_full_sizes_are_the_paper_s_and_small_ones_can_be_changed() -> None:
    full = job.load(["--config", "bench/gpu"])
    assert full == GpuBenchConfig() and full.limit_s <= 480 and full.part_limit_s <= 120
    model = full.generator("diffusion")
    assert (model.width, model.layers, model.heads, model.text_width) == (2048, 16, 16, 2048)
    assert (model.num_tokens, model.bits_per_token, full.bit.image_size) == (128, 64, 512)
    assert set(full.buckets) <= set(bucket_sizes(full.slots)) and full.buckets[0] == 1 and full.slots == 64
    tiny = job.load(["--config", "bench/gpu", "--tiny", "--set", "width=32"])
    assert tiny.width == 32 and tiny.bit.image_size == 32 and tiny.output != full.output
    assert GpuBenchConfig.model_validate(tiny.model_dump(mode="json")) == tiny


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[[Part], list[dict[str, Any]]]:
    """Measures a part in this process."""

    def measure(part: Part) -> list[dict[str, Any]]:
        import importlib

        rows: list[ChipRow] = []
        module, function = FUNCTIONS[part]
        (tmp_path / part).mkdir()
        bench = Bench(settings(tmp_path / "out.json"), CPU, rows.append, {}, tmp_path / part)
        getattr(importlib.import_module(f"instella_ray.bench.chip.{module}"), function)(bench)
        return [row.as_dict() for row in rows]

    return measure


@pytest.mark.process
def test_ar_and_precisions_have_a_row_for_each_bucket(rows_of: Callable[[Part], list[dict[str, Any]]]) -> None:
    ar = rows_of("ar")
    assert [row["what"] for row in ar] == ["ar, none, 1 together", "ar, none, 2 together", "ar, graphs"]
    assert ar[2]["note"] == "not measured: graphs need a GPU"
    assert all(row["seconds"]["median"] > 0 and row["flop_per_second"] > 0 for row in ar[:2])
    names = [row["what"] for row in rows_of("precisions")]
    assert names == [f"diffusion, none, {name}, {count} together" for name in PRECISIONS for count in (1, 2)]


@pytest.mark.process
def test_stages_are_measured_alone_and_together(rows_of: Callable[[Part], list[dict[str, Any]]]) -> None:
    (mixed,) = rows_of("mixed")
    assert mixed["images_per_second"] > 0 and "latency" in mixed["note"] and "1 to 3 steps" in mixed["what"]
    names = [row["what"] for row in rows_of("stages")]
    assert names[:4] == [f"decoding, {size} px, {count} together" for size in (32, 48) for count in (1, 2)]
    assert names[4:6] == ["text encoding, 1 together", "text encoding, 2 together"]
    assert names[6:] == [f"{name} file, {size} px" for size in (32, 48) for name in ("PNG", "JPEG", "WEBP")]


@pytest.mark.process
def test_training_has_the_planned_memory_beside_the_measured(
    rows_of: Callable[[Part], list[dict[str, Any]]],
) -> None:
    rows = rows_of("training") + rows_of("tokenizer")
    assert [row["what"] for row in rows] == [
        "diffusion, micro-batch 1",
        "diffusion, micro-batch 2",
        "diffusion, micro-batch 2, checkpointing",
        "tokenizer, stage 1, 32 px, micro-batch 2",
        *(f"tokenizer, stage 3, {size} px, micro-batch 1" for size in (32, 48)),
    ]
    assert all(row["memory_gb"] > 0 and row["forecast_gb"] > 0 and row["images_per_second"] > 0 for row in rows)


@pytest.mark.process
def test_sharded_learners_run_at_one_rank(rows_of: Callable[[Part], list[dict[str, Any]]]) -> None:
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    rows = rows_of("sharding")
    assert [row["what"].split(", ")[1] for row in rows] == ["ddp", "zero2", "fsdp2"]
    assert all(row["seconds"]["median"] > 0 for row in rows)
    assert not torch.distributed.is_initialized()


def estimates() -> list[str]:
    """Rows of the documentation: the fewest seconds of images and of training on each chip."""
    cfg, chips = GpuBenchConfig(), [ACCELERATORS[name] for name in ("h200", "mi300x")]
    rows = []
    for kind, name in (("diffusion", "diffusion, 20 steps, guidance"), ("ar", "AR, 128 tokens, guidance")):
        model = cfg.generator(kind)  # type: ignore[arg-type]
        steps = cfg.steps if kind == "diffusion" else model.num_tokens
        for count in (1, 64):
            work = generator_pass(model, 2 * count, cfg.text_length, 2)
            least = [chip.least_seconds(work) for chip in chips]
            found = [f"{1000 * steps * s:.1f} ms ({bound}), {count / steps / s:.0f} images/s" for s, bound in least]
            rows.append([f"{name}, {count} together", f"{steps} passes of {2 * count} rows", *found])
    decoded = [bit_decode(cfg.bit, size, size).forward for size in cfg.image_sizes]
    found = [", ".join(f"{1000 * flop / chip.peak:.2f}" for flop in decoded) + " ms" for chip in chips]
    rows.append(["decoding, 512, 768, 1024 px", "`bit_decode` / peak", *found])
    work = generator_pass(cfg.generator("diffusion"), 128, cfg.text_length, 2)
    each = [20 / 64 * chip.least_seconds(work)[0] + sum(decoded) / len(decoded) / chip.peak for chip in chips]
    found = [f"{1 / seconds:.0f} images/s" for seconds in each]
    rows.append(["mixed sizes, 20 steps", "1 / (20 passes of 128 rows / 64 + mean decoding)", *found])
    training = generator_training(cfg.generator("diffusion"), cfg.text_length, AMD_OLMO_1B)
    found = [f"{chip.peak / training.model:.0f} images/s" for chip in chips]
    rows.append(["training from codes, MFU 1", "peak / `generator_training`", *found])
    again = generator_training(cfg.generator("diffusion"), cfg.text_length, AMD_OLMO_1B, gradient_checkpointing=True)
    found = [f"{chip.peak / again.hardware:.0f} images/s" for chip in chips]
    rows.append(["with gradient checkpointing, HFU 1", "peak / its FLOP with recomputation", *found])
    kept = generator_activations(cfg.generator("diffusion"), cfg.text_length, bf16=True)
    products, traffic = ([2 * training.hardware / c.peak for c in chips], [4 * kept / c.bandwidth for c in chips])
    found = [f"{1 / (a + b):.0f} images/s" for a, b in zip(products, traffic, strict=True)]
    formula = "2 FLOP / peak + 4 `generator_activations` / bandwidth"
    rows.append(["training from codes, products at half the peak", formula, *found])
    found = [f"{1 / (5 / 4 * a + 4 / 3 * b):.0f} images/s" for a, b in zip(products, traffic, strict=True)]
    rows.append(["with gradient checkpointing", "5/4 of the first, 4/3 of the second term", *found])
    return ["| " + " | ".join(row) + " |" for row in rows]


def test_the_documentation_has_the_estimates_of_today() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    block = re.search(r"^\| estimate \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.M)
    assert block
    assert block[1].splitlines() == estimates()
    assert all(f"`{part}`" in page for part in PARTS)


# --- the run


@pytest.mark.process
def test_a_seed_has_the_same_bits_in_another_process(measured: GpuBenchConfig) -> None:
    first, second = (parts_of(measured)[name]["rows"] for name in ("bits", "restart"))
    assert [row["what"] for row in first] == [row["what"] for row in second]
    for before, after in zip(first, second, strict=True):
        assert before["digests"] == after["digests"] and set(before["digests"]) == {"1", "2"}
        assert after["note"] == "same bits as the process of the part bits in every bucket"
    assert re.fullmatch(
        r"diffusion, buckets of equal bits: with guidance [12 ]+, without ([12 ]+|none)", first[2]["what"]
    )
    assert [row["note"] for row in first[2:]] == ["same bits as bucket 2 in every bucket"] * 2


@pytest.mark.process
def test_a_finished_run_prints_its_table_and_measures_nothing(
    measured: GpuBenchConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    before = Path(measured.output).read_bytes()
    assert run_gpu_bench(measured)
    out = capsys.readouterr().out
    assert "| part" in out and "| diffusion | diffusion, none, 1 together " in out and "at most" not in out
    assert Path(measured.output).read_bytes() == before


@pytest.mark.process
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("machine", "device", "NVIDIA H100"), ("machine", "torch", "1.0"), ("settings", "text.width", 8)],
)
def test_measurements_of_others_are_refused(
    measured: GpuBenchConfig, tmp_path: Path, section: str, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(Path(measured.output).read_text())
    place = content[section]
    for name in key.split(".")[:-1]:
        place = place[name]
    place[key.split(".")[-1]] = value
    cfg = settings(tmp_path / "other.json", "diffusion")
    Path(cfg.output).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"other.json: has measurements with {key} = {value!r}, here it is"):
        run_gpu_bench(cfg)
    assert json.loads(Path(cfg.output).read_text()) == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_needs_a_gpu_and_results_a_local_file() -> None:
    with pytest.raises(UserError, match="device auto: PyTorch sees no GPU on this machine; expected --tiny"):
        run_gpu_bench(GpuBenchConfig())
    with pytest.raises(UserError, match=r"output gs://bucket/out\.json: expected a local file"):
        run_gpu_bench(GpuBenchConfig(tiny=True, output="gs://bucket/out.json"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_a_run_that_was_killed_goes_on_with_what_it_lacks(tmp_path: Path, how: signal.Signals) -> None:
    cfg = settings(tmp_path / "out.json", "bits", "mixed")
    run = subprocess.Popen(command_line(cfg), cwd=ROOT, stdout=subprocess.DEVNULL)
    child = 0

    def mixed_runs() -> bool:
        nonlocal child
        found = [pid for pid in with_descendants(run.pid)[1:] if command_of(pid).endswith("chip.part mixed ")]
        child = found[0] if found else 0
        return bool(child)

    assert wait_until(mixed_runs, 60)
    os.kill(run.pid, how)
    run.wait()
    assert wait_until(lambda: "chip.part" not in command_of(child), 20)
    before = parts_of(cfg)
    assert before["bits"]["state"] == "whole"
    assert before["mixed"]["state"] == ("running" if how == signal.SIGKILL else "cut")
    assert run_gpu_bench(cfg)
    after = parts_of(cfg)
    assert after["bits"] == before["bits"] and len(after["mixed"]["rows"]) == 1


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.slow
def test_a_part_over_its_limit_keeps_its_rows_and_one_that_fails_stops_no_other(
    measured: GpuBenchConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One image takes part of a second, 4096 minutes; a layer of the second network has more than 100 TB.
    limit = 4 * parts_of(measured)["diffusion"]["seconds"]
    cut = settings(tmp_path / "out.json", "diffusion", buckets=(1, 4096), steps=500, part_limit_s=limit)
    assert not run_gpu_bench(cut)
    found = parts_of(cut)["diffusion"]
    assert found["state"] == "cut" and [row["what"] for row in found["rows"]] == ["diffusion, none, 1 together"]
    assert "(the rest)" in capsys.readouterr().out and found["reason"] == f"cut after {limit:.0f} s"

    huge = settings(tmp_path / "huge.json", "diffusion", "stages", width=1 << 23)
    assert not run_gpu_bench(huge)
    out = capsys.readouterr().out
    assert whole_parts(huge) == ["stages"] and parts_of(huge)["diffusion"]["state"] == "failed"
    assert re.search(r"failed after \d+ s: 0 rows, RuntimeError: .*allocate", out)
    assert "Traceback" in (tmp_path / "huge.log").read_text()


@pytest.mark.process
def test_parts_without_time_are_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path / "out.json", "diffusion", "ar", limit_s=0.01)
    assert not run_gpu_bench(cfg)
    assert parts_of(cfg)["diffusion"]["state"] == "cut" and "ar" not in parts_of(cfg)
    out = capsys.readouterr().out
    assert "ar: not measured, the 0.01 s are over" in out and re.search(r"\| ar +\| \(all\) .* not measured yet", out)


@pytest.mark.process
@pytest.mark.nightly
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    recipe = re.search(r"^bench-gpu: venv\n\t\$\(BIN\)/python (.*) \$\(BENCH\)$", MAKEFILE, re.M)
    assert recipe
    more = ["--tiny", "--set", "device=cpu", "--output", f"{tmp_path}/out.json"]
    command = [sys.executable, *recipe[1].split(), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert tuple(found) == PARTS and {part["state"] for part in found.values()} == {"whole"}
    compiled = [row["what"].split(", ")[1] for row in found["compiled_sampling"]["rows"]]
    assert compiled == [name for name in get_args(Compilation) if "compile" in name]
    assert [row["what"].endswith("compiled") for row in found["compiled_training"]["rows"]] == [False, True] * 2
    phases = {row["what"] for row in found["loop"]["rows"]}
    assert {"this loop", "bare loop", "writing a checkpoint", "images: tokenizer"} <= phases
