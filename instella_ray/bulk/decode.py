"""Decoding of sampled codes to images of any size: files with prompt and settings as metadata, or WebDataset tars."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from .. import logs, storage
from ..accelerator import pick_device
from ..config import Config, InputPath
from ..data.formats.images import MAX_PIXELS, encode_image, to_pixels
from ..data.formats.shards import write_tar
from ..data.pipeline import pool_size, run_rows
from ..data.stages import Pool, Stage
from ..engine.weights import Identity
from ..errors import UserError
from ..models.bit import BIT
from ..models.checkpoint import load_expected, weight_hash
from ..models.folders import find_model
from .plan import own_sampling, own_size
from .sample_set import SampleBlock, SampleRun, SampleSet, find_sample_sets


class DecodeConfig(Config):
    """Decoding of samples: output format, tokenizer, size and resources."""

    format: Literal["png", "jpeg", "webp", "tar"] | None = None
    """One file per image, or a WebDataset tar of PNGs per file of codes; none disables decoding."""
    tokenizer: InputPath | None = None
    """Model folder of the BIT that defines the codes."""
    size: int | None = Field(None, ge=1)
    """Edge of the images (px) of prompts without a ``size`` in their settings; none: the tokenizer's ``image_size``."""
    batch_size: int = Field(16, ge=1)
    """Images per decoder call."""
    actors: int | None = Field(None, ge=1)
    """Number of actors; none means one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 decodes on the CPU."""
    file_threads: int = Field(2, ge=1)
    """Threads of each actor that encode image files while the next batch is decoded."""


