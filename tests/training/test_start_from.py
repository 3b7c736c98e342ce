"""A generator that starts from trained weights: another run's, or the released ones once imported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_model, save_model, weight_hash
from instella_ray.models.generator import build_generator
from instella_ray.models.published import import_published
from instella_ray.runs import read_record
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, complete_config, run_generator
from instella_ray.training.trainer import Trainer

from ..kit.models import TINY_BIT
from ..kit.training import CPU, generator_config


def parent(folder: Path, cfg: GeneratorRunConfig, seed: int = 3, **extra: object) -> str:
    """A folder of random weights, with others as their average, that fits the complete configuration ``cfg``."""
    torch.manual_seed(seed)
    model, ema = build_generator(cfg.model), build_generator(cfg.model).state_dict()
    folder.mkdir()
    own = {"tokenizer_hash": weight_hash(cfg.tokenizer), "text_encoder": cfg.text_encoder.model_dump(mode="json")}
    save_model(folder, model, ema=ema, extra={**own, **extra})
    return str(folder)


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_run_starts_from_the_average_of_its_parent_which_its_record_names(
    kind: Literal["diffusion", "ar"], codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Calibration would overwrite trained projections.
    cfg = generator_config(kind, codes, tokenizer, tmp_path / "run", steps=1, loggers=()).model_copy(
        update={"calibrate_text": True}
    )
    folder = parent(tmp_path / "parent", complete_config(cfg))
    cfg = cfg.model_copy(update={"start_from": folder})
    complete = complete_config(cfg)
    assert complete.start_from == folder
    trainer = Trainer(GeneratorTask(complete, CPU), complete.train, CPU, None)
    expected = load_model(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.task.model.state_dict().items())
    assert all(torch.equal(value, expected[name]) for name, value in trainer.ema.state.items())
    run_generator(cfg)
    record = read_record(str(tmp_path / "run"))
    assert record is not None
    (named,) = (each for each in record.inputs if each.role == "parent")
    assert (named.path, named.identity) == (folder, weight_hash(folder))
    assert not [each for each in caplog.records if "start_from" in each.getMessage()]


def test_a_checkpoint_is_fine_tuned_under_its_name(codes: str, tokenizer: str, tmp_path: Path) -> None:
    first = run_generator(generator_config("ar", codes, tokenizer, tmp_path / "first", steps=1, loggers=()))
    cfg = generator_config("ar", codes, tokenizer, tmp_path / "second", steps=1, loggers=())
    cfg = cfg.model_copy(update={"start_from": str(tmp_path / "first" / "latest")})
    assert complete_config(cfg).start_from == first
    run_generator(cfg)
    record = read_record(str(tmp_path / "second"))
    assert record is not None
    (named,) = (each for each in record.inputs if each.role == "parent")
    assert named.facts["step"] == 1 and {each.role for each in named.inputs} >= {"codes", "tokenizer"}


def test_released_weights_are_trained_on_once_they_are_imported(codes: str, tokenizer: str, tmp_path: Path) -> None:
    cfg = generator_config("diffusion", codes, tokenizer, tmp_path / "run")
    model = build_generator(complete_config(cfg).model)
    (tmp_path / "release").mkdir()
    torch.save({"module": model.state_dict()}, tmp_path / "release" / "diffusion.pt")
    (folder,) = import_published(tmp_path / "release", tmp_path / "imported", tokenizer=Path(tokenizer))
    released = cfg.model_copy(
        update={
            "start_from": str(folder),
            "model": cfg.model.model_copy(update={"heads": load_model(folder).cfg.heads}),
        }
    )
    task = GeneratorTask(complete_config(released), CPU)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in task.model.state_dict().items())
    file = cfg.model_copy(update={"start_from": str(tmp_path / "release" / "diffusion.pt")})
    with pytest.raises(UserError, match=r"a file, expected a model folder; python -m instella_ray\.models\.published"):
        complete_config(file)


def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    no_ray: None, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    cfg = generator_config("diffusion", codes, tokenizer, tmp_path / "run")
    complete = complete_config(cfg)
    sizes = {"width": 64, "kind": "ar"}
    folders = {
        f"its model.{name} is {value!r}, this run's is {getattr(complete.model, name)!r}": parent(
            tmp_path / name, complete.model_copy(update={"model": complete.model.model_copy(update={name: value})})
        )
        for name, value in sizes.items()
    }
    save_model(tmp_path, BIT(TINY_BIT))
    folders |= {"holds a tokenizer, expected a generator": str(tmp_path), "nowhere: not a model folder": "nowhere"}
    for message, folder in folders.items():
        with pytest.raises(UserError) as found:
            run_generator(cfg.model_copy(update={"start_from": folder}))
        assert message in str(found.value)
    assert not (tmp_path / "run").exists()


def test_codes_and_features_of_another_kind_than_the_parents_are_warned_of(
    codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "instella_ray")
    cfg = generator_config("ar", codes, tokenizer, tmp_path / "run")
    folder = parent(
        tmp_path / "parent", complete_config(cfg), tokenizer_hash="another", text_encoder={"name": "of/another"}
    )
    complete_config(cfg.model_copy(update={"start_from": folder}))
    assert caplog.messages == [
        f"start_from {folder}: not trained on codes of the tokenizer {tokenizer}, whose bits may mean something else",
        f"start_from {folder}: trained with the text encoder of/another, this run's is {cfg.text_encoder.name}",
    ]
