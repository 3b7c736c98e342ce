"""A run is the same however its weights, gradients and optimizer state are spread: on two real processes (gloo)."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from instella_ray.config import dump_yaml, load_config
from instella_ray.models.checkpoint import load_model, read_tensors
from instella_ray.training.checkpoints import OPTIMIZER
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, complete_config
from instella_ray.training.settings import HeldOutConfig, TrainConfig
from instella_ray.training.trainer import Trainer

from ..kit.training import Spike, generator_config

STEPS, SAVED = 6, 3
SPOILT = 1
"""Step of short runs at which rank 1's loss is not finite."""
HARMS = {"offset": math.inf, "factor": math.nan}
"""An infinite loss with a finite gradient, and a gradient that is not finite either (:class:`Spike`)."""
CPU = torch.device("cpu")
Kind = Literal["diffusion", "ar"]


class Case(NamedTuple):
    """A run by two ranks."""

    kind: Kind
    sharding: str
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.sharding}-{self.precision}{'-again' if self.checkpointing else ''}"


CASES = [
    *(Case(kind, sharding) for kind in ("diffusion", "ar") for sharding in ("ddp", "zero2", "fsdp2")),
    Case("diffusion", "fsdp2", checkpointing=True),
    *(Case("diffusion", sharding, "bf16") for sharding in ("ddp", "zero2", "fsdp2")),
]
SPOILED = [*(Case("diffusion", sharding) for sharding in ("ddp", "zero2", "fsdp2")), Case("diffusion", "zero2", "bf16")]
WHOLE = [case for case in CASES if case.precision == "fp32"]


def run_config(case: Case, folder: Path, codes: str, tokenizer: str) -> GeneratorRunConfig:
    """Two ranks take two micro-batches of two each, and of the held-out samples one rank two and the other one.

    Diffusion has weight decay, AR weights that are not trained.
    """
    cfg = generator_config(case.kind, codes, tokenizer, folder, held_out=HeldOutConfig(samples=5))
    given: dict[str, Any] = {
        "sharding": case.sharding,
        "precision": case.precision,
        "micro_batch_size": 2,
        "steps": STEPS,
    }
    train = cfg.train.model_dump() | given
    if case.kind == "diffusion":
        train["optimizer"]["weight_decay"] = 0.1
    changes = {
        "train": TrainConfig.model_validate(train),
        "model": cfg.model.model_copy(update={"unused_time_embed": case.kind == "ar"}),
        "gradient_checkpointing": case.checkpointing,
    }
    return cfg.model_copy(update=changes)


def trained(cfg: GeneratorRunConfig, last: Path | None, save: Path) -> list[float]:
    """This rank's losses from the checkpoint ``last`` to the end; those after ``SAVED`` and all steps go to ``save``.

    So does the held-out loss after ``SAVED`` steps, which a run from that checkpoint does not compute.
    """
    trainer = Trainer(GeneratorTask(cfg, CPU), cfg.train, CPU, last)
    losses = []
    for step in range(trainer.start, STEPS):
        losses.append(float(trainer.step(step, trainer.batch(step)).means["loss"]))
        if step + 1 in (SAVED, STEPS):
            (save / str(step + 1)).mkdir(parents=True, exist_ok=True)
            trainer.save(save / str(step + 1), step + 1)
        if step + 1 == SAVED:
            (save / f"held_out{trainer.rank}.json").write_text(json.dumps(trainer.held_out()))
    image = trainer.preview()
    assert (image is None) == (trainer.rank != 0)
    return losses


def skip_a_batch(cfg: GeneratorRunConfig, harm: str, save: Path) -> None:
    """Three steps of a rank, of which one is skipped, with the states after each."""
    train = cfg.train.model_copy(update={"on_nonfinite": "skip"})
    task = GeneratorTask(cfg, CPU)
    spike = task.step_module = Spike(task.step_module)
    trainer, usual = Trainer(task, train, CPU, None), getattr(spike, harm)
    for step in range(3):
        setattr(spike, harm, HARMS[harm] if (trainer.rank, step) == (1, SPOILT) else usual)
        stepped = trainer.step(step, trainer.batch(step))
        assert (not stepped.means) == (step == SPOILT) and stepped.skipped == (step >= SPOILT)
        (here := save / f"{harm}-{step}").mkdir(parents=True, exist_ok=True)
        trainer.save(here, step)