class SampleDecoder:
    """Decoder of sampled codes in batches."""

    def __init__(self, tokenizer: str, size: int, *, batch_size: int = 16, device: str = "cpu") -> None:
        self.device, self.size, self.batch_size = pick_device(device), size, batch_size
        self.bit = load_expected(tokenizer, BIT, device=self.device)

    def images(self, codes: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Decode ``codes``, uint8 0/1 ``[N, L, K]``; yields one image uint8 ``[size, size, 3]`` per sample.

        ``sizes`` are those of single samples; None: ``size`` for all.
        """
        for size, rows in groupby(range(len(codes)), key=lambda row: self.size if sizes is None else sizes[row]):
            same = list(rows)
            for start in range(0, len(same), self.batch_size):
                batch = torch.from_numpy(codes[same[start : start + self.batch_size]]).to(self.device)
                with torch.no_grad():
                    yield from to_pixels(self.bit.decode(batch, size, size))


def check_tokenizer(tokenizer: str, size: int | None, expected: str | None, source: str) -> int:
    """Return the size to decode at (px), by default the tokenizer's.

    ``expected`` is the hash of the tokenizer that the codes of ``source`` are of. Raises UserError if they are of another
    one, or the tokenizer cannot decode this size.
    """
    bit = load_expected(tokenizer, BIT)
    if expected != weight_hash(bit):
        raise UserError(f"{source}: codes of another tokenizer than {tokenizer}")
    size = size or bit.cfg.image_size
    if size % (multiple := bit.cfg.decode_multiple):
        raise UserError(f"size {size}: not a multiple of {multiple}, as tokenizer {tokenizer} requires")
    if size * size > MAX_PIXELS:
        raise UserError(f"size {size}: more than {MAX_PIXELS:,} pixels, which no job would read")
    return size


def find_tokenizer(cfg: DecodeConfig) -> str:
    """Return the absolute model folder of the tokenizer; UserError without one, or without a format."""
    if cfg.format is None or cfg.tokenizer is None:
        raise UserError("decode: expected a format and a tokenizer, the model folder of the BIT that defines the codes")
    return find_model(cfg.tokenizer)


def check_decode(cfg: DecodeConfig, model: str, *, sizes: Sequence[int] = (), local: bool = False) -> None:
    """Raise UserError if samples of the generator ``model`` could not be decoded: what can be told before they are made.

    ``sizes`` are those that prompts give themselves.
    """
    model = find_model(model)
    for size in (cfg.size, *sizes):
        check_tokenizer(find_tokenizer(cfg), size, Identity.of(model).tokenizer_hash, model)
    if cfg.gpus_per_actor and not local:
        pool_size(Pool(cfg.actors, cfg.gpus_per_actor), 1, local=local)


class DecodeWorker:
    """Ray Data actor that decodes one file of samples and writes its images."""

    def __init__(self, cfg: DecodeConfig, folder: str, size: int) -> None:
        assert cfg.tokenizer is not None and cfg.format is not None
        self.format, self.sets, self.file_threads = cfg.format, find_sample_sets(folder), cfg.file_threads
        device = "auto" if cfg.gpus_per_actor else "cpu"
        self.decoder = SampleDecoder(cfg.tokenizer, size, batch_size=cfg.batch_size, device=device)

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        samples, number = self.sets[row["setting"]], row["number"]
        block, urls = samples.block(number), image_urls(samples, number, self.decoder.size, self.format)
        files = self._files(samples, block)
        if self.format == "tar":
            keys = list(map(image_name, block.seeds, block.prompts))
            about = [
                {"seed": seed, "prompt_id": name} for seed, name in zip(block.seeds, block.prompt_ids, strict=True)
            ]
            write_tar(urls[0], zip(keys, files, block.prompts, about, strict=True))
        else:
            for url, data in zip(urls, files, strict=True):
                storage.write_bytes(url, data)
        return pa.table({"images": [len(block)]})

    def _files(self, samples: SampleSet, block: SampleBlock) -> Iterator[bytes]:
        kind = "png" if self.format == "tar" else self.format
        made_as = {"format": kind, **samples.made_with()}
        sizes = sample_sizes(block, self.decoder.size)
        pending: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(self.file_threads, thread_name_prefix="image-files") as threads:
            for i, image in enumerate(self.decoder.images(block.codes, sizes)):
                about = {**image_metadata(samples.run, block, i), "size": sizes[i], **made_as}
                pending.append(threads.submit(encode_image, image, kind, about))
                # At most one batch waits, beside the one that is decoded.
                if len(pending) > self.decoder.batch_size:
                    yield pending.popleft().result()
            yield from (file.result() for file in pending)


def image_metadata(run: SampleRun, block: SampleBlock, row: int) -> dict[str, Any]:
    """Return everything that the bits of a sample depend on, for the metadata of its image."""
    about = run.model_dump(mode="json", include={"kind", "text_encoder", "text_length", "precision", "quantization"})
    return {
        "model": run.model_hash,
        # Not the whole path, which is of no use on another machine.
        "model_name": "/".join(run.model.rstrip("/").split("/")[-3:]),
        "prompt": block.prompts[row],
        "prompt_id": block.prompt_ids[row],
        "index": block.indices[row],
        **own_sampling(block.prompt(row), run.sampling).model_dump(mode="json"),
        "seed": block.seeds[row],
        "weights": {"generator": run.model_hash, "tokenizer": run.tokenizer_hash},
        **about,
    }


def image_name(seed: int, prompt: str) -> str:
    """Return a file name of seed and prompt words, a safe path component for any prompt, in lower case alone."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    return f"{seed:016x}-{words}".rstrip("-")


def sample_sizes(block: SampleBlock, size: int) -> list[int]:
    """Return the image size (px) of each sample: that of its prompt's settings, or else ``size``."""
    return [own_size(block.prompt(row)) or size for row in range(len(block))]


def image_urls(samples: SampleSet, number: int, size: int, kind: str) -> list[str]:
    """Return the URLs of the images, or of the tar, of a file of samples; ``size`` is that of prompts without one."""
    if kind == "tar":
        name = samples.manifest.files[number].name.replace(".parquet", ".tar")
        return [storage.join(samples.folder, f"images-{size}", name)]
    block = samples.block(number)
    names = zip(sample_sizes(block, size), map(image_name, block.seeds, block.prompts), strict=True)
    return [storage.join(samples.folder, f"images-{size}", f"{name}.{kind}") for size, name in names]


def run_decode(cfg: DecodeConfig, folder: str, *, local: bool = False) -> int:
    """Decode the finished samples of ``folder``, on Ray or in this process; keeps existing images.

    Returns the total number of images. Raises UserError for unfinished or damaged samples and for codes of another
    tokenizer.
    """
    tokenizer = find_tokenizer(cfg)
    cfg = cfg.model_copy(update={"tokenizer": tokenizer})
    folder = storage.absolute(folder)
    sets, total = find_sample_sets(folder), 0
    todo: list[dict[str, Any]] = []
    first = next(iter(sets.values()))
    size = check_tokenizer(tokenizer, cfg.size, first.run.tokenizer_hash, first.folder)
    for name, samples in sets.items():
        if "size" in samples.run.by_prompt:
            for own in {px for block in samples.blocks() for px in sample_sizes(block, size)}:
                check_tokenizer(tokenizer, own, samples.run.tokenizer_hash, samples.folder)
        existing = set(storage.glob(storage.join(samples.folder, "images-*", "*")))
        for number, file in enumerate(samples.manifest.files):
            total += file.rows
            if not existing.issuperset(image_urls(samples, number, size, str(cfg.format))):
                todo.append({"setting": name, "number": number, "rows": file.rows})
    if todo:
        worker = Stage(partial(DecodeWorker, cfg, folder, size), Pool(cfg.actors, cfg.gpus_per_actor))
        left = sum(unit["rows"] for unit in todo)
        with logs.progress_bar(total=total, initial=total - left, desc=f"decode {cfg.format}", unit="image") as bar:
            for report in run_rows(todo, worker, local=local):
                bar.update(report["images"])
    return total
