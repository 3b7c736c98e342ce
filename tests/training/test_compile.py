"""``train.compile``: the same losses, files and resumption with compiled blocks as without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_model
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.training.generator import GeneratorRunConfig, complete_config, run_generator
from instella_ray.training.generator import GeneratorTask as Task
from instella_ray.training.learner import compile_blocks
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import TrainConfig, first_difference
from instella_ray.training.tokenizer import run_tokenizer
from instella_ray.training.trainer import Trainer

from ..kit.models import GENERATOR_SIZES, TINY_BIT
from ..kit.training import generator_config, stop_a_generator_run, tokenizer_config, untimed

CPU = torch.device("cpu")


def losses(folder: str | Path) -> list[float]:
    return [row["loss"] for row in read_metrics(str(folder))]


@pytest.mark.parametrize("kind", ["diffusion", "ar", "tokenizer"])
def test_every_block_is_compiled_and_keeps_its_names(kind: str) -> None:
    model = BIT(TINY_BIT) if kind == "tokenizer" else build_generator(GeneratorConfig(kind=kind, **GENERATOR_SIZES))  # type: ignore[arg-type]
    names = list(model.state_dict())
    compile_blocks(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    blocks = [f"{part}transformer_blocks.{i}" for part in ("encoder.", "decoder.", "") for i in range(2)]
    assert compiled == (blocks[:4] if kind == "tokenizer" else blocks[4:])
    assert list(model.state_dict()) == names


def test_a_resumed_run_may_be_compiled(tmp_path: Path) -> None:
    plain = generator_config("diffusion", "codes", "tokenizer", tmp_path)
    assert first_difference(plain, with_train(plain, compile=True)) is None


def with_train(cfg: GeneratorRunConfig, **changes: Any) -> GeneratorRunConfig:
    return cfg.model_copy(update={"train": TrainConfig.model_validate({**cfg.train.model_dump(), **changes})})


@pytest.mark.process
@pytest.mark.nightly
@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_compiled_generators_have_the_same_losses_and_go_on(
    kind: Literal["diffusion", "ar"], again: bool, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = generator_config(kind, codes, tokenizer, tmp_path / "plain").model_copy(
        update={"gradient_checkpointing": again}
    )
    run_generator(plain)
    compiled = with_train(plain, compile=True, run_dir=str(tmp_path / "compiled"))
    final = run_generator(compiled)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    stopped = with_train(compiled, run_dir=str(tmp_path / "stopped"))
    stop_a_generator_run(stopped)
    other = run_generator(with_train(stopped, resume=True))
    assert untimed(read_metrics(str(tmp_path / "stopped"))) == untimed(read_metrics(str(tmp_path / "compiled")))
    for (name, value), found in zip(
        load_model(final).state_dict().items(), load_model(other).state_dict().values(), strict=True
    ):
        assert torch.equal(value, found), name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, graphs


@pytest.mark.process
@pytest.mark.nightly
def test_compiled_tokenizers_have_the_same_losses(shards: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    for name, compiled in (("plain", False), ("compiled", True)):
        run_tokenizer(tokenizer_config(shards, tmp_path / name, steps=6, compile=compiled))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def rank_main(rank: int, folder: str, cfg: GeneratorRunConfig) -> None:
    """Three steps as one of two ranks with each sharding, compiled and not."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for sharding in ("ddp", "zero2", "fsdp2"):
        found = []
        for compiled in (False, True):
            here = with_train(cfg, sharding=sharding, compile=compiled).train
            trainer = Trainer(Task(cfg, CPU), here, CPU, None)
            found.append([float(trainer.step(step, trainer.batch(step)).means["loss"]) for step in range(3)])
        assert found[0] == pytest.approx(found[1], rel=1e-3), sharding
    torch.distributed.destroy_process_group()


@pytest.mark.process
@pytest.mark.nightly
def test_compiled_blocks_can_be_shared_out(codes: str, tokenizer: str, tmp_path: Path) -> None:
    cfg = complete_config(generator_config("diffusion", codes, tokenizer, tmp_path / "run"))
    torch.multiprocessing.spawn(rank_main, (str(tmp_path), cfg), nprocs=2)