def rank_main(rank: int, folder: str, store: str) -> None:
    """Every case as one of two ranks, whole and again from its checkpoint in the middle."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as whatever starts workers does
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        here = Path(folder, case.name)
        cfg = load_config(GeneratorRunConfig, str(here / "config.yaml"))
        whole = trained(cfg, None, here / "whole")
        torch.distributed.barrier()  # rank 0 writes what the other one reads
        again = trained(cfg, here / "whole" / str(SAVED), here / "again")
        for harm in HARMS if case in SPOILED else ():
            skip_a_batch(cfg, harm, here)
        (here / f"rank{rank}.json").write_text(json.dumps({"whole": whole, "again": again}))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(codes: str, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        (folder / case.name).mkdir()
        cfg = complete_config(run_config(case, folder / case.name / "run", codes, tokenizer))
        (folder / case.name / "config.yaml").write_text(dump_yaml(cfg))
    torch.multiprocessing.spawn(rank_main, (str(folder), str(folder / "store")), nprocs=2)
    return folder


def losses_of(runs: Path, case: Case, which: str) -> list[float]:
    ranks = [json.loads((runs / case.name / f"rank{rank}.json").read_text())[which] for rank in (0, 1)]
    return [sum(pair) / 2 for pair in zip(*ranks, strict=True)]


def alone(case: Case, runs: Path, last: Path | None, save: Path) -> list[float]:
    """The same by one process."""
    return trained(load_config(GeneratorRunConfig, str(runs / case.name / "config.yaml")), last, save)


@pytest.fixture(scope="module")
def single(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, tuple[list[float], Path]]:
    """Losses and checkpoints of one process without any sharding."""
    found: dict[Kind, tuple[list[float], Path]] = {}
    for kind in ("diffusion", "ar"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = alone(Case(kind, "ddp"), runs, None, folder), folder
    return found


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal but for the order of sums: captions stand beside others in a rank's batch of the text encoder, whose last digits
    the first steps of Adam enlarge where a gradient is nearly 0, since they divide by its size."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.process
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_two_ranks_learn_what_one_process_does_however_it_is_shared_out(
    case: Case, runs: Path, single: dict[Kind, tuple[list[float], Path]]
) -> None:
    losses, folder = single[case.kind]
    assert len(set(losses)) == STEPS
    assert losses_of(runs, case, "whole") == pytest.approx(losses, rel=1e-6)
    last = runs / case.name / "whole" / str(STEPS)
    for name in ("model.safetensors", "ema.safetensors", OPTIMIZER):
        close(read_tensors(last / name), read_tensors(folder / str(STEPS) / name))


@pytest.mark.process
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_ranks_share_the_held_out_samples(case: Case, runs: Path, single: dict[Kind, tuple[list[float], Path]]) -> None:
    one, other = (json.loads((runs / case.name / "whole" / f"held_out{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and one["held_out_loss"] != one["held_out_loss_raw"]
    assert one == pytest.approx(json.loads((single[case.kind][1] / "held_out0.json").read_text()), abs=3e-6)


@pytest.mark.process
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_go_on_as_if_they_had_never_stopped(case: Case, runs: Path) -> None:
    assert losses_of(runs, case, "again") == losses_of(runs, case, "whole")[SAVED:]
    ends = [load_model(runs / case.name / which / str(STEPS)).state_dict() for which in ("whole", "again")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.process
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_one_process_goes_on_with_what_two_ranks_have_saved(
    case: Case, runs: Path, single: dict[Kind, tuple[list[float], Path]], tmp_path: Path
) -> None:
    losses = alone(case, runs, runs / case.name / "whole" / str(SAVED), tmp_path)
    assert losses == pytest.approx(single[case.kind][0][SAVED:], rel=1e-6)


@pytest.mark.process
@pytest.mark.parametrize("case", SPOILED, ids=lambda case: case.name)
def test_all_ranks_skip_a_batch_whose_loss_is_not_finite_on_one(case: Case, runs: Path) -> None:
    last = []
    for harm in HARMS:
        states = [
            {
                f"{name}/{key}": value
                for name in ("model.safetensors", "ema.safetensors", OPTIMIZER)
                for key, value in read_tensors(runs / case.name / f"{harm}-{step}" / name).items()
            }
            for step in range(3)
        ]
        before, after, later = states
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert all(value.isfinite().all() for value in later.values())
        assert any(not torch.equal(value, later[key]) for key, value in after.items())
        assert {float(value) for key, value in later.items() if key.endswith("/step")} == {2}
        last.append(later)
    assert all(torch.equal(value, last[1][key]) for key, value in last[0].items())


@pytest.mark.process
def test_lower_precision_costs_digits_and_nothing_else(runs: Path) -> None:
    ddp, *others = (losses_of(runs, case, "whole") for case in CASES if case.precision == "bf16")
    full = losses_of(runs, Case("diffusion", "ddp"), "whole")
    assert ddp != full and ddp == pytest.approx(full, rel=0.02)
    assert all(losses == pytest.approx(ddp, rel=0.01) for losses in others)


def test_settings_that_cannot_be_shared_out_are_refused(codes: str, tokenizer: str, tmp_path: Path) -> None:
    good: dict[str, Any] = {"run_dir": "run", "sharding": "fsdp2"}
    TrainConfig.model_validate(good)
    with pytest.raises(ValueError, match="sharding fsdp2: muon needs whole matrices, expected adamw"):
        TrainConfig.model_validate({**good, "optimizer": {"name": "muon"}})
