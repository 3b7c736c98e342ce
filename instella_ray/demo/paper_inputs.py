"""What the paper's recipes read, made on the spot and small: LAION-like shards, Dalle-1M, prompts of benchmarks, and models.

The images are the procedural scenes; the models are :mod:`.stand_ins`, whose numbers mean nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from ..config import recipes
from ..data.formats.shards import Sample, write_tar
from ..data.prompts import read_prompts
from ..data.scenes import CATEGORIES, Expectation, render, scene_at, scene_prompts
from ..models.clip import load_clip
from . import stand_ins

SIZE = 32
"""Pixels a side that the small tokenizer reads; the paper's 512."""
CLIP = "ViT-S-32-alt"
"""Smallest CLIP that open_clip knows."""
GENEVAL_TASKS = dict(
    zip(CATEGORIES, ("single_object", "two_object", "counting", "colors", "color_attr", "position"), strict=True)
)
"""GenEval's names of the scenes' categories."""
IMAGES, PER_CATEGORY = 36, 2
"""Images of the LAION-like set, and prompts of each of the scenes' six categories."""
HELD_OUT = 1_000_000
"""Seed of images that no model is trained on."""


def write_inputs(folder: Path) -> None:
    """Write shards, prompts and models."""
    write_shards(folder, IMAGES)
    write_prompts(folder / "prompts", PER_CATEGORY)
    write_models(folder / "models")


