"""Conversion of the released Instella-T2I checkpoints to model folders.

    python -m instella_ray.models.published RELEASE_FOLDER OUTPUT_FOLDER

reads ``bae/model.safetensors``, ``diffusion.pt`` and ``ar.pt`` (those that exist) and writes ``OUTPUT/bit``,
``OUTPUT/diffusion`` and ``OUTPUT/ar`` as safetensors. Parameter names are unchanged; sizes are derived from tensor
shapes. Settings that shapes do not determine (RoPE axes, resampling blocks, position extent, text encoder) default to
the released ones and can be set by options. The output folder is written atomically: a failed import leaves nothing
behind.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..config import ArgumentParser, Config, validate
from ..errors import UserError, run_main
from ..storage import atomic_dir, is_empty
from .bit import BIT, AxisWidth, BITConfig
from .checkpoint import Model, assemble, load_expected, read_tensors, save_model, weight_hash
from .folders import find_model
from .generator import GeneratorConfig
from .text_encoder import TextEncoderConfig

LICENSE = (
    "The released Instella-T2I weights are under AMD's research-only RAIL licence, which also applies to these converted "
    "files: read it in the release before using or sharing them."
)
FILES = {"bit": "bae/model.safetensors", "diffusion": "diffusion.pt", "ar": "ar.pt"}

State = Mapping[str, Tensor]


class ReleaseSettings(Config):
    """Settings that tensor shapes do not determine; the defaults are the released settings."""

    rope_axes: tuple[AxisWidth, AxisWidth, AxisWidth] = (8, 28, 28)
    downsample_after: tuple[int, ...] = (7,)
    upsample_after: tuple[int, ...] = (7,)
    bae_scale: float | None = Field(1024.0, gt=0)
    """Extent in pixels that positions of every image side are interpolated to; none: no interpolation."""
    text_encoder: str = Field("amd/AMD-OLMo-1B", min_length=1)
    """Text encoder of the generators: hub name, local folder, or ``package:module/folder``."""
    text_length: int = Field(128, ge=1)
    """Maximum number of prompt tokens."""


RELEASED = ReleaseSettings()


def bit_config_from_state(state: State, settings: ReleaseSettings = RELEASED, source: str = "tokenizer") -> BITConfig:
    """Derive the tokenizer's configuration from tensor shapes, with the released variant of every option.

    UserError names ``source`` if the tensors are not a tokenizer's, or the settings do not match them.
    """
    encoder_width, _, patch, _ = _shape(state, "encoder.patch_embedder.weight", 4, source)
    decoder_width = _shape(state, "decoder.mask_tokens", 3, source)[-1]
    (head_width,) = _shape(state, "encoder.transformer_blocks.0.attn.norm_q.weight", 1, source)
    multiple = patch * 2 ** len(settings.downsample_after)
    sizes = {
        "kind": "bit",
        # The released tokenizers read 512 px; for other patch sizes, the largest multiple below.
        "image_size": multiple * max(512 // multiple, 1),
        "patch_size": patch,
        "num_tokens": _shape(state, "encoder.latent_tokens", 3, source)[1],
        "bits_per_token": _shape(state, "quantizer.embed", 2, source)[0],
        "encoder_width": encoder_width,
        "encoder_layers": _depth(state, "encoder.transformer_blocks"),
        "encoder_heads": encoder_width // head_width,
        "decoder_width": decoder_width,
        "decoder_layers": _depth(state, "decoder.transformer_blocks"),
        "decoder_heads": decoder_width // head_width,
        "rope": "published",
        "position_extent": settings.bae_scale and settings.bae_scale / patch,
        "resample": "conv",
        "pixel_head": "linear",
    }
    chosen = settings.model_dump(include={"rope_axes", "downsample_after", "upsample_after"})
    return validate(BITConfig, sizes | chosen, source)


def generator_config_from_state(state: State, source: str = "generator") -> GeneratorConfig:
    """Derive a generator's configuration from tensor shapes; only an AR generator has a split token.

    UserError names ``source`` if the tensors are not a generator's.
    """
    ar = "split_token" in state
    width, bits = _shape(state, "x_embedder.weight", 2, source)
    positions = _shape(state, "transformer_blocks.0.pos_emb", 3, source)[1]
    (head_width,) = _shape(state, "transformer_blocks.0.attn.norm_q.weight", 1, source)
    sizes = {
        "kind": "ar" if ar else "diffusion",
        "num_tokens": positions - 1 if ar else positions,
        "bits_per_token": bits,
        "width": width,
        "layers": _depth(state, "transformer_blocks"),
        "heads": width // head_width,
        "text_width": _shape(state, "transformer_blocks.0.proj_cond.weight", 2, source)[1],
        "position_std": 0.0,
        "zero_init": False,
        "unused_time_embed": ar and "time_embed.linear_1.weight" in state,
    }
    return validate(GeneratorConfig, sizes, source)


def model_from_state(kind: str, state: State, source: Path, settings: ReleaseSettings = RELEASED) -> Model:
    """Build the model of ``kind``, a key of :data:`FILES`, in eval mode; UserError names ``source`` for another kind."""
    if kind == "bit":
        return assemble(bit_config_from_state(state, settings, str(source)), state, source)
    config = generator_config_from_state(state, str(source))
    if config.kind != kind:
        raise UserError(f"{source}: holds the weights of a generator of kind {config.kind}, expected {kind}")
    return assemble(config, state, source)


def load_published(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a released file; pickles with ``weights_only=True``, so that no code in them is executed.

    UserError for a file of another format.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    expected = "expected a DeepSpeed checkpoint with its weights under 'module'"
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious pickle can raise any error
        raise UserError(f"{path}: not a file of plain tensors ({type(error).__name__}); {expected}") from None
    state = content.get("module") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: {expected}")
    return state


def import_published(
    source: Path, output: Path, settings: ReleaseSettings = RELEASED, tokenizer: Path | None = None
) -> list[Path]:
    """Convert every released file under ``source`` to a model folder under ``output``; returns the folders.

    Generators are stored with the hash of the release's tokenizer, or of that in the model folder ``tokenizer``.
    """
    found = {kind: source / file for kind, file in FILES.items() if (source / file).is_file()}
    if not found:
        raise UserError(f"{source}: none of the released files found; expected {', '.join(FILES.values())}")
    if not is_empty(str(output)):
        raise UserError(f"{output}: already exists; choose another output folder")
    if tokenizer is not None and "bit" in found:
        raise UserError(f"--tokenizer {tokenizer}: the release contains {found['bit']}; expected one of the two")
    bit = None if tokenizer is None else load_expected(find_model(str(tokenizer)), BIT)
    with atomic_dir(output) as folder:
        for kind, path in found.items():
            model = model_from_state(kind, load_published(path), path, settings)
            extra: dict[str, Any] = {"license": LICENSE}
            if isinstance(model, BIT):
                bit = model
            else:
                text = TextEncoderConfig(name=settings.text_encoder, max_length=settings.text_length)
                extra["text_encoder"] = text.absolute().model_dump(mode="json")
                extra |= _tokenizer_hash(model, path, bit)
            (folder / kind).mkdir()
            save_model(folder / kind, model, extra=extra)
    if bit is None:
        print(
            f"note: no {FILES['bit']} in {source}, so {' and '.join(found)} have no tokenizer hash, and their codes cannot "
            "be decoded; import again with --tokenizer FOLDER to set it",
            file=sys.stderr,
        )
    return [output / kind for kind in found]


def _tokenizer_hash(model: Model, path: Path, bit: BIT | None) -> dict[str, str]:
    """Return the tokenizer hash for a generator's ``config.yaml``; empty without a tokenizer.

    UserError if the generator's codes do not have the tokenizer's size.
    """
    if bit is None:
        return {}
    generated, decoded = ((m.cfg.num_tokens, m.cfg.bits_per_token) for m in (model, bit))
    if generated != decoded:
        raise UserError(
            f"{path}: writes codes of {generated[0]} tokens x {generated[1]} bits, "
            f"the tokenizer reads {decoded[0]} tokens x {decoded[1]} bits"
        )
    return {"tokenizer_hash": weight_hash(bit)}


def _shape(state: State, name: str, axes: int, source: str) -> torch.Size:
    shape = state[name].shape if name in state else None
    if shape is None or len(shape) != axes or 0 in shape:
        found = "found none" if shape is None else f"found shape {tuple(shape)}"
        raise UserError(f"{source}: expected a tensor {name} with {axes} axes, {found}")
    return shape


def _depth(state: State, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max((int(m[1]) + 1 for name in state if (m := pattern.match(name))), default=0)


def _numbers(text: str) -> tuple[int, ...]:
    """Parse ``"8,28,28"`` to integers; ``none`` is the empty tuple."""
    try:
        return () if text == "none" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected comma-separated integers, or none") from None


def _scale(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number, or none") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m instella_ray.models.published", description="Convert the released Instella-T2I checkpoints."
    )
    parser.add_argument(
        "source", type=Path, help="folder of the release, with bae/model.safetensors, diffusion.pt and ar.pt"
    )
    parser.add_argument("output", type=Path, help="new folder for bit/, diffusion/ and ar/")
    for option, parse, metavar, meaning in (
        ("rope-axes", _numbers, "A,B,C", "columns of a head for latent index, row and column"),
        ("downsample-after", _numbers, "I,..", "encoder blocks followed by a 2x2 merge"),
        ("upsample-after", _numbers, "I,..", "decoder blocks followed by a 2x2 expansion"),
        ("bae-scale", _scale, "PIXELS", "extent of positions, none: integer positions"),
        ("text-encoder", str, "NAME", "what reads prompts: hub name, local folder, or package:module/folder"),
        ("text-length", int, "N", "tokens a prompt, longer ones are cut"),
    ):
        default = getattr(RELEASED, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}", type=parse, default=default, metavar=metavar, help=f"{meaning} (as released: {default})"
        )
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="model folder, for a release without bae/")
    args = parser.parse_args(argv)

    def convert() -> None:
        values = {name: getattr(args, name) for name in ReleaseSettings.model_fields}
        settings = validate(ReleaseSettings, values, "options")
        folders = import_published(args.source, args.output, settings, args.tokenizer)
        print(LICENSE, file=sys.stderr)
        for folder in folders:
            print(f"wrote {folder}")

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
