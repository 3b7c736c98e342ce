"""Names of model folders: the newest and the best checkpoint of a run, and who takes such names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from instella_ray import storage
from instella_ray.bulk.decode import DecodeConfig, run_decode
from instella_ray.bulk.plan import SampleConfig
from instella_ray.bulk.sample import run_sample
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.errors import UserError
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.models.checkpoint import add_section, weight_hash
from instella_ray.models.folders import checkpoint_name, find_model, named_checkpoint
from instella_ray.models.published import import_published
from instella_ray.operations.doctor import check_model
from instella_ray.serving.config import ServeArgs
from instella_ray.serving.setup import Setup
from instella_ray.training.generator import run_generator
from instella_ray.training.tokenizer import run_tokenizer

from ..kit.models import make_generator, make_tokenizer, write_tokenizer
from ..kit.shards import image_bytes, tar_bytes
from ..kit.training import generator_config, tokenizer_config

Reader = Callable[[str, Path], object]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint of two steps, and one of four that is not complete yet."""
    run = tmp_path / "run"
    for seed, step in enumerate((2, 4)):
        write_tokenizer(run / "checkpoints" / checkpoint_name(step), seed)
    (run / "checkpoints" / checkpoint_name(2) / "state.json").write_text("{}")
    (run / "config.yaml").write_text("validation: null\n")
    return run


def mark_best(folder: Path, step: int) -> Path:
    """Write what validation leaves in its folder; returns the model."""
    model = Path(write_tokenizer(folder / checkpoint_name(step) / "model"))
    (folder / "best.json").write_text(json.dumps({"step": step, "model": str(model)}))
    return model


@pytest.mark.parametrize("name", ["latest", "checkpoints/latest", "latest/"])
def test_latest_is_the_newest_complete_checkpoint(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (run / "checkpoints" / checkpoint_name(step) for step in (2, 4))
    assert find_model(f"{run}/{name}") == str(first)
    (second / "state.json").write_text("{}")
    assert find_model(f"{run}/{name}") == str(second)
    monkeypatch.chdir(run.parent)
    assert find_model(f"run/{name}") == str(second)


def test_best_is_what_validation_has_marked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run: no best checkpoint, as validation has written no .*best\.json"):
        find_model(f"{run}/best")
    model = mark_best(run / "validation", 2)
    assert find_model(f"{run}/best") == str(model)
    shutil.move(run, tmp_path / "moved")
    assert find_model(f"{tmp_path}/moved/best") == str(model).replace("/run/", "/moved/")


def test_best_is_found_where_the_runs_configuration_has_its_validation(run: Path, tmp_path: Path) -> None:
    model = mark_best(tmp_path / "shared" / "run", 4)
    (run / "config.yaml").write_text(f"validation: {{folder: {tmp_path}/shared}}\n")
    assert find_model(f"{run}/best") == str(model)


def test_a_run_on_a_store_has_a_newest_checkpoint_too(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/run"
    for step in (2, 4):
        storage.write_json(storage.join(run, "checkpoints", checkpoint_name(step), "state.json"), {})
    assert find_model(f"{run}/latest") == f"{run}/checkpoints/{checkpoint_name(4)}"
    with pytest.raises(UserError, match="a run directory, not a model folder"):
        find_model(run)


def test_a_folder_of_that_name_is_itself(tmp_path: Path) -> None:
    for name in ("latest", "best"):
        assert find_model(write_tokenizer(tmp_path / name)) == str(tmp_path / name)
    assert find_model(str(tmp_path / "none")) == str(tmp_path / "none")
    assert named_checkpoint("models/bit") == "models/bit"


def test_a_demos_folder_is_its_diffusion_generator(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    shutil.move(run, tmp_path / "mine" / "runs" / "diffusion")
    newest = tmp_path / "mine" / "runs" / "diffusion" / "checkpoints" / checkpoint_name(2)
    assert find_model(f"{tmp_path}/mine") == find_model(f"{tmp_path}/mine/") == str(newest)
    (newest / "state.json").unlink()
    with pytest.raises(UserError, match=r"run_dir .*mine/runs/diffusion: no finished checkpoint"):
        find_model(f"{tmp_path}/mine")


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_dir .*nowhere: no finished checkpoint"):
        find_model(str(tmp_path / "nowhere" / "latest"))


def test_a_run_directory_is_answered_with_the_names_of_its_checkpoints(run: Path) -> None:
    with pytest.raises(UserError, match=rf"^{run}: a run directory, not a model folder; expected {run}/latest, or one"):
        find_model(str(run))
    mark_best(run / "validation", 2)
    with pytest.raises(UserError, match=rf"expected {run}/latest or {run}/best, or one of its checkpoints"):
        find_model(str(run))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    kinds = (("jpg", image_bytes()), ("txt", b"a"))
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(f"{number}.{end}", data) for number in range(4) for end, data in kinds]))
    return path