def write_shards(folder: Path, images: int) -> None:
    """Write the training sets and the images of tables 2 and 3, in tars of WebDataset."""
    samples = list(laion_samples(images))
    half = len(samples) // 2
    write_tar(str(folder / "laion" / "00000.tar"), samples[:half])
    write_tar(str(folder / "laion" / "00001.tar"), samples[half:])
    write_tar(str(folder / "dalle" / "data-000000.tar"), islice(dalle_samples(), images // 4))
    for number, name in enumerate(("imagenet", "coco")):
        write_tar(str(folder / name / "00000.tar"), islice(_scenes(HELD_OUT + number), images // 3))


def laion_samples(images: int) -> Iterator[Sample]:
    """Yield ``images`` samples with LAION's metadata, and one more for each reason to drop one."""
    for index, (key, image, caption, _) in enumerate(islice(_scenes(0, 2 * SIZE), images)):
        yield key, image, caption, _laion(caption, 2 * SIZE, pwatermark=0.01 * (index % 40))
    kept = scene_at(0, 0)
    pixels = render(kept, 2 * SIZE)
    yield "watermarked", _png(render(scene_at(1, 0), 2 * SIZE)), kept.caption, _laion("a circle", 64, pwatermark=0.95)
    yield "unsafe", _png(render(scene_at(1, 1), 2 * SIZE)), kept.caption, _laion("a square", 64, punsafe=0.9)
    yield "small", _png(render(scene_at(1, 2), SIZE // 4)), kept.caption, _laion("a cross", SIZE // 4)
    yield "copy", _png(pixels), kept.caption, _laion(kept.caption, 2 * SIZE)
    yield "page", _png(_page(8 * SIZE)), "a page of text", _laion("a page of text", 8 * SIZE)


def dalle_samples() -> Iterator[Sample]:
    """Yield samples with Dalle-1M's two captions in the metadata."""
    for key, image, caption, _ in _scenes(2, 2 * SIZE):
        yield (
            key,
            image,
            "",
            {"short_caption": caption, "long_caption": f"{caption} on a plain light background", "url": ""},
        )


def write_prompts(folder: Path, count: int) -> None:
    """Write prompts in the formats of DiffusionDB, GenEval, COCO and ImageReward, ``count`` a category of the scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = scene_prompts(count, 0)
    captions = [expectation.caption for expectation in asked]
    # A row for each image of a prompt, of which there are two.
    rows = [
        {"prompt": text, "seed": seed, "step": 50, "cfg": 7.0, "sampler": 8} for text in captions for seed in (1, 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "diffusiondb.parquet")
    lines = (json.dumps(_geneval(expectation)) for expectation in asked)
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    annotations = [{"id": i, "image_id": i, "caption": text} for i, text in enumerate(captions)]
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    prompts = [{"id": f"{i:06d}-0001", "prompt": text} for i, text in enumerate(captions)]
    (folder / "benchmark-prompts.json").write_text(json.dumps(prompts))
    for name in ("figure1", "figure1-ar"):
        source = recipes()["paper/18-sample-figure1"].with_name(f"{name}.jsonl")
        small = [
            {"id": p.id, "prompt": p.text, "settings": _small(p.meta["settings"])} for p in read_prompts(str(source))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, small)))


def write_models(folder: Path) -> None:
    """Write the stand-ins of all models that the recipes name, and a head of the aesthetic score."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for asked in scene_prompts(40, 1) for word in asked.caption.split()})
    stand_ins.save_language_model(folder / "llm", words)
    stand_ins.save_captioner(folder / "captioner", seed=10)  # one that finishes its answers
    stand_ins.save_flux(folder / "flux_schnell")
    stand_ins.save_pixart(folder / "pixart_sigma", "Sigma")
    stand_ins.save_stable_diffusion_3(folder / "sd35_large")
    stand_ins.save_stable_diffusion(folder / "sdv15")
    stand_ins.save_stable_diffusion_xl(folder / "sdxl")
    stand_ins.save_pixart(folder / "pixart_alpha", "Alpha")
    torch.manual_seed(0)
    clip = load_clip(CLIP, None, asker="stand-in", extra="curate")
    torch.save({name: weight.half() for name, weight in clip.network.state_dict().items()}, folder / "clip.pt")
    _write_aesthetic_head(
        folder / "aesthetic-head.safetensors",
        clip.embed_images([Image.fromarray(render(scene_at(0, i), 2 * SIZE)) for i in range(32)]),
    )


def _write_aesthetic_head(path: Path, embeddings: np.ndarray) -> None:
    """Write a head by which images have scores of 6 plus or minus 1: a random network tells them apart along one axis."""
    centred = embeddings - embeddings.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    weight = axis / (centred @ axis).std()
    head = {
        "weight": torch.from_numpy(weight[None].copy()),
        "bias": torch.tensor([6.0 - float(embeddings.mean(0) @ weight)]),
    }
    save_file(head, path)


def _scenes(seed: int, size: int = SIZE) -> Iterator[Sample]:
    """Yield scenes as (key, PNG bytes, caption, metadata), without an end."""
    index = 0
    while True:
        scene = scene_at(seed, index)
        yield f"{index:08d}", _png(render(scene, size)), scene.caption, {}
        index += 1


def _laion(caption: str, size: int, **scores: float) -> dict[str, Any]:
    """Return metadata under the names of LAION and img2dataset."""
    about = {"pwatermark": 0.05, "punsafe": 0.01, "similarity": 0.33, **scores}
    return {"url": "", "top_caption": caption, "WIDTH": size, "HEIGHT": size, "width": size, "height": size, **about}


def _geneval(expectation: Expectation) -> dict[str, Any]:
    include = [{"class": shape, "count": expectation.count} for shape, _ in expectation.objects]
    return {"tag": GENEVAL_TASKS[expectation.category], "include": include, "prompt": expectation.caption}


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt's settings with the size that the small tokenizer has for the paper's."""
    return {**settings, "size": settings["size"] * SIZE // 512}


def _page(size: int) -> np.ndarray:
    """Draw a page of small text, uint8 ``[size, size, 3]``."""
    image = Image.new("RGB", (size, size), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    for top in range(4, size - 12, 14):
        draw.text((4, top), "seven wizards quietly brew a green potion", font=font, fill="black")
    return np.asarray(image)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
