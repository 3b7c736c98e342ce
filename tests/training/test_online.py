"""Generators that train on images: the codes are those of the encoding job, and the tokenizer stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from instella_ray.data.encode import CodesEncoder, EncodeConfig
from instella_ray.data.formats.codes import pack_codes, unpack_codes
from instella_ray.data.formats.images import decode_rgb, fit_square
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.formats.tar_index import PLACES, read_index, scan_index
from instella_ray.data.loading.image_data import CaptionedImageData, ImageData
from instella_ray.data.loading.loader import CaptionChoice
from instella_ray.data.loading.order import sample_uniforms
from instella_ray.errors import UserError
from instella_ray.flops import generator_training
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_expected, save_model
from instella_ray.planning.plan import PlanOptions, plan_run
from instella_ray.storage import read_parquet, write_parquet
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, complete_config
from instella_ray.training.learner import Learner

from ..kit.models import TINY_BIT
from ..kit.shards import image_bytes
from ..kit.training import generator_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six wide and tall images with a short caption beside the long one, which only half of them name so."""
    folder = tmp_path_factory.mktemp("images")
    meta = [{"caption_short": f"short {i}"} | ({"caption_long": f"long {i}"} if i % 2 else {}) for i in range(6)]
    sizes = [(48, 32), (32, 80)]
    samples = [(f"{i}", image_bytes(i, sizes[i % 2]), f"caption {i}", meta[i]) for i in range(6)]
    write_tar(str(folder / "a.tar"), samples[:4])
    write_tar(str(folder / "b.tar"), samples[4:])
    return f"{folder}/*.tar"


def online(kind: Literal["diffusion", "ar"], images: str, tokenizer: str, run_dir: Path) -> GeneratorRunConfig:
    plain = generator_config(kind, "none", tokenizer, run_dir).model_dump(exclude_unset=True)
    return complete_config(GeneratorRunConfig.model_validate({**plain, "codes": None, "images": images}))


def test_the_same_image_and_crop_has_the_codes_of_the_encoding_job(images: str, tokenizer: str, tmp_path: Path) -> None:
    task = GeneratorTask(online("diffusion", images, tokenizer, tmp_path), CPU)
    index, epoch = np.array([5, 0, 1, 3]), 2
    batch = task.data.batch(epoch, index)
    parts = task.micro_batches(batch, 3, torch.arange(4))
    codes = torch.cat([inputs["codes"] for inputs in parts])[torch.cat([inputs["seeds"] for inputs in parts]).argsort()]
    # The encoding job's own code, with the crops that this epoch has at random.
    rows = [row for name in ("a", "b") for row in _rows(images.replace("*", name))]
    places = sample_uniforms(0, np.full(4, epoch), index)[:, :2]
    size = TINY_BIT.image_size
    whole = [decode_rgb(rows[i], at_least=2 * size) for i in index]
    crops = [fit_square(image, size, (x, y)) for image, (x, y) in zip(whole, places, strict=True)]
    encoder = CodesEncoder(EncodeConfig(input="", output="", tokenizer=tokenizer), size)
    packed = encoder.encode(np.stack(crops))
    assert pack_codes(codes.numpy().astype(np.uint8)) == packed
    assert np.array_equal(unpack_codes(packed, TINY_BIT.num_tokens, TINY_BIT.bits_per_token), codes.numpy())


