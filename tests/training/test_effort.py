"""What is logged of a step beside its loss: bit accuracy by t, FLOP, MFU, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from instella_ray.flops import (
    ACCELERATORS,
    TextEncoderSizes,
    generator_training,
    text_encoder_forward,
    tokenizer_training,
)
from instella_ray.models.generator import DiffusionGenerator, GeneratorConfig
from instella_ray.training.generator import GeneratorTask, complete_config
from instella_ray.training.generator_loss import (
    BY_TIME,
    TIME_BINS,
    DiffusionLoss,
    accuracy_by_time,
    accuracy_summary,
    noise,
)
from instella_ray.training.metrics_log import bf16_peak, peak_memory, throughput
from instella_ray.training.tokenizer import TokenizerTask

from ..kit.models import TINY_BIT
from ..kit.training import generator_config, tokenizer_config


def test_accuracy_by_time_is_that_of_the_whole_batch_however_it_is_cut() -> None:
    torch.manual_seed(0)
    accuracy, t = torch.rand(90), torch.rand(90) * 0.75  # the last bins are nearly empty
    t[0] = 1.0
    parts = [accuracy_by_time(accuracy[i], t[i]) for i in torch.arange(90).split([7, 50, 33])]
    found = accuracy_summary(torch.stack(parts).mean(0))  # as micro-batches and ranks are averaged
    for number in range(5):
        inside = (t >= number / 5) & (t < (number + 1) / 5 if number < 4 else t <= 1)
        torch.testing.assert_close(found[f"bit_accuracy_t{number}"], accuracy[inside].mean())
    torch.testing.assert_close(found["bit_accuracy_noisy"], accuracy[t > 0.5].mean())


def test_a_bin_without_samples_is_left_out() -> None:
    found = accuracy_summary(accuracy_by_time(torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.15])))
    assert {name: value.item() for name, value in found.items()} == {"bit_accuracy_t0": 0.75}


def test_counts_are_exact_under_autocast() -> None:
    cfg = GeneratorConfig(num_tokens=4, bits_per_token=6, width=32, layers=1, heads=1, text_width=8)
    codes = torch.zeros(700, 4, 6)
    features, mask = torch.zeros(1, 700, 2, 8), torch.ones(700, 2, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, facts = DiffusionLoss(DiffusionGenerator(cfg))(codes, features, mask, torch.arange(700))
    t, _ = noise(torch.arange(700), 4, 6, "logit_normal")
    bins = torch.histc(t, TIME_BINS, 0, 1).tolist()
    assert facts[BY_TIME][1].tolist() == [*bins, (t > 0.5).sum()] and max(bins) > 128
    torch.testing.assert_close(facts[BY_TIME][0][:TIME_BINS].sum() / 700, facts["bit_accuracy"])


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_generator_counts_its_text_encoder_where_it_ran(
    kind: str, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    task = GeneratorTask(complete_config(generator_config(kind, codes, tokenizer, tmp_path)), torch.device("cpu"))  # type: ignore[arg-type]
    batch = task.data.batch(0, np.arange(8))
    parts = task.micro_batches(batch, 4, torch.arange(8))
    learned = sum(4 * generator_training(task.cfg.model, p["features"].shape[2]).model for p in parts)
    sizes = TextEncoderSizes.of(task.text.encoder.model)
    texts = len(set(batch.captions))
    length = parts[0]["features"].shape[2]
    assert (sizes.layers, sizes.width) == (2, 384)
    assert task.flops(parts) - learned == pytest.approx(texts * text_encoder_forward(sizes, length), rel=0.35)
    # The same captions again are in the cache: nothing is computed for them.
    parts = task.micro_batches(batch, 4, torch.arange(8))
    assert task.flops(parts) == learned


def test_a_tokenizer_counts_every_image(shards: str, tmp_path: Path) -> None:
    task = TokenizerTask(tokenizer_config(shards, tmp_path))
    parts = task.micro_batches(task.data.batch(0, np.arange(6)), 4, torch.arange(6))
    assert task.flops(parts) == 6 * tokenizer_training(TINY_BIT, 32, 32).model


def test_mfu_is_a_share_of_a_known_peak_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert throughput(5e12, 8, 1e13) == {"flops_per_second": 4e13, "mfu": 0.5}
    assert throughput(5e12, 8, None) == {"flops_per_second": 4e13}
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert bf16_peak(cpu, "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    assert bf16_peak(cuda, "auto") == ACCELERATORS["mi300x"].peak and bf16_peak(cuda, "fp32") is None
    assert peak_memory(cpu) > 50e6
