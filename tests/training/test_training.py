"""Training: schedules, averages and optimizers, what a run logs and saves, and that interrupted equals uninterrupted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from instella_ray.config import load_config
from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_expected, load_model, read_checkpoint_config
from instella_ray.models.folders import latest_checkpoint
from instella_ray.runs import read_record
from instella_ray.training.checkpoints import Checkpoint, read_checkpoint, save_checkpoint
from instella_ray.training.launch import launch
from instella_ray.training.learner import Learner
from instella_ray.training.losses import PerceptualConfig, TokenizerLossConfig, bit_share, bit_summary, psnr
from instella_ray.training.nonfinite import NonFiniteLoss
from instella_ray.training.optim import EMA, build_optimizers, lr_scale, orthogonalize
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import OptimizerConfig, WorkersConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerLoss, TokenizerTask, run_tokenizer

from ..kit.models import TINY_BIT
from ..kit.training import HERE, PLAIN_LOSS, TWO, tokenizer_config, untimed


def test_the_schedule_warms_up_holds_and_decays() -> None:
    cfg = OptimizerConfig(warmup_steps=9, decay_fraction=0.5)
    rates = [lr_scale(step, 100, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:50] == [1.0] * 41
    assert all(a >= b for a, b in pairwise(rates[50:])) and 0 < rates[-1] < 0.05
    assert lr_scale(99, 100, OptimizerConfig(warmup_steps=0)) == 1.0


def test_the_average_forgets_the_start_and_copies_buffers() -> None:
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3)
        model.running_mean.fill_(5)  # type: ignore[union-attr]
    for step in range(200):
        ema.update(model, step)
    torch.testing.assert_close(ema.state["weight"], torch.full((2,), 3.0))
    assert ema.state["running_mean"].tolist() == [5, 5]


def test_psnr_and_bit_statistics_are_what_they_say() -> None:
    reference = torch.zeros(1, 3, 4, 4)
    assert psnr(reference + 0.2, reference).item() == pytest.approx(20.0, abs=1e-4)
    logits = torch.tensor([[[1.0, -1.0]], [[1.0, 1.0]]])
    facts = bit_summary(bit_share(logits > 0))
    assert facts["dead_bits"] == 0.5 and facts["bit_mean"] == 0.75 and facts["bit_entropy"] == pytest.approx(0.5)


def test_loss_parts_add_up() -> None:
    torch.manual_seed(0)
    bit = BIT(TINY_BIT).train()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    look = PerceptualConfig(weights="random", size=48, crop=16, weight=2.0, crop_weight=3.0)
    cfg = TokenizerLossConfig(gradient_weight=0.5, code_weight=0.1, perceptual=look)
    loss, parts = TokenizerLoss(bit, cfg)(images, images, torch.arange(4), temperature=0.5)
    perceptual = 2 * parts["lpips_vgg_random"] + 3 * parts["lpips_vgg_random_crop"]
    supervised = parts["reconstruction"] + 0.5 * parts["edges"] + perceptual
    torch.testing.assert_close(loss, supervised + 0.1 * parts["code_loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_muons_updates_have_singular_values_near_one_and_the_same_singular_vectors(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(matrices, 5, dtype)
    assert made.dtype == torch.float32
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ made @ vh.mT
    # bfloat16 has 8 bits: five iterations of products leave an error of a few hundredths.
    torch.testing.assert_close(
        inner,
        torch.diag_embed(inner.diagonal(dim1=1, dim2=2)),
        atol=1e-4 if dtype == torch.float32 else 0.1,
        rtol=0,
    )


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    bit = BIT(TINY_BIT)
    adamw, muon = build_optimizers(bit, OptimizerConfig(name="muon", lr=1e-3, matrix_lr=0.1)).members
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in bit.named_parameters() if id(p) in taken}
    inner = {name for name, p in bit.named_parameters() if p.ndim == 2 and (".attn." in name or ".mlp." in name)}
    assert names == inner and len(inner) > 4
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(bit.parameters())) - len(inner)


def test_every_group_follows_the_schedule_from_its_own_peak() -> None:
    bit = BIT(TINY_BIT)
    optimizers = build_optimizers(bit, OptimizerConfig(name="muon", lr=1e-3, matrix_lr=0.1))
    for share in (0.5, 0.25):
        optimizers.step(share)
        assert [group["lr"] for group in optimizers.groups] == pytest.approx([share * 1e-3, share * 0.1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_restores_weights_average_and_optimizer(tmp_path: Path, name: str) -> None:
    cfg, cpu = OptimizerConfig(name=name), torch.device("cpu")

    def new(seed: int) -> tuple[BIT, Learner]:
        torch.manual_seed(seed)
        bit = BIT(TINY_BIT).train()
        return bit, Learner(TokenizerLoss(bit, PLAIN_LOSS), bit, cfg, cpu)

    def step(learner: Learner) -> None:
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        learner.backward({"images": images, "targets": images, "seeds": torch.arange(4), "temperature": 0.5}, 1, True)
        learner.update(1, 2)

    bit, learner = new(0)
    step(learner)
    ema = EMA(bit, 0.9).state
    saved = Checkpoint(1, bit.state_dict(), ema, learner.optimizer_state(), None)
    save_checkpoint(tmp_path, bit.cfg, saved, {})
    found, (other, other_learner) = read_checkpoint(tmp_path), new(1)
    assert found.step == 1 and all(torch.equal(value, found.ema[name]) for name, value in ema.items())
    other.load_state_dict(found.weights)
    other_learner.load_optimizer_state(found.optimizer_state)
    step(learner)
    step(other_learner)
    for (key, a), b in zip(bit.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lines of the run, each with run, job, rank and attempt.
    monkeypatch.setenv("INSTELLA_RAY_LOG_FILE", str(tmp_path / "log.jsonl"))
    monkeypatch.setenv("INSTELLA_RAY_RUN_ID", "night-7")
    whole = run_tokenizer(tokenizer_config(shards, tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    cfg = tokenizer_config(shards, stopped)

    class Stopping(TokenizerTask):
        def before_step(self, step: int) -> None:
            super().before_step(step)
            if step == 9:
                raise RuntimeError("stopped on purpose")

    with pytest.raises(RuntimeError, match="stopped on purpose"):
        launch(cfg, lambda device: Stopping(cfg), description="stopped")
    again = run_tokenizer(tokenizer_config(shards, stopped, resume=True))
    said = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    starts = [
        (each["message"], each["step"]) for each in said if each["message"].startswith("training ") and "step" in each
    ]
    begins, goes_on = ("training starts at step 0 of 12", 0), ("training resumes at step 6 of 12", 6)
    assert starts == [begins, begins, goes_on]
    assert [each["step"] for each in said if "is complete" in each["message"]] == [6, 12, 6, 12]
    assert [each["failed_rank"] for each in said if each["level"] == "error"] == [0]
    assert {(each["run"], each["rank"]) for each in said} == {("night-7", 0)}
    assert [each["attempt"] for each in said if each["message"].startswith("training ") and "step" in each] == [1, 1, 2]
    assert {each["job"] for each in said} == {"train_tokenizer", "train"}
    assert untimed(read_metrics(tmp_path / "whole")) == untimed(read_metrics(stopped))
    assert [row["step"] for row in read_metrics(stopped)] == list(range(1, 13))
    a, b = (load_model(folder).state_dict() for folder in (whole, again))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    files = {p.name for p in Path(whole).iterdir()}
    assert {"model.safetensors", "ema.safetensors", "config.yaml", "state.json", "optimizer.safetensors"} <= files
    assert sorted(p.name for p in (tmp_path / "whole" / "previews").iterdir()) == [
        "step-0000006.png",
        "step-0000012.png",
    ]
    assert {"reconstruction", "psnr", "dead_bits", "images_per_second"} <= set(read_metrics(tmp_path / "whole")[0])
    written = load_config(TokenizerConfig, str(tmp_path / "whole" / "config.yaml"))
    assert written == tokenizer_config(shards, tmp_path / "whole")
    record, stopped_record = read_record(str(tmp_path / "whole")), read_record(str(stopped))
    assert record is not None and stopped_record is not None
    assert (record.job, record.attempts[-1].status, record.outputs[0].path) == ("train_tokenizer", "finished", whole)
    assert [attempt.status for attempt in stopped_record.attempts] == ["failed", "finished"]
    about = read_checkpoint_config(whole)["lineage"]
    assert (about["step"], about["run"], about["job"]) == (12, record.run, "train_tokenizer")
    assert (
        about["inputs"] == [each.model_dump(mode="json") for each in record.inputs]
        and record.inputs[0].facts["files"] == 2
    )
    # The same directory again is refused; nothing in it changes.
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        run_tokenizer(cfg)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_nothing_is_resumed_where_nothing_was_begun(no_ray: None, shards: str, tmp_path: Path) -> None:
    for workers in (HERE, TWO):
        with pytest.raises(UserError, match="nothing to resume"):
            run_tokenizer(tokenizer_config(shards, tmp_path / "run", resume=True, workers=workers))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    workers: WorkersConfig, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Though two failures may be mended by trying again: this one would come again.
    assert workers.max_failures == 2
    cfg = tokenizer_config(
        shards, tmp_path / "run", optimizer=OptimizerConfig(lr=1e30, warmup_steps=0), workers=workers
    )
    with pytest.raises(NonFiniteLoss, match="the batch's keys are in") as found:
        run_tokenizer(cfg)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [f"training failed on rank 0: {found.value}"]
    (path,) = (tmp_path / "run").glob("nonfinite-*.json")
    assert len(json.loads(path.read_text())["keys"]) == 16 and str(path) in str(found.value)
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_expected(latest_checkpoint(tmp_path / "run"), BIT)