def encode(model: str, place: Path) -> object:
    return run_encode(EncodeConfig(input=f"{place}/a.tar", output=f"{place}/codes", tokenizer=model, local=True))


def evaluate(model: str, place: Path) -> object:
    metrics = {"bit_usage": {}}
    given = {
        "images": f"{place}/a.tar",
        "output": f"{place}/out",
        "tokenizer": model,
        "metrics": metrics,
        "local": True,
    }
    return run_evaluate(EvaluateConfig.model_validate(given))


def serve_tokenizer(model: str, place: Path) -> Setup:
    generator = {"path": make_generator(place / "generator", weight_hash(named_checkpoint(model)))}
    return Setup.of(ServeArgs.model_validate({"tokenizer": model, "models": {"one": generator}, "sizes": [32]}))


def serve_generator(model: str, place: Path) -> object:
    make_tokenizer(place / "bit")
    return Setup.of(ServeArgs.model_validate({"tokenizer": f"{place}/bit", "models": {"one": {"path": model}}}))


def sample(model: str, place: Path) -> object:
    return run_sample(SampleConfig(model=model, output=f"{place}/samples", local=True))


def decode(model: str, place: Path) -> object:
    return run_decode(DecodeConfig(format="png", tokenizer=model), f"{place}/samples", local=True)


def train_generator(model: str, place: Path) -> object:
    return run_generator(generator_config("diffusion", f"{place}/codes", model, place / "generator"))


def train_tokenizer(model: str, place: Path) -> object:
    config = tokenizer_config(f"{place}/a.tar", place / "finer")
    return run_tokenizer(config.model_copy(update={"start_from": model}))


def convert(model: str, place: Path) -> object:
    (place / "release").mkdir()
    (place / "release" / "diffusion.pt").touch()
    return import_published(place / "release", place / "models", tokenizer=Path(model))


READERS = (encode, evaluate, serve_generator, sample, decode, train_generator, train_tokenizer, convert)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_all_that_read_a_model_take_the_names_of_checkpoints(reader: Reader, run: Path, shard: Path) -> None:
    (run / "checkpoints" / checkpoint_name(2) / "state.json").unlink()
    with pytest.raises(UserError, match=r"run: no finished checkpoint"):
        reader(f"{run}/latest", shard.parent)


def test_the_newest_checkpoint_is_what_is_read(run: Path, shard: Path) -> None:
    newest = run / "checkpoints" / checkpoint_name(2)
    assert encode(f"{run}/latest", shard.parent).tokenizer_hash == weight_hash(newest)  # type: ignore[attr-defined]
    evaluate(f"{run}/latest", shard.parent)
    assert storage.read_json(f"{shard.parent}/out/results.json")["card"]["tokenizer"] == str(newest)
    assert serve_tokenizer(f"{run}/latest", shard.parent).decoder()["path"] == str(newest)
    assert check_model(f"{run}/latest", "--models").level == "ok"
    assert "a run directory" in check_model(str(run), "--models").found


def test_settings_that_an_endpoint_leaves_out_are_those_of_the_models_card(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "bit")
    generator = make_generator(tmp_path / "generator", weight_hash(tmp_path / "bit"))
    add_section(generator, "card", {"about": "Circles.", "prompts": ["a circle"], "sampling": {"temperature": 0.25}})
    model = {"path": generator, "defaults": {"guidance_scale": 3.0}}
    args = {"tokenizer": f"{tmp_path}/bit", "models": {"one": model, "two": {"path": generator}}, "sizes": [32]}
    setup = Setup.of(ServeArgs.model_validate(args))
    one, two = (each.defaults for each in setup.args.models.values())
    assert (one.guidance_scale, one.temperature) == (3.0, 0.25) and (two.guidance_scale, two.temperature) == (7.5, 0.25)
    assert (setup.served.cards["one"].about, setup.served.cards["one"].prompts) == ("Circles.", ("a circle",))
    add_section(generator, "card", {"sampling": {"num_inference_steps": 5000}})
    with pytest.raises(UserError, match=r"models.one.defaults.num_inference_steps: more than limits.steps 1000"):
        Setup.of(ServeArgs.model_validate(args))
    add_section(generator, "card", {"about": 3})
    with pytest.raises(UserError, match=r"generator: 'about' = 3"):
        Setup.of(ServeArgs.model_validate(args))
