"""Captions of a training step: cut by length, tokenized once in the loader's thread, and no value read from the device."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from instella_ray.data.formats.codes import write_codes_file
from instella_ray.data.loading.loader import CodesBatch, Prefetcher
from instella_ray.models import rng
from instella_ray.models.checkpoint import read_tensors
from instella_ray.models.text_encoder import TextFeatureCache
from instella_ray.training.captions import longest_first
from instella_ray.training.generator import GeneratorTask, complete_config, run_generator
from instella_ray.training.learner import Learner
from instella_ray.training.optim import EMA
from instella_ray.training.tokenizer import TokenizerTask

from ..kit.operations import counted
from ..kit.training import generator_config, tokenizer_config

CPU = torch.device("cpu")
WORDS = (3, 200, 40, 0, 90, 5, 126, 60)
"""Lengths of the captions of :func:`mixed`."""


def mixed(task: GeneratorTask) -> CodesBatch:
    """A batch of captions of very different lengths."""
    batch = task.data.batch(0, np.arange(len(WORDS)))
    return batch._replace(captions=[" ".join(["cube"] * count) for count in WORDS])


def test_micro_batches_have_captions_of_similar_length_and_samples_keep_their_seeds(
    codes: str, tokenizer: str, tmp_path: Path
) -> None:
    task = GeneratorTask(complete_config(generator_config("diffusion", codes, tokenizer, tmp_path)), CPU)
    batch, seeds = mixed(task), torch.arange(8)
    (whole,) = task.micro_batches(batch, 8, seeds)
    assert torch.equal(whole["seeds"], seeds) and np.array_equal(whole["codes"].numpy(), batch.codes)
    task.text = TextFeatureCache(task.text.encoder)
    parts = task.micro_batches(batch, 2, seeds)
    assert [part["seeds"].tolist() for part in parts] == [[1, 6], [4, 7], [2, 5], [0, 3]]
    assert [part["features"].shape[2] for part in parts] == [128, 92, 42, 5]
    positions = sum(part["mask"].numel() for part in parts)
    assert positions <= 0.58 * whole["mask"].numel() and task.text.positions <= 1.05 * int(whole["mask"].sum())
    for part in parts:
        for row, number in enumerate(part["seeds"].tolist()):
            assert torch.equal(part["codes"][row], whole["codes"][number])
            features, others = part["features"][:, row, part["mask"][row]], whole["features"][:, number]
            torch.testing.assert_close(features, others[:, whole["mask"][number]], atol=1e-5, rtol=0)


def test_the_order_by_length_keeps_that_of_equal_ones() -> None:
    assert longest_first([[1], [1, 2], [3], [1, 2, 3], [4, 5], []]).tolist() == [3, 1, 4, 0, 2, 5]


def test_captions_are_tokenized_in_one_call_in_the_loaders_thread(
    codes: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = GeneratorTask(complete_config(generator_config("ar", codes, tokenizer, tmp_path)), CPU)
    calls: list[tuple[str, int]] = []
    tokenize = task.text.encoder.tokenizer

    class Spied:
        pad_token_id = tokenize.pad_token_id

        def __call__(self, prompts: list[str], **options: Any) -> Any:
            calls.append((threading.current_thread().name, len(prompts)))
            return tokenize(prompts, **options)

    monkeypatch.setattr(task.text.encoder, "tokenizer", Spied())
    for batch in Prefetcher(lambda step: task.batch(step, 0, np.arange(8 * step, 8 * step + 8)), 0, 2):
        task.micro_batches(batch, 2, torch.arange(8))
    assert calls == [("loader", 8), ("loader", 8)]


def test_truncated_captions_of_a_run_are_told_when_they_first_come_and_counted_at_the_end(
    codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = generator_config("ar", codes, tokenizer, tmp_path, steps=4, checkpoint_every=4, preview_every=9)
    text = cfg.text_encoder.model_copy(update={"max_length": 4})  # "image number 1" is longer, "number 1" is not
    with caplog.at_level(logging.INFO, logger="instella_ray"):
        run_generator(
            cfg.model_copy(update={"text_encoder": text, "preview": cfg.preview.model_copy(update={"prompts": ()})})
        )
    lines = [record.getMessage() for record in caplog.records if "captions" in record.name]
    assert len(lines) == 2 and lines[0].endswith(
        "captions have more than 4 tokens (text_encoder.max_length), truncated as all such ones"
    )
    count, _, rest = lines[1].partition(" of this worker's ")
    assert rest == "32 captions were truncated" and 5 < int(count) < 27


@pytest.mark.parametrize("what", ["diffusion", "ar", "tokenizer"])
def test_a_step_reads_nothing_from_the_device(
    what: str, codes: str, shards: str, tokenizer: str, tmp_path: Path
) -> None:
    """Each read would wait for a GPU; the text encoder of this test, which sees later tokens, has one mask a chunk."""
    task: GeneratorTask | TokenizerTask
    if what == "tokenizer":
        task = TokenizerTask(tokenizer_config(shards, tmp_path))
    else:
        task = GeneratorTask(complete_config(generator_config(what, codes, tokenizer, tmp_path)), CPU)  # type: ignore[arg-type]
    train = task.cfg.train
    learner, ema = Learner(task.step_module, task.model, train.optimizer, CPU), EMA(task.model, 0.9)
    batches = [task.batch(step, 0, np.arange(8 * step, 8 * step + 8)) for step in range(2)]
    for step, batch in enumerate(batches):
        with counted() as (operations, reads):
            task.before_step(step)
            parts = task.micro_batches(batch, 4, rng.sample_seeds(0, step, torch.arange(8)))
            for number, inputs in enumerate(parts):
                learner.backward(inputs, len(parts), number + 1 == len(parts))
            learner.update(step, train.steps)
            ema.update(task.model, step)
            task.flops(parts)
    masks = 0 if what == "tokenizer" else reads.pop("__bool__", 0)
    assert not reads and masks <= len(parts), reads
    assert operations["_local_scalar_dense.default"] <= masks
    assert not [name for name in operations if name.startswith(("nonzero", "masked_select"))]


def test_a_resumed_run_has_the_same_weights_with_captions_of_any_length(
    codes: str, tokenizer: str, tmp_path: Path
) -> None:
    """The last digits of a caption's features depend on the captions beside it, so none may be left from before."""
    folder = shutil.copytree(codes, tmp_path / "codes")
    rows = pq.read_table(folder / "0.parquet").to_pylist()
    texts = [" ".join(["red", "cube", "left"][: 1 + i % 3] * (1 + i % 5)) for i in range(len(rows))]
    captions = [{**row, "caption_long": text, "caption_short": text} for row, text in zip(rows, texts, strict=True)]
    write_codes_file(str(folder / "0.parquet"), captions)
    ends = []
    for name, lengths in (("whole", [6]), ("resumed", [3, 6])):
        for steps in lengths:
            given = {"steps": steps, "checkpoint_every": 3, "micro_batch_size": 4, "resume": steps != lengths[0]}
            cfg = generator_config("ar", str(folder), tokenizer, tmp_path / name, **given)
            final = run_generator(cfg)
        ends.append(read_tensors(Path(final) / "model.safetensors"))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
