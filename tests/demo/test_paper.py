"""The paper's recipes: each says what the paper says, and all of them run, small, from shards to the paper's tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instella_ray.bulk.plan import SampleConfig, own_sampling, own_size
from instella_ray.bulk.sample_set import SampleSet
from instella_ray.config import load_config, recipes
from instella_ray.data.curation.job import CurateConfig
from instella_ray.data.formats.codes import CodesReader
from instella_ray.data.generation.recaption import RecaptionConfig
from instella_ray.data.generation.synthesize import SynthesizeConfig
from instella_ray.data.prompts import read_prompts
from instella_ray.demo import paper_inputs
from instella_ray.demo.paper import JOBS, PaperRun, job_of, main
from instella_ray.demo.paper_steps import PaperSteps
from instella_ray.errors import UserError
from instella_ray.evaluation.evaluate import EvaluateConfig
from instella_ray.evaluation.metrics.presets import PRESETS
from instella_ray.models.bit import BITConfig
from instella_ray.models.folders import STATE
from instella_ray.models.sampling import SamplingConfig
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.training.generator import GeneratorRunConfig
from instella_ray.training.losses import PerceptualConfig
from instella_ray.training.stages import TokenizerStagesConfig

from ..kit.models import make_generator, make_tokenizer
from ..kit.project import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "configs" / "paper").glob("*.yaml"))
STEPS = PaperSteps(Path("x")).all()
FOLDERS = ["input=a", "output=b"]


def recipe(name: str, cls: Callable[..., Any], overrides: list[str] | None = None, section: str | None = None) -> Any:
    return load_config(cls, f"paper/{name}", overrides or (), section=section)  # type: ignore[type-var]


# --- what the recipes say


def test_every_recipe_is_run_and_in_the_wheel_and_in_the_docs() -> None:
    assert len(RECIPES) == 22 and [name.partition("-")[0] for name in RECIPES] == [f"{n:02}" for n in range(1, 23)]
    assert {f"paper/{name}" for name in RECIPES} <= set(recipes())
    assert list(dict.fromkeys(step.recipe for step in STEPS)) == [
        *RECIPES[:9],
        *RECIPES[9:],
    ]
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in page or f"configs/paper/{name}.yaml" not in page] == []
    assert {job_of(name) for name in RECIPES} == {*JOBS, "sample"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_how_to_run_it(name: str) -> None:
    head = (ROOT / "configs" / "paper" / f"{name}.yaml").read_text().splitlines()[:8]
    assert any(f"--config configs/paper/{name}.yaml" in line for line in head)
    assert any(word in head[0] for word in ("Appendix", "Section", "Table", "Figure"))


def test_the_filters_of_the_paper_are_on() -> None:
    """Appendix B.1: low aesthetic scores, dense and small text; section 4: a shorter edge below half the resolution."""
    filters = recipe("01-curate", CurateConfig, FOLDERS).filters
    assert (
        filters.aesthetic and filters.text and 0 < filters.text.max_density < 1 and 0 < filters.text.min_text_size < 1
    )
    assert filters.resolution and filters.resolution.limits()["shorter_edge"][1].minimum == 512
    dalle = recipe("04-import-dalle", CurateConfig, FOLDERS)
    assert dalle.caption_keys[0] == "long_caption" and set(dalle.filters.sections()) == {"resolution"}


def test_captions_and_synthetic_images_are_the_paper_s() -> None:
    captions = recipe("02-recaption", RecaptionConfig, FOLDERS)
    assert captions.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert captions.long.max_new_tokens > 4 * captions.short.max_new_tokens
    made = recipe("03-synthesize", SynthesizeConfig, ["prompts=metadata.parquet", "output=b"])
    names = [model.pipeline.lower() for model in made.models.values()]
    assert len(names) == 3 and made.distinct and made.count is None
    assert all(
        any(word in name for name in names) for word in ("flux.1-schnell", "pixart-sigma", "stable-diffusion-3.5")
    )
    others = recipe("21-synthesize-appendix-g", SynthesizeConfig, ["prompts=a", "output=b"]).models
    assert list(others) == ["sdv15", "sdxl", "pixart_alpha"]


def test_the_tokenizer_is_the_paper_s() -> None:
    cfg = recipe("05-tokenizer", TokenizerStagesConfig)
    stages = list(cfg.each().values())
    model: BITConfig = stages[0].model
    assert (model.num_tokens, model.bits_per_token, model.patch_size, model.image_size) == (128, 64, 16, 512)
    assert [stage.train.steps for stage in stages] == [50_000, 10_000, 200_000]
    assert [stage.train.global_batch for stage in stages] == [1024, 1024, 800]
    assert [stage.temperature for stage in stages] == [0.5, 0.1, 0.1]
    assert [stage.late_temperature for stage in stages] == [0.5, 0.1, 0.1]
    assert [stage.sizes for stage in stages] == [(512,), (512, 768, 1024), (512, 768, 1024)]
    assert [stage.freeze_encoder for stage in stages] == [False, False, True]
    assert stages[2].adversarial.discriminator.backbone == "vit_small_patch16_224.dino"
    for stage in stages:
        assert stage.loss.reconstruction == "smooth_l1" and stage.loss.perceptual == PerceptualConfig()
        assert_optimized_as_published(stage.train.optimizer)


@pytest.mark.parametrize(("name", "kind"), [("08-diffusion", "diffusion"), ("09-autoregressive", "ar")])
def test_the_generators_are_the_paper_s(name: str, kind: str) -> None:
    cfg: GeneratorRunConfig = recipe(name, GeneratorRunConfig)
    assert (cfg.model.kind, cfg.model.width, cfg.model.heads) == (kind, 2048, 16)
    assert cfg.text_encoder == TextEncoderConfig(name="amd/AMD-OLMo-1B", max_length=128)
    assert (cfg.train.global_batch, cfg.train.sharding, cfg.train.precision) == (4096, "zero2", "bf16")
    assert cfg.caption_drop_probability == 0.1 and cfg.timesteps == "logit_normal" and cfg.timestep_shift == 1.0
    laion, *synthetic = (source.weight for source in cfg.sources)
    assert laion == 3 * sum(synthetic) and len(synthetic) == 2
    model = cfg.model
    assert (model.position_place, model.text_layers, model.target) == ("block", "each", "flip")
    assert model.norm == "layer" if kind == "ar" else model.time_layers == 1
    assert_optimized_as_published(cfg.train.optimizer)
    # 4096 x steps at 120 images/s of a GPU: within the paper's 160 (20 days on 8) and 200 GPU-days.
    assert 4096 * cfg.train.steps / 120 / 86_400 == pytest.approx(160, rel=0.02)


def assert_optimized_as_published(optimizer: Any) -> None:
    assert (optimizer.name, optimizer.lr, optimizer.warmup_steps, optimizer.clip) == ("adamw", 1e-4, 1000, 1.0)
    assert optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("name", "expected", "prompts", "images"),
    [
        ("10-sample-geneval", ("posterior", 7.5, 0.75, 100), None, 4),
        ("12-sample-coco", ("posterior", 7.5, 0.75, 100), 30_000, 1),
        ("14-sample-image-reward", ("posterior", 7.5, 0.75, 100), 100, 1),
        ("16-sample-table3", ("simplified", 4.0, 0.6, 20), 30_000, 1),
        ("20-sample-appendix-g", ("posterior", 7.5, 0.75, 50), 100, 1),
    ],
)
def test_samples_are_made_as_in_appendix_d(name: str, expected: object, prompts: int | None, images: int) -> None:
    cfg = recipe(name, SampleConfig, section="sample")
    asked = cfg.sampling
    assert (asked.sampler, asked.guidance_scale, asked.temperature, asked.num_inference_steps) == expected
    assert asked.final_draw and asked.rho == 1.0 and not asked.redraw
    assert (cfg.count, cfg.images_per_prompt, cfg.quantization) == (prompts, images, "none")


def test_metrics_are_measured_as_in_appendix_d() -> None:
    samples = ["samples=a", "tokenizer=b", "output=c"]
    presets = {}
    for name in (name for name in RECIPES if "-evaluate-" in name):
        given = ["images=a", *samples[1:]] if name == "06-evaluate-table2" else samples
        presets[name] = recipe(name, EvaluateConfig, given)
    clip = presets["13-evaluate-clip-score"].metrics.clip_score
    assert clip.images.size == 256 and clip.model == "ViT-bigG-14"
    fid = presets["17-evaluate-table3"].metrics.fid
    assert fid.images.size == 256 and fid.network_resize == "clean" and fid.network == "inception"
    assert presets["11-evaluate-geneval"].metrics.geneval and presets["15-evaluate-image-reward"].metrics.image_reward
    assert list(presets["06-evaluate-table2"].metrics.sections()) == ["psnr", "ssim", "rfid"]
    for cfg in presets.values():
        assert cfg.preset is None or cfg.size == PRESETS[cfg.preset].size


def test_figure_1_has_the_settings_of_appendix_a() -> None:
    """(size, alpha, tau, steps) in the appendix's order; one prompt has no steps there, those of the recipe count."""
    expected = [
        *((1024, 9.0, 0.8, 20), (1024, 7.5, 1.0, 50), (512, 7.5, 0.75, 20), (512, 9.0, 0.8, 20), (512, 7.5, 0.75, 20)),
        *((512, 6.0, 0.75, 100), (512, 7.5, 0.75, 20), (512, 7.5, 1.0, 20), (512, 8.0, 0.9, 20), (512, 7.5, 1.0, 50)),
    ]
    assert figure1("18-sample-figure1") == expected
    assert [found[:3] for found in figure1("19-sample-figure1-ar")] == [(512, 7.5, 0.6), (512, 9.0, 0.6)]


