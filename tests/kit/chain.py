"""A whole chain on disk, from source shards to a generator's checkpoint, made without Ray in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.model_provenance import LINEAGE, lineage_section, model_provenance, text_encoder_provenance
from instella_ray.data.provenance import data_provenance, shard_provenance
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import add_section, save_model, weight_hash
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.operations.lineage import Link
from instella_ray.runs import Provenance, read_record, recorded
from instella_ray.training.settings import TrainConfig, TrainingRun

from .models import TEXT, TINY_BIT, make_generator
from .shards import image_bytes


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
        samples = [(f"{number}{i}", image_bytes(i, (40, 40)), f"image {i}", {}) for i in range(3)]
        write_tar(str(chain.source / f"{number}.tar"), samples)
    curate(chain)
    tokenizer = train(chain.tokenizer, "train_tokenizer", shard_provenance("shards", str(chain.curated)), "")
    encode(chain, tokenizer)
    parents = (
        data_provenance("codes", str(chain.codes)),
        model_provenance("tokenizer", tokenizer),
        text_encoder_provenance(TextEncoderConfig(**TEXT)),
    )
    generator = train(chain.generator, "train_generator", parents, weight_hash(tokenizer))
    return chain._replace(tokenizer=tokenizer, generator=generator)


def curate(chain: Chain) -> None:
    filters = {"resolution": {"target_size": 40}}
    given = {"input": str(chain.source), "output": str(chain.curated), "filters": filters, "local": True}
    run_curate(CurateConfig.model_validate(given))


def encode(chain: Chain, tokenizer: Path) -> None:
    places = {"input": str(chain.curated), "output": str(chain.codes), "tokenizer": str(tokenizer)}
    run_encode(EncodeConfig(**places, local=True))


def train(run_dir: Path, job: str, inputs: tuple[Provenance, ...], tokenizer_hash: str) -> Path:
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


def below(link: Link, *roles: str) -> Link:
    """The one that is reached by the roles of inputs."""
    for role in roles:
        (link,) = [each for each in link.inputs if each.role == role]
    return link
