"""Failures of an evaluation are made again, larger, with the bits that were measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray.bulk.plan import SampleConfig, Sweep
from instella_ray.bulk.sample import run_sample
from instella_ray.bulk.sample_set import SampleSet
from instella_ray.commands.sample import main
from instella_ray.data.formats.images import decode_rgb, read_metadata
from instella_ray.data.scenes import scene_prompts
from instella_ray.errors import UserError, run_main
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.resample import ResampleConfig, run_resample
from instella_ray.evaluation.results import Evaluation

from ..kit.browser import chromium
from ..kit.models import make_generator, make_tokenizer

KINDS = ("diffusion", "ar")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated folder of samples of each kind of generator, and one of a sweep."""
    root = tmp_path_factory.mktemp("resample #1")
    tokenizer = make_tokenizer(root / "bit")
    texts = [claim.caption for claim in scene_prompts(1, 0)]
    # One text comes twice, under two ids, and its samples have numbers of their own.
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in [*texts[:3], texts[0]]))
    for kind in KINDS:
        make_generator(root / kind, tokenizer, kind)
        sampled(root, kind, f"samples-{kind}")
    sampled(root, "diffusion", "samples-sweep", sweep=Sweep(guidance_scale=(0.0, 2.0)))
    run_evaluate(EvaluateConfig(samples=str(root / "samples-ar"), output=str(root / "eval-codes"), local=True))
    return root


def sampled(root: Path, kind: str, name: str, **changes: Any) -> None:
    given = {"model": str(root / kind), "prompts": str(root / "prompts.jsonl"), "output": str(root / name)}
    quick = {"sampling": {"num_inference_steps": 5, "guidance_scale": 1.5}, "text_length": 24, "images_per_prompt": 2}
    run_sample(SampleConfig.model_validate({**given, **quick, "local": True, "samples_per_file": 3, **changes}))
    output, bit = str(root / name.replace("samples", "eval")), str(root / "bit")
    run_evaluate(EvaluateConfig(samples=str(root / name), tokenizer=bit, output=output, local=True))


