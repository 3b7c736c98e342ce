"""Data suite: pipeline throughput relative to plain decoding, speed of reading packed codes, and memory growth."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from ..config import Config
from ..data.curation.job import CurateConfig, run_curate
from ..data.formats.codes import MANIFEST, CodesFile, CodesManifest, CodesReader, pack_codes, write_codes_file
from ..data.formats.images import decode_rgb, fit_square
from ..data.formats.names import find_shards
from ..data.formats.shards import write_tar
from ..data.formats.sources import shard_sources
from ..data.formats.tar_source import read_samples
from ..data.loading.image_data import ImageData
from ..data.loading.loader import CodesData
from ..data.loading.order import BatchPlan
from ..data.ray_data import init_ray, tables_dataset, unwrapped
from ..data.stages import Stage
from ..data.views import ViewDecoder
from ..errors import UserError
from ..rendering import Cell, Goal
from ..storage import write_json
from .measure import Spread
from .report import SuiteResult
from .usage import peak_memory

OURS = "this pipeline"
PIPELINE_GOAL, READER_GOAL, MEMORY_GOAL = 0.8, 20_000, 1.2
LOADER_GOAL = 150 / 8
"""Images per second and core of the tokenizers' loader, of which eight cores feed a GPU."""


class DataBench(Config):
    """Generated images, and the options of reading them."""

    shards: int = Field(32, ge=1)
    images_per_shard: int = Field(64, ge=1)
    image_size: tuple[int, int] = (768, 576)
    """Width and height; about 100 kB of JPEG each."""
    size: int = Field(256, ge=1)
    """Side of the square that images are resized to (pixels)."""
    workers: int = Field(2, ge=1)
    """Decoding processes of every contestant; set it to the machine's number of cores, which is what Ray uses."""
    rounds: int = Field(3, ge=1)
    codes: int = Field(200_000, ge=1)
    """Number of full-size packed codes to read, in files of a thousand."""
    batch: int = Field(512, ge=1)
    loader_sizes: tuple[int, int] = (512, 1024)
    """Sizes (pixels) that the tokenizers' loader makes of each image, the larger one being that of the files."""
    loader_images: int = Field(64, ge=1)
    memory_shards: tuple[int, int] = (8, 80)
    """Shards of a small and a large curation, whose peak memory is compared."""


