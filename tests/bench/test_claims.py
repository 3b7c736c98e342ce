"""Verdicts, shared and resumed steps of the claims, their page, and real arms of every kind at sizes that take seconds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from instella_ray.bench.claims import run
from instella_ray.bench.claims.arms import Step, TrainedGenerator, largest_spike, plan_trials
from instella_ray.bench.claims.report import forest, page_text
from instella_ray.bench.claims.run import all_steps, run_claims
from instella_ray.bench.claims.settings import ClaimArm, ClaimsBench, PaperClaim
from instella_ray.bench.claims.verdicts import judge, verdicts_of
from instella_ray.bench.run import BenchConfig
from instella_ray.config import dump_yaml, load_config
from instella_ray.errors import UserError
from instella_ray.evaluation.statistics import student_mean

from ..kit.project import job

BINARY, FEWER = ClaimArm(name="8 tokens"), ClaimArm(name="4 tokens", overrides=("tokenizer.model.num_tokens=4",))
STEPS_4, STEPS_2 = (
    ClaimArm(name=f"{steps} steps", overrides=(f"sampling.num_inference_steps={steps}",)) for steps in (4, 2)
)
TOKENS = PaperClaim(
    name="tokens", section="4.2", sentence="more are better", metric="psnr", proposed=BINARY, baseline=FEWER
)
STEPS = PaperClaim(
    name="steps", section="2.2", sentence="20 are enough", metric="diversity", proposed=STEPS_4, baseline=STEPS_2
)
SPIKES = TOKENS.model_copy(update={"name": "spikes", "metric": "largest_spike"})
TINY = ClaimsBench(
    claims=(TOKENS, STEPS, SPIKES),
    seeds=(0, 1),
    scenes=24,
    held_out=8,
    sizes=(32, 48),
    prompts_per_category=1,
    local=True,
    overrides=(
        *(f"tokenizer.model.{side}_{name}" for side in ("encoder", "decoder") for name in ("width=32", "heads=1")),
        *("tokenizer.model.image_size=32", "tokenizer.model.patch_size=8", "tokenizer.train.log_every=1"),
        *("generator.model.width=32", "generator.model.heads=1", "generator.text_encoder.layers=2"),
        *(f"{stage}.train.{item}" for stage in ("tokenizer", "generator") for item in ("steps=3", "global_batch=8")),
    ),
)
RECIPE = load_config(BenchConfig, "bench/claims").claims


# --- verdicts


def test_the_interval_is_students_over_the_seeds() -> None:
    low, high = student_mean([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert all(value != value for values in ([], [1.0], [2.0, 2.0]) for value in student_mean(values))


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ((1.0, 1.1, 0.9), 0.0, "holds"),
        ((-1.0, -1.1, -0.9), 0.0, "fails"),
        ((1.0, -1.0, 0.5), 0.0, "undecided"),
        ((-0.1, -0.11, -0.09), 0.5, "holds"),  # within the margin
        ((-0.9, -0.92, -0.88), 0.5, "fails"),
        ((-0.9, -0.1, -0.5), 0.5, "undecided"),
        ((3.0,), 0.0, "undecided"),
        ((), 0.0, "not measured"),
    ],
)
def test_a_verdict_follows_from_the_paired_interval(
    differences: tuple[float, ...], margin: float, verdict: str
) -> None:
    claim = TOKENS.model_copy(update={"margin": margin})
    # The seeds' own values differ by far more than the arms of one seed.
    values = [(10.0 * seed + difference, 10.0 * seed) for seed, difference in enumerate(differences)]
    found = judge(claim, values)
    assert found.verdict == verdict
    assert found.differences == pytest.approx(differences)


def test_less_is_better_where_the_metric_says_so() -> None:
    assert judge(SPIKES, [(1.0, 2.0), (1.1, 2.2), (1.2, 2.1)]).verdict == "holds"
    assert judge(SPIKES, [(2.0, 1.0), (2.2, 1.1), (2.1, 1.2)]).verdict == "fails"


def test_a_spike_is_measured_against_the_steps_before_it() -> None:
    flat = [1.0] * 60
    assert largest_spike(flat, 30) == largest_spike([1.0] * 5, 0) == 1.0
    assert largest_spike([*flat[:40], 3.0, *flat], 30) == 3.0
    assert largest_spike([*flat[:25], 3.0, *flat], 30) == 1.0  # during warm-up
    assert largest_spike([2.0**-i for i in range(60)], 30) < 1  # no loss that falls is a spike


# --- steps


def test_arms_share_the_steps_that_they_have_in_common(tmp_path: Path) -> None:
    steps = all_steps(plan_trials(TINY, str(tmp_path)))
    # Of each seed: two tokenizers, the codes of one, a generator, and two kinds of samples.
    assert Counter(step.kind for step in steps) == {"tokenizer": 4, "codes": 2, "generator": 2, "samples": 4}
    places = {step.key: place for place, step in enumerate(steps)}
    assert all(places[need.key] < places[step.key] for step in steps for need in step.needs)
    assert [step.seed for step in steps] == [0] * 6 + [1] * 6


def test_a_key_follows_from_what_the_result_depends_on_alone(tmp_path: Path) -> None:
    def keys(folder: str = "a", **changed: Any) -> list[str]:
        bench = TINY.model_copy(update={"claims": (STEPS,), "seeds": (0,), **changed})
        return [step.key for step in all_steps(plan_trials(bench, str(tmp_path / folder)))]

    tokenizer, codes, generator, *samples = keys()
    assert keys("b") == keys(local=False) == keys(page="a.md") == [tokenizer, codes, generator, *samples]
    other = keys(overrides=(*TINY.overrides, "generator.timesteps=uniform"))
    assert other[:2] == [tokenizer, codes] and {generator, *samples}.isdisjoint(other)
    assert keys(prompts_per_category=2)[:3] == [tokenizer, codes, generator]
    assert keys(prompts_per_category=2)[3:] != samples
    assert {tokenizer, codes, generator, *samples}.isdisjoint(keys(scenes=25))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.model.pixel_haed=conv", "unknown key 'model.pixel_haed', did you mean 'pixel_head'?"),
        ("sampling.sampler=postrior", "'sampler' = 'postrior'"),
        ("model.width=32", "expected a key of tokenizer, generator, sampling"),
        ("tokenizer", "expected key=value"),
    ],
)
def test_an_override_that_is_no_setting_is_refused_before_anything_runs(
    override: str, message: str, tmp_path: Path
) -> None:
    wrong = STEPS.model_copy(update={"baseline": ClaimArm(name="wrong", overrides=(override,))})
    bench = TINY.model_copy(update={"claims": (TOKENS, wrong)})
    with pytest.raises(UserError) as error:
        run_claims(bench, str(tmp_path / "claims"))
    assert str(error.value).startswith("claim 'steps', arm 'wrong': --set ")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": (32, 36)}, "claim 'tokens': sizes 36: not a multiple of 8"),
        (
            {"claims": (TOKENS.model_copy(update={"size": 64}),)},
            r"claim 'tokens': size 64: expected one of sizes \(32,",
        ),
        ({"claims": ()}, "expected at least one claim"),
    ],
)
def test_what_cannot_be_measured_is_refused_too(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_claims(TINY.model_copy(update=changed), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_resumes_without_repeating_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real arms of every kind: tokenizers, generators and their samples, of two seeds."""
    done: list[str] = []
    finish, train = Step.finish, TrainedGenerator.run

    def counted(step: Step) -> str:
        done.append(finish(step))
        return done[-1]

    def killed(step: TrainedGenerator) -> dict[str, Any]:
        if step.seed == 1:
            raise KeyboardInterrupt
        return train(step)

    monkeypatch.setattr(Step, "finish", counted)
    monkeypatch.setattr(TrainedGenerator, "run", killed)
    folder = tmp_path / "claims"
    with pytest.raises(KeyboardInterrupt):
        run_claims(TINY, str(folder))
    begun = {path.stem: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    # The page of a run that goes on has what is measured so far.
    assert "not measured" not in (folder / "claims.md").read_text() and 0 < len(done) < 12
    monkeypatch.setattr(TrainedGenerator, "run", train)
    result = run_claims(TINY, str(folder))
    trials = plan_trials(TINY, str(folder))
    assert sorted(done) == sorted(step.key for step in all_steps(trials))
    assert all((folder / f"{name}.json").stat().st_mtime_ns == time for name, time in begun.items())
    # The command reads the results beside its output, and runs nothing again.
    before, recipe = len(done), tmp_path / "claims.yaml"
    bench = BenchConfig(suites=("claims",), output=f"{folder}.json", claims=TINY)
    recipe.write_text(dump_yaml(bench))
    assert job("bench")(["--config", str(recipe)]) == 0 and len(done) == before
    assert json.loads((tmp_path / "claims.json").read_text())["results"][0]["rows"] == result.rows
    out = capsys.readouterr().out
    assert f"page: {folder}/claims.md" in out and f"\nall numbers are in {folder}.json" in out
    # The verdicts are made of the measured values.
    tokens, steps, _ = verdicts_of(TINY, trials)
    stored = [json.loads((folder / f"{trial.proposed[-1].key}.json").read_text())["result"] for trial in trials]
    assert tokens.proposed == (stored[0]["psnr"]["32"], stored[3]["psnr"]["32"]) and len(set(tokens.proposed)) == 2
    assert steps.proposed == (stored[1]["diversity"], stored[4]["diversity"])
    assert all(5 < value < 30 for value in tokens.proposed) and all(0.2 < value < 0.6 for value in steps.proposed)
    assert {row["claim"] for row in result.rows} == {"tokens", "steps", "spikes"}


@pytest.mark.nightly
@pytest.mark.ray
def test_steps_run_on_ray_after_those_that_they_need(tmp_path: Path, ray_session: None) -> None:
    bench = TINY.model_copy(update={"claims": (STEPS,), "seeds": (0,), "local": False})
    run_claims(bench, str(tmp_path))
    steps = all_steps(plan_trials(bench, str(tmp_path)))
    assert len(steps) == 5 and all(step.result() for step in steps)
    assert list(run.run_on_ray([])) == []


# --- the page and the recipe


def test_the_page_has_every_claim_and_says_what_does_not_hold() -> None:
    values = {
        "tokens": [(26.0, 20.0), (26.5, 20.1), (26.2, 20.3)],
        "steps": [(0.2, 0.3), (0.21, 0.32), (0.19, 0.3)],
        "spikes": [(1.0, 1.1), (1.2, 1.0), (1.1, 1.15)],
    }
    verdicts = [judge(claim, values[claim.name]) for claim in TINY.claims]
    page = page_text(TINY, verdicts, "claims.svg")
    assert "Of 3 claims 1 hold, 1 fail, 1 are undecided." in page and "![" in page
    for claim in TINY.claims:
        assert f'{claim.name} ({claim.section}): "{claim.sentence}"' in page
        assert page.count(f"| {claim.name} ") == 1
    assert "8 tokens: 26.2 dB" in page and "4 tokens: 20.1 dB" in page
    fails = page.partition("## What does not hold at this scale")[2].partition("##")[0]
    assert "- steps: diversity 0.2 (4 steps) against 0.307 (2 steps), in favour -0.107 [-0.12" in fails
    assert "tokens" not in fails and "Not decided by these seeds: spikes." in fails
    image = ElementTree.fromstring(forest(verdicts))
    texts = [element.text for element in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"tokens", "steps", "spikes"} <= set(texts)
    assert len(list(image.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * (3 + 1)


def test_sentences_are_the_papers(shared_dir: Path) -> None:
    paper = " ".join((shared_dir / "reference" / "paper.txt").read_text().split()).lower()
    quoted = [claim.sentence for claim in RECIPE.claims if "Table" not in claim.section]
    parts = [part for sentence in quoted for part in sentence.lower().split(" [...] ")]
    assert len(parts) > 20 and [part for part in parts if part not in paper] == []


def test_the_recipe_can_run_and_its_page_is_that_of_the_documentation(tmp_path: Path) -> None:
    trials = plan_trials(RECIPE, str(tmp_path))
    assert len(trials) == len(RECIPE.claims) * len(RECIPE.seeds)
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    for claim in RECIPE.claims:
        assert f"| {claim.name} " in page and claim.sentence in page
    assert "not measured" not in page
