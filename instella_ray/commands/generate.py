"""Generate images of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import logs
from ..bulk.sample_set import library_versions
from ..config import ArgumentParser, check_output_file
from ..data.formats.images import OPTIONS, encode_image
from ..data.prompts import read_prompts
from ..errors import UserError
from ..models.bundled import DEFAULT, TOKENIZER, bundled_names
from ..pipeline import InstellaPipeline
from ..sheet import draw_sheet

ENDINGS = {"jpg": "jpeg", **{name: name for name in OPTIONS}}
"""Endings of files, and their formats."""


def parser(prog: str = "instella-ray generate") -> ArgumentParser:
    generators = [name for name in bundled_names() if not name.endswith(f"/{TOKENIZER}")]
    parser = ArgumentParser(prog=prog, description="Generate images of a prompt, without Ray, and write them to files.")
    parser.add_argument("prompt", nargs="*", help="text to draw, or several of them")
    parser.add_argument("--prompts", metavar="FILE", help="file of more: lines of text, or JSONL, CSV or parquet")
    parser.add_argument(
        "--model",
        default=DEFAULT,
        metavar="MODEL",
        help="model folder of a generator, folder of a demo, hub name, or a model that comes with the package: "
        f"{', '.join(generators)} ({DEFAULT})",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="out.png",
        metavar="FILE",
        help="file: .png, .jpg or .webp (out.png); several get numbers",
    )
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="images of each prompt (1)")
    parser.add_argument(
        "--sheet",
        type=int,
        metavar="COLUMNS",
        help="write all into one file, each with its prompt, in rows of this many",
    )
    parser.add_argument("--size", metavar="WxH", help="width and height in pixels (default: the tokenizer's)")
    parser.add_argument("--seed", type=int, help="seed of the first image; the others count on (default: random)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a diffusion generator (default: the model's)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="0 is without guidance (default: the model's)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer, if the model's own is elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray generate") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("generate")
    size = re.fullmatch(r"(\d+)x(\d+)", args.size) if args.size else None
    if args.size and size is None:
        raise UserError(f"--size {args.size}: expected WIDTHxHEIGHT, such as 64x64")
    prompts = [*args.prompt, *(prompt.text for prompt in (read_prompts(args.prompts) if args.prompts else ()))]
    if not prompts:
        raise UserError("prompt: expected at least one, or --prompts FILE")
    if args.count < 1:
        raise UserError(f"--count {args.count}: expected at least 1")
    if args.sheet is not None and args.sheet < 1:
        raise UserError(f"--sheet {args.sheet}: expected at least 1 image a row")
    labels = [prompt for prompt in prompts for _ in range(args.count)]
    files = _files(Path(args.output), 1 if args.sheet else len(labels))
    pipe = InstellaPipeline.from_pretrained(args.model, tokenizer=args.tokenizer, device=args.device)
    names = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "temperature": args.temperature}
    given = {name: value for name, value in names.items() if value is not None}
    settings = pipe.sampling(given).model_dump()
    steps = (
        settings["num_inference_steps"] if pipe.transformer.cfg.kind == "diffusion" else pipe.transformer.cfg.num_tokens
    )
    total = len(labels) * steps
    with logs.progress_bar(total=total, desc="generate", unit="step") as bar:
        output = pipe(
            prompts,
            num_images_per_prompt=args.count,
            seed=args.seed,
            width=int(size[1]) if size else None,
            height=int(size[2]) if size else None,
            output_type="np",
            callback_on_step_end=lambda *_: bar.update(),
            **given,
        )
        bar.update(total - bar.n)
    settings |= {"model": str(args.model), "versions": library_versions()}
    if args.sheet:
        sheet = draw_sheet(output.images, labels, args.sheet)
        _write(files[0], sheet, {"prompts": labels, "seeds": output.seeds, **settings})
        print(f"{files[0]}: {len(labels)} images, seeds {output.seeds[0]} to {output.seeds[-1]}")
        return 0
    for file, pixels, prompt, seed in zip(files, output.images, labels, output.seeds, strict=True):
        _write(file, pixels, {"prompt": prompt, "seed": seed, "size": pixels.shape[1::-1], **settings})
        print(f"{file}: {pixels.shape[1]}x{pixels.shape[0]}, seed {seed}")
    return 0


def _write(file: Path, pixels: np.ndarray, about: Mapping[str, Any]) -> None:
    file.write_bytes(encode_image(pixels, ENDINGS[file.suffix[1:].lower()], about))


def _files(output: Path, count: int) -> list[Path]:
    """Return the files to write; UserError if one exists, for another ending, and for a folder that does not exist."""
    if output.suffix[1:].lower() not in ENDINGS:
        raise UserError(f"--output {output}: expected a name that ends with .{', .'.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}")
    files = [output.with_stem(f"{output.stem}-{i}") for i in range(count)] if count > 1 else [output]
    check_output_file(str(files[0]))
    if there := [file for file in files if file.exists()]:
        raise UserError(f"--output {there[0]}: already exists; expected a new name")
    return files
