"""Fixtures of shards, a random tokenizer, and codes that it is said to have made, small enough to train on in seconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instella_ray import storage
from instella_ray.data.formats.codes import MANIFEST, CodesFile, CodesManifest, pack_codes, write_codes_file
from instella_ray.data.formats.shards import write_webdataset
from instella_ray.data.scenes import scene_rows
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import save_model, weight_hash

from .models import TINY_BIT


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    list(write_webdataset(scene_rows(64, 0, 32), str(folder), 32))
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_model(folder, BIT(TINY_BIT))
    return str(folder)


@pytest.fixture(scope="module")
def codes(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("codes"))
    tokens, bits, count = TINY_BIT.num_tokens, TINY_BIT.bits_per_token, 24
    packed = pack_codes(np.random.default_rng(0).integers(0, 2, (count, tokens, bits), np.uint8))
    facts = {"shard": "0", "width": 32, "height": 32, "source": "test"}
    captions = [{"caption_long": f"image number {i % 4}", "caption_short": f"number {i % 4}"} for i in range(count)]
    rows = [{"key": f"{i:04d}", "row": i, **facts, **captions[i], "codes": packed[i]} for i in range(count)]
    write_codes_file(storage.join(folder, "0.parquet"), rows)
    manifest = CodesManifest(
        tokenizer_hash=weight_hash(tokenizer),
        num_tokens=tokens,
        bits_per_token=bits,
        rows=count,
        files=(CodesFile(name="0.parquet", rows=count),),
    )
    storage.write_json(storage.join(folder, MANIFEST), manifest.model_dump(mode="json"))
    return folder
