"""A whole chain on disk, from source shards to a generator's checkpoint, made without Ray in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from instella_ray import storage
from instella_ray.data.codes import MANIFEST, CodesFile, CodesManifest, pack_codes, write_codes_file
from instella_ray.data.curate import CurateConfig
from instella_ray.data.encode import EncodeConfig
from instella_ray.data.model_origins import LINEAGE, lineage_section, model_origin, text_encoder_origin
from instella_ray.data.origins import data_origin, output_origin, shard_origins
from instella_ray.data.parts import PartFolder, PartWriter
from instella_ray.data.shard_list import close_with_list
from instella_ray.data.shards import write_samples, write_tar
from instella_ray.data.sources import find_pictures, read_blocks
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import add_section, save_model, weight_hash
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.operations.lineage import Link
from instella_ray.runs import Origin, read_record, recorded
from instella_ray.training.settings import TrainConfig, TrainingRun

from .models import TEXT, TINY_BIT, make_generator
from .shards import picture


class Chain(NamedTuple):
    """Folders of each thing."""

    source: Path
    curated: Path
    tokenizer: Path
    codes: Path
    generator: Path


def make_chain(folder: Path) -> Chain:
    chain = Chain(*(folder / name for name in ("source", "curated", "runs/bit", "codes", "runs/diffusion")))
    for number in range(2):
        samples = [(f"{number}{i}", picture(i, (40, 40)), f"picture {i}", {}) for i in range(3)]
        write_tar(str(chain.source / f"{number}.tar"), samples)
    curate(chain)
    tokenizer = train(chain.tokenizer, "train_tokenizer", shard_origins("shards", str(chain.curated)), "")
    encode(chain, tokenizer)
    parents = (
        data_origin("codes", str(chain.codes)),
        model_origin("tokenizer", tokenizer),
        text_encoder_origin(TextEncoderConfig(**TEXT)),
    )
    generator = train(chain.generator, "train_generator", parents, weight_hash(tokenizer))
    return chain._replace(tokenizer=tokenizer, generator=generator)


def curate(chain: Chain) -> None:
    cfg = CurateConfig(input=str(chain.source), output=str(chain.curated))
    folder, shards = PartFolder(cfg.output), find_pictures(cfg.input)
    folder.open("new", {"input": cfg.input})
    with recorded(cfg.output, "curate", cfg, shard_origins("shards", cfg.input)) as outputs:
        for url, label in shards.items():
            for table in read_blocks(url, label, 10):
                kept = table.append_column("verdict", pa.array(["kept"] * len(table)))
                PartWriter(cfg.output, ".tar", 10, write_samples)(kept)
        outputs.append(output_origin("shards", cfg.output, close_with_list(folder, shards.values())))


def train(run_dir: Path, job: str, inputs: tuple[Origin, ...], tokenizer_hash: str) -> Path:
    """A run that has saved one checkpoint, of random weights."""
    checkpoint = run_dir / "checkpoints" / "step-0000012"
    checkpoint.parent.mkdir(parents=True)
    with recorded(str(run_dir), job, TrainingRun(train=TrainConfig(run_dir=str(run_dir))), inputs):
        if tokenizer_hash:
            make_generator(checkpoint, tokenizer_hash)
        else:
            checkpoint.mkdir()
            torch.manual_seed(0)
            save_model(checkpoint, BIT(TINY_BIT))
        record = read_record(str(run_dir))
        assert record is not None
        add_section(checkpoint, LINEAGE, lineage_section(record, 12))
        (checkpoint / "state.json").write_text("{}")
    return checkpoint


def encode(chain: Chain, tokenizer: Path) -> None:
    cfg = EncodeConfig(input=str(chain.curated), output=str(chain.codes), tokenizer=str(tokenizer))
    folder = PartFolder(cfg.output)
    folder.open("new", {"input": cfg.input})
    inputs = (*shard_origins("shards", cfg.input), model_origin("tokenizer", cfg.tokenizer))
    with recorded(cfg.output, "encode", cfg, inputs) as outputs:
        packed = pack_codes(np.zeros((6, TINY_BIT.num_tokens, TINY_BIT.bits_per_token), np.uint8))
        facts = {"shard": "0", "caption_long": "", "caption_short": "", "width": 40, "height": 40, "source": "test"}
        rows = [{"key": f"{i}", "row": i, **facts, "codes": packed[i]} for i in range(6)]
        write_codes_file(storage.join(cfg.output, "0.parquet"), rows)
        ledger = folder.close([]).count(["kept"] * 6)
        storage.write_json(storage.join(cfg.output, "ledger.json"), ledger.to_json())
        manifest = CodesManifest(
            tokenizer_hash=weight_hash(tokenizer),
            num_tokens=TINY_BIT.num_tokens,
            bits_per_token=TINY_BIT.bits_per_token,
            rows=6,
            files=(CodesFile(name="0.parquet", rows=6),),
        )
        storage.write_json(storage.join(cfg.output, MANIFEST), manifest.model_dump(mode="json"))
        outputs.append(output_origin("codes", cfg.output, ledger))


def below(link: Link, *roles: str) -> Link:
    """The one that is reached by the roles of inputs."""
    for role in roles:
        (link,) = [each for each in link.inputs if each.role == role]
    return link