def codes_by_id(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: codes
        for block in SampleSet(str(folder)).blocks()
        for name, codes in zip(block.ids, block.codes, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_that_were_measured(
    root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, np.ndarray] = {}
    from instella_ray.evaluation import resample

    real = resample._write

    def noting(output: str, number: int, chosen: Any, steps: Any, *rest: Any) -> Any:
        made[chosen.shown.id] = steps[-1][1]
        assert [step for step, _ in steps] == ([2, 4, 5] if kind == "diffusion" else [2, 4])
        return real(output, number, chosen, steps, *rest)

    monkeypatch.setattr(resample, "_write", noting)
    results = root / f"eval-{kind}" / "results.json"
    page = run_resample(
        ResampleConfig(results=str(results), worst=8, steps=3, batch_size=3, output=str(tmp_path / "o"))
    )
    original = codes_by_id(root / f"samples-{kind}")
    assert made.keys() == original.keys() and all(np.array_equal(made[name], original[name]) for name in made)
    text = Path(page).read_text()
    assert "All bits are those of the evaluated samples." in text and ("decoded as zeros" in text) == (kind == "ar")
    files = sorted((tmp_path / "o").glob("*.png"))
    assert len(files) == 8 and all(f'src="{file.name}"' in text for file in files)
    for file in files:
        about: Any = read_metadata(file.read_bytes())
        assert decode_rgb(file.read_bytes()).size == (64, 64) and about["seed"] >= 0
        steps = sorted((tmp_path / "o" / "steps").glob(f"{file.stem}-*.png"))
        assert len(steps) == (3 if kind == "diffusion" else 2)
        assert decode_rgb(steps[0].read_bytes()).size == (32, 32)


def test_the_command_line_takes_a_folder_or_its_results_and_both_ends(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = root / "eval-diffusion"
    metric = Evaluation(str(results)).metric("", "scene_score")
    wrong = sum(not score for score in metric.scores().values())  # type: ignore[attr-defined]
    words = ["--from", str(results), "--worst", "2", "--best", "1", "--metric", "scene_score"]
    assert main(words) == 0
    output = results / "resampled-scene_score"
    assert f"page: {output}/index.html" in capsys.readouterr().out
    assert len(list(output.glob("*.png"))) == min(wrong, 2) + min(8 - wrong, 1)
    monkeypatch.chdir(results)
    words[1] = "results.json"
    with pytest.raises(UserError, match="exists already"):
        main(words)
    assert main([*words, "--set", "mode=fresh"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worst", "2"], "expected --from RESULTS too"),
        (["--from", "ROOT/eval-diffusion", "--local"], "--local: expected without --from"),
        (["--from", "ROOT/samples-diffusion"], "not a finished evaluation"),
        (["--from", "ROOT/eval-sweep"], "several settings; expected setting to be one of guidance_scale=0.0, "),
        (["--from", "ROOT/eval-sweep", "--set", "setting=x"], "no setting 'x'"),
        (["--from", "ROOT/eval-diffusion", "--metric", "fid"], "metric fid: does not score single samples"),
        (["--from", "ROOT/eval-diffusion", "--set", "size=33"], "size 33: not a multiple of 8"),
        (["--from", "ROOT/eval-diffusion", "--set", "model=ROOT/ar"], "model ROOT/ar: weights "),
        (["--from", "ROOT/eval-diffusion", "--set", "tokenizer=ROOT/none"], "tokenizer ROOT/none: no such folder"),
        (["--from", "ROOT/eval-diffusion", "--worst", "0"], "no sample to make again"),
        (["--from", "ROOT/eval-codes"], "no metric scores single samples; expected an evaluation with scene_score"),
        (["--from", "ROOT/eval-diffusion", "--worst", "-1"], "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_made_again_is_one_line(
    root: Path, tmp_path: Path, words: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    # In a configuration file, because --set takes what follows a # for a comment.
    filled = [word.replace("ROOT", str(root)) for word in words]
    if "=" in filled[-1] and "ROOT" in words[-1]:
        key, value = filled.pop().split("=", 1)
        (tmp_path / "again.yaml").write_text(json.dumps({key: value}))
        filled[-1:] = ["--config", str(tmp_path / "again.yaml")]
    assert run_main(lambda: main([*filled, "--output", str(tmp_path / "o")])) == 2
    assert message.replace("ROOT", str(root)) in caplog.text and not (tmp_path / "o").exists()


def test_samples_that_are_gone_are_made_again_from_the_results_alone(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "eval-sweep", tmp_path / "eval")
    facts = json.loads((tmp_path / "eval" / "results.json").read_text())
    facts["card"]["source"] = str(tmp_path / "gone")
    (tmp_path / "eval" / "results.json").write_text(json.dumps(facts))
    setting = "guidance_scale=2.0"
    page = run_resample(
        ResampleConfig(results=str(tmp_path / "eval"), setting=setting, worst=3, output=str(tmp_path / "o"))
    )
    assert "could not be compared" in Path(page).read_text()
    (file, *_) = sorted((tmp_path / "o" / "steps").glob("001-*0005.png"))
    about: Any = read_metadata(file.read_bytes())
    seeds = {seed for block in SampleSet(str(root / "samples-sweep" / setting)).blocks() for seed in block.seeds}
    assert about["guidance_scale"] == 2.0 and about["seed"] in seeds
    facts["card"]["measured_inputs"] = "reconstructions"
    (tmp_path / "eval" / "results.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="an evaluation of reconstructions, expected one of samples"):
        run_resample(ResampleConfig(results=str(tmp_path / "eval"), setting=setting))


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_all_images_on_phone_and_desk(root: Path, tmp_path: Path, kind: str) -> None:
    results, output = str(root / f"eval-{kind}"), tmp_path / "50% #1 ?"
    page_path = Path(run_resample(ResampleConfig(results=results, worst=2, output=str(output))))
    with chromium(tmp_path) as browser, browser.page() as page:
        for width in (320, 400, 1280):
            page.look(width, 900)
            page.goto(page_path.as_uri())
            assert page.js("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
            page.js("document.querySelectorAll('img').forEach((image) => (image.loading = 'eager'))")
            page.wait("[...document.querySelectorAll('main img')].every((image) => image.complete)")
            assert page.js("[...document.querySelectorAll('main img')].every((image) => image.naturalWidth > 0)")
        assert page.js("document.querySelectorAll('main img').length") == 2 + len(list(output.glob("steps/*.png")))
        assert page.complaints == []