def _rows(shard: str) -> list[bytes]:
    data = Path(shard).read_bytes()
    return [data[row["offset"] : row["offset"] + row["bytes"]] for row in read_index(shard).to_pylist()]


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_the_tokenizer_gets_no_gradient_does_not_change_and_is_counted(
    kind: Literal["diffusion", "ar"], images: str, tokenizer: str, tmp_path: Path
) -> None:
    # Its averaged weights are those that encode.
    torch.manual_seed(7)
    averaged = BIT(TINY_BIT)
    save_model(tmp_path, load_expected(tokenizer, BIT), ema=averaged.state_dict())
    task = GeneratorTask(online(kind, images, str(tmp_path), tmp_path / "run"), CPU)
    learner = Learner(task.step_module, task.model, task.cfg.train.optimizer, CPU)
    task.model.train()
    assert task.encoder is not None
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    for step in range(2):
        parts = task.micro_batches(task.data.batch(step, np.arange(4)), 2, torch.arange(4))
        for number, inputs in enumerate(parts):
            assert not any(value.requires_grad for value in inputs.values())
            learner.backward(inputs, len(parts), number == 1)
        learner.update(step, 2)
    assert any(not torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in task.encoder.bit.parameters())
    assert all(torch.equal(value, averaged.state_dict()[n]) for n, value in task.encoder.bit.state_dict().items())
    # All captions are in the cache now, so what is left is the generator and the tokenizer's encoder.
    parts = task.micro_batches(task.data.batch(1, np.arange(4)), 4, torch.arange(4))
    length = parts[0]["features"].shape[2]
    with_encoder = generator_training(task.cfg.model, length, tokenizer=TINY_BIT)
    assert with_encoder.frozen > 0 and task.flops(parts) == pytest.approx(4 * with_encoder.model)


def test_captions_are_long_short_or_dropped_as_those_of_codes_and_the_crop_has_no_part_in_it(images: str) -> None:
    data = CaptionedImageData(images, 32, 3, CaptionChoice(short=0.25, dropped=0.1))
    epochs = [data.batch(epoch, np.arange(6)) for epoch in range(300)]
    captions = [caption for batch in epochs for caption in batch.captions]
    assert captions.count("") / 1800 == pytest.approx(0.1, abs=0.03)
    assert sum(c.startswith("short") for c in captions) / 1800 == pytest.approx(0.9 * 0.25, abs=0.03)
    assert {c for c in captions if c[-1:] == "1"} == {"short 1", "long 1"}
    assert {c for c in captions if c[-1:] == "2"} == {"short 2", "caption 2"}
    assert data.column(np.array([5, 0]), "caption_long") == ["long 5", "caption 0"]
    # Keys and pixels are those of ImageData; a batch that runs into the next epoch is that epoch's.
    plain = ImageData(images, (32,), 3).batch(4, np.array([2, 7]))
    mine = data.batch(4, np.array([2, 7]))
    assert mine.keys == plain.keys == ["2", "1"] and np.array_equal(mine.pixels, plain.pixels[32])
    assert mine.captions[1] == epochs[5].captions[1]


def test_an_index_without_captions_is_made_up_for_by_reading_the_tar(tmp_path: Path) -> None:
    shard = str(tmp_path / "a.tar")
    write_tar(shard, [("0", image_bytes(), "a caption", {"caption_short": "short"})])
    whole = read_index(shard, captions=True)
    assert whole.equals(scan_index(shard)) and whole["caption_short"].to_pylist() == ["short"]
    url = str(tmp_path / "index" / "a.parquet")
    write_parquet(url, read_parquet(url).select(PLACES.names))
    assert read_index(shard, captions=True).equals(whole) and read_index(shard).schema == PLACES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "x.tar"}, "codes, images: expected exactly one of them"),
        ({"codes": None}, "codes, images: expected exactly one of them"),
        ({"codes": None, "images": "nowhere.tar"}, "nowhere.tar"),
    ],
)
def test_data_is_either_codes_or_images(
    changes: dict[str, Any], message: str, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    plain = generator_config("ar", codes, tokenizer, tmp_path).model_dump(exclude_unset=True)
    with pytest.raises((UserError, ValueError), match=message):
        complete_config(GeneratorRunConfig.model_validate({**plain, **changes}))


def test_a_plan_counts_the_encoder_and_stores_images_instead_of_codes(
    images: str, codes: str, tokenizer: str, tmp_path: Path
) -> None:
    from_codes = plan_run(
        complete_config(generator_config("diffusion", codes, tokenizer, tmp_path)), PlanOptions(images=6)
    )
    planned = plan_run(online("diffusion", images, tokenizer, tmp_path), PlanOptions(images=6))
    assert planned.storage["images"] == 6 * (150_000 + 500) and "codes" not in planned.storage
    more = planned.flop_per_sample["model"] - from_codes.flop_per_sample["model"]
    assert more == planned.flop_per_sample["tokenizer"] > 0