def run_data(cfg: DataBench) -> SuiteResult:
    """Measure the contestants, one row each; the upper bound is that of processes that only decode and resize."""
    rows: list[dict[str, Cell]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        urls = _write_shards(cfg, folder / "shards", cfg.shards)
        total = sum(os.path.getsize(url) for url in urls)
        init_ray()
        contestants: dict[str, Callable[[], int]] = {
            "decode and resize alone": partial(_alone, cfg, urls),
            OURS: partial(_pipeline, cfg, urls),
            "DataLoader and webdataset": partial(_webdataset, cfg, urls),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        peaks: dict[str, float] = {}
        for name, run in contestants.items():  # warm-up round; memory is measured here because measuring takes time
            with peak_memory(with_ray=name == OURS) as peak:
                run()
            peaks[name] = peak[0]
        for _ in range(cfg.rounds):
            for name, run in contestants.items():
                began = time.perf_counter()
                count = run()
                rates[name].append(count / (time.perf_counter() - began))
        per_image = total / (cfg.shards * cfg.images_per_shard)
        for name, found in rates.items():
            spread = Spread.of(found)
            rows.append(
                {
                    "contestant": name,
                    "images/s/core": spread.text(1 / cfg.workers, 1),
                    "MB/s": spread.median * per_image / 1e6,
                    "peak private MB": round(peaks[name]),
                }
            )
        limit, ours, theirs = (Spread.of(found).median for found in rates.values())
        goals += [
            Goal("this pipeline against decoding alone", ours / limit, PIPELINE_GOAL, ">="),
            Goal("this pipeline against DataLoader and webdataset", ours / theirs, 1.0, ">="),
        ]
        read = _codes(cfg, folder / "codes")
        rows.append({"contestant": "codes reader, one core", "samples/s": round(read)})
        goals.append(Goal("codes reader, samples/s a core", read, READER_GOAL, ">="))
        loaded = _loader(cfg, folder / "loader")
        rows.append({"contestant": "tokenizers' loader", "images/s/core": round(loaded, 1)})
        goals.append(Goal("tokenizers' loader, images/s a core", loaded, LOADER_GOAL, ">="))
        small, large = (_curation_peak(cfg, folder / f"{count}", count) for count in cfg.memory_shards)
        few, many = cfg.memory_shards
        for count, found_peak in ((few, small), (many, large)):
            rows.append({"contestant": f"curating {count} shards", "peak private MB": round(found_peak)})
        goals.append(Goal(f"peak memory, {many} shards against {few}", large / small, MEMORY_GOAL, "<="))
    about = {**cfg.model_dump(mode="json"), "MB an image": round(per_image / 1e6, 3)}
    return SuiteResult("Data", about, rows, goals)


def _write_shards(cfg: DataBench, folder: Path, count: int) -> list[str]:
    """Write tars of a few repeated noisy images, whose files are as large as those of photographs."""
    rng = np.random.default_rng(0)
    width, height = cfg.image_size
    files = []
    for _ in range(8):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(smooth).astype(int) + rng.normal(0, 12, (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    for number in range(count):
        images = [files[i % len(files)] for i in range(cfg.images_per_shard)]
        write_tar(str(folder / f"{number:04d}.tar"), ((f"{i}", file, "an image", {}) for i, file in enumerate(images)))
    return list(find_shards(str(folder)))


def _square(data: bytes, size: int) -> np.ndarray:
    return fit_square(decode_rgb(data, at_least=2 * size), size)


def _shard_alone(url: str, size: int) -> int:
    with open(url, "rb") as stream:
        return sum(len(_square(row["image"], size)) == size for row in read_samples(stream, url))


def _alone(cfg: DataBench, urls: list[str]) -> int:
    """Decode in processes that return only counts."""
    pool = multiprocessing.get_context("fork").Pool(cfg.workers)
    count = sum(pool.imap_unordered(partial(_shard_alone, size=cfg.size), urls))
    pool.close()
    pool.join()
    return count


def _pipeline(cfg: DataBench, urls: list[str]) -> int:
    """Decode with the encoding job's pipeline, and transfer all pixels to this process."""
    sources = shard_sources(find_shards(tuple(urls)), cfg.images_per_shard)
    decoder = Stage(ViewDecoder(cfg.size, 1, False))
    batch: Any
    seen = 0
    for batch in tables_dataset(list(sources.values()), [decoder]).iter_batches(
        batch_format="pyarrow", batch_size=None
    ):
        for table in unwrapped(batch):
            pixels = np.frombuffer(b"".join(table["views"].to_pylist()), np.uint8)
            seen += len(pixels.reshape(-1, cfg.size, cfg.size, 3))
    return seen


def _webdataset(cfg: DataBench, urls: list[str]) -> int:
    """Decode with webdataset and a PyTorch DataLoader, the common alternative."""
    try:
        import webdataset
    except ImportError:
        raise UserError("bench: webdataset is not installed (pip install 'instella-ray[dev]')") from None
    from torch.utils.data import DataLoader

    opened: Any = webdataset.WebDataset(urls, shardshuffle=False)
    source = opened.to_tuple("jpg").map(partial(_first, size=cfg.size))
    seen = 0
    for batch in DataLoader(source, batch_size=64, num_workers=cfg.workers):
        seen += len(batch)
    return seen


def _first(sample: tuple[bytes], size: int) -> np.ndarray:
    return _square(sample[0], size).copy()  # torch needs writable arrays


def write_codes(folder: Path, captions: Sequence[str], manifest: CodesManifest) -> None:
    """Write a folder of random codes, one per caption, in files of a thousand; ``manifest`` defines their sizes."""
    rng = np.random.default_rng(0)
    facts = {"shard": "0", "width": 512, "height": 512, "source": "bench", "caption_short": "a short caption"}
    files = []
    for start in range(0, len(captions), 1000):
        part, name = captions[start : start + 1000], f"{start // 1000}.parquet"
        packed = pack_codes(rng.integers(0, 2, (len(part), manifest.num_tokens, manifest.bits_per_token), np.uint8))
        rows = [
            {"key": f"{start + i:09d}", "row": i, **facts, "caption_long": caption, "codes": packed[i]}
            for i, caption in enumerate(part)
        ]
        write_codes_file(str(folder / name), rows)
        files.append(CodesFile(name=name, rows=len(rows)))
    whole = manifest.model_copy(update={"rows": len(captions), "files": tuple(files)})
    write_json(str(folder / MANIFEST), whole.model_dump(mode="json"))


def _codes(cfg: DataBench, folder: Path) -> float:
    """Measure samples per second of the generators' loader, reading and unpacking in training order."""
    sizes = CodesManifest(tokenizer_hash="bench", num_tokens=128, bits_per_token=64, rows=0, files=())
    write_codes(folder, ["a long caption of an image " * 8] * cfg.codes, sizes)
    data = CodesData(CodesReader(str(folder)), 0)
    plan = BatchPlan(len(data), min(cfg.batch, len(data)), data.order)
    steps = len(data) // plan.global_batch
    began = time.perf_counter()
    for step in range(steps):
        data.batch(plan.place(step).epoch, plan.samples(step))
    return steps * plan.global_batch / (time.perf_counter() - began)


def _loader(cfg: DataBench, folder: Path) -> float:
    """Measure images per CPU second of the tokenizers' loader: decoded, cropped and resized, none of them twice."""
    side, count = max(cfg.loader_sizes), cfg.loader_images
    _write_shards(cfg.model_copy(update={"image_size": (side, side), "images_per_shard": count}), folder, 1)
    data = ImageData(str(folder), cfg.loader_sizes, 0, decoders=cfg.workers)
    began = time.process_time()
    data.batch(0, np.arange(count))
    return count / (time.process_time() - began)


def _curation_peak(cfg: DataBench, folder: Path, shards: int) -> float:
    """Measure the peak private memory (MB) of a curation job."""
    _write_shards(cfg, folder / "in", shards)
    filters = {"resolution": {"target_size": 512}}
    given = {"input": str(folder / "in"), "output": str(folder / "out"), "filters": filters, "rows_per_shard": 64}
    with peak_memory() as peak:
        run_curate(CurateConfig.model_validate(given))
    return peak[0]