def figure1(name: str) -> list[tuple[Any, ...]]:
    cfg = recipe(name, SampleConfig, section="sample")
    prompts = read_prompts(str(ROOT / cfg.prompts))
    settings = [own_sampling(prompt, cfg.sampling) for prompt in prompts]
    return [
        (own_size(prompt), found.guidance_scale, found.temperature, found.num_inference_steps)
        for prompt, found in zip(prompts, settings, strict=True)
    ]


# --- what runs small


def test_small_runs_keep_the_paper_s_sampling() -> None:
    changed = {(s.recipe, key, str(value)) for s in STEPS for key, value in s.settings.items() if ".sampling." in key}
    steps = {("16-sample-table3", "sample.sampling.num_inference_steps", str(number)) for number in (20, 50)}
    assert {each for each in changed if each[1] != "sample.sampling.temperature"} == steps
    # Table 1 does not say how the autoregressive model was sampled: Appendix A's temperature.
    assert {value for _, key, value in changed if key == "sample.sampling.temperature"} == {"0.6"}
    assert all("Alg" not in str(value) for _, _, value in changed)
    assert SamplingConfig().final_draw is False  # so it is the recipes that set it


def test_a_folder_of_something_else_and_an_unknown_recipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not of this command"):
        PaperRun(tmp_path / "mine")
    with pytest.raises(UserError, match="until 7: no such recipe, expected one of 01-curate"):
        PaperRun(tmp_path / "new", local=True).run("7")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> PaperRun:
    """A run of the recipes before training, and of some after it on models with random weights, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_inputs, "IMAGES", 8)
        run = PaperRun(tmp_path_factory.mktemp("half") / "paper", local=True)
        run.run("04-import-dalle")
    folder = run.steps.folder
    checkpoint = folder / "tokenizer" / "stage3" / "checkpoints" / "step-0000001"
    checkpoint.parent.mkdir(parents=True)
    tokenizer = make_tokenizer(checkpoint)
    (checkpoint / STATE).touch()  # of a checkpoint that is complete
    (folder / "diffusion" / "checkpoints").mkdir(parents=True)
    make_generator(folder / "diffusion" / "checkpoints" / "step-0000001", tokenizer)
    (folder / "diffusion" / "checkpoints" / "step-0000001" / STATE).touch()
    wanted = ("codes-laion", "codes-dalle", "samples-geneval-diffusion", "eval-geneval-diffusion", "samples-figure1")
    for step in run.steps.all():
        if step.output in wanted:
            run.run_step(step)
    return run


@pytest.mark.process
def test_shards_become_codes_with_the_captions_of_their_source(half: PaperRun) -> None:
    ledger = json.loads(Path(half.steps.path("curated/ledger.json")).read_text())
    # What the inputs hold for each filter was found by it.
    assert {"watermark", "unsafe", "small", "aesthetic"} <= set(ledger["dropped"]) and ledger["kept"] >= 4
    assert {"exact_duplicate", "near_duplicate"} & set(ledger["dropped"])
    laion, dalle = (CodesReader(half.steps.path(f"codes-{name}")) for name in ("laion", "dalle"))
    assert len(laion) >= 3 and len(dalle) == 2
    long, short = (dalle.column(range(2), f"caption_{kind}") for kind in ("long", "short"))  # type: ignore[arg-type]
    assert long == [f"{text} on a plain light background" for text in short]
    captions = [laion.column(range(len(laion)), f"caption_{kind}") for kind in ("long", "short")]  # type: ignore[arg-type]
    assert captions[0] != captions[1] and not any(text.startswith("a photo of") for text in captions[0])
    synthetic = json.loads(Path(half.steps.path("synthetic/ledger.json")).read_text())
    assert synthetic["in"] == 3 * 12  # an image of each prompt by each model, though each prompt has two rows


@pytest.mark.process
def test_prompts_become_a_row_of_the_table(half: PaperRun) -> None:
    samples = SampleSet(half.steps.path("samples-geneval-diffusion"))
    assert len(samples) == 12 * 4 and samples.run.sampling.num_inference_steps == 100
    results = json.loads(Path(half.steps.path("eval-geneval-diffusion/results.json")).read_text())
    assert results["card"]["preset"] == "paper-table1" and list(results["settings"][0]["metrics"]) == ["scene_score"]
    figure = SampleSet(half.steps.path("samples-figure1"))
    assert "size" in figure.run.by_prompt and len(figure) == 10
    sizes = {
        int(path.name.partition("-")[2]): len(list(path.iterdir())) for path in Path(figure.folder).glob("images-*")
    }
    assert sizes == {32: 8, 64: 2}


@pytest.mark.process
def test_what_is_finished_is_not_done_again(half: PaperRun, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Path(half.steps.path("curated/ledger.json"))
    before = ledger.stat().st_mtime_ns
    assert main(["--local", "--folder", str(half.steps.folder), "--until", "04-import-dalle"]) == 0
    assert ledger.stat().st_mtime_ns == before and "01-curate" not in capsys.readouterr().out
    assert "curate" in Path(half.steps.path("logs/01-curate-curated.log")).read_text()


@pytest.mark.nightly
@pytest.mark.ray
def test_all_recipes_run_on_ray_and_end_with_the_paper_s_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instella_ray.demo.paper", "--folder", str(tmp_path / "paper")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "paper" / "tables.md").read_text()
    for title in ("Table 1", "Table 2", "Table 3"):
        assert f"## {title}" in text
    rows = [line for line in text.splitlines() if line.startswith("| ours")]
    assert len(rows) == 2 + 1 + 2
    # PSNR and SSIM need no weights; all else is told under its own name.
    assert sum(cell.strip() not in ("–", "") for cell in rows[2].split("|")[4:]) == 4
    assert all(word in text for word in ("scene_score", "clip_score_vit_s_32_alt", "frechet_efficientnet_lite0"))
    page = (tmp_path / "paper" / "comparison.html").read_text()
    assert page.count("<figure") == 12
