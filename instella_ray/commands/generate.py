"""Generate images of a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .. import logs
from ..bulk.sample_set import library_versions
from ..config import ArgumentParser, check_output_file
from ..data.formats.images import OPTIONS, encode_image
from ..errors import UserError
from ..models.bundled import DEFAULT, TOKENIZER, bundled_names
from ..pipeline import InstellaPipeline

ENDINGS = {"jpg": "jpeg", **{name: name for name in OPTIONS}}
"""Endings of files, and their formats."""


def parser(prog: str = "instella-ray generate") -> ArgumentParser:
    generators = [name for name in bundled_names() if not name.endswith(f"/{TOKENIZER}")]
    parser = ArgumentParser(prog=prog, description="Generate images of a prompt, without Ray, and write them to files.")
    parser.add_argument("prompt", help="text to draw")
    parser.add_argument(
        "--model",
        default=DEFAULT,
        metavar="MODEL",
        help="model folder of a generator, folder of a demo, hub name, or a model that comes with the package: "
        f"{', '.join(generators)} ({DEFAULT})",
    )
    parser.add_argument("-o", "--output", default="out.png", metavar="FILE", help="file: .png, .jpg or .webp (out.png)")
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="images; files get a number (1)")
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
    files = _files(Path(args.output), args.count)
    pipe = InstellaPipeline.from_pretrained(args.model, tokenizer=args.tokenizer, device=args.device)
    names = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "temperature": args.temperature}
    given = {name: value for name, value in names.items() if value is not None}
    settings = pipe.sampling(given).model_dump()
    steps = (
        settings["num_inference_steps"] if pipe.transformer.cfg.kind == "diffusion" else pipe.transformer.cfg.num_tokens
    )
    total = args.count * steps
    with logs.progress_bar(total=total, desc="generate", unit="step") as bar:
        output = pipe(
            args.prompt,
            num_images_per_prompt=args.count,
            seed=args.seed,
            width=int(size[1]) if size else None,
            height=int(size[2]) if size else None,
            output_type="np",
            callback_on_step_end=lambda *_: bar.update(),
            **given,
        )
        bar.update(total - bar.n)
    for file, pixels, seed in zip(files, output.images, output.seeds, strict=True):
        about = {"prompt": args.prompt, "seed": seed, "model": str(args.model), **settings}
        about |= {"size": pixels.shape[1::-1], "versions": library_versions()}
        file.write_bytes(encode_image(pixels, ENDINGS[file.suffix[1:].lower()], about))
        print(f"{file}: {pixels.shape[1]}x{pixels.shape[0]}, seed {seed}")
    return 0


def _files(output: Path, count: int) -> list[Path]:
    """Return the files to write; UserError if one exists, for another ending, and for a folder that does not exist."""
    if output.suffix[1:].lower() not in ENDINGS:
        raise UserError(f"--output {output}: expected a name that ends with .{', .'.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}")
    if count < 1:
        raise UserError(f"--count {count}: expected at least 1")
    files = [output.with_stem(f"{output.stem}-{i}") for i in range(count)] if count > 1 else [output]
    check_output_file(str(files[0]))
    if there := [file for file in files if file.exists()]:
        raise UserError(f"--output {there[0]}: already exists; expected a new name")
    return files
