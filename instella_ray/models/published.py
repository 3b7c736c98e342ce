"""Import of the released Instella-T2I checkpoints into model folders of this project.

    python -m instella_ray.models.published RELEASE_FOLDER OUTPUT_FOLDER

reads ``bae/model.safetensors``, ``diffusion.pt`` and ``ar.pt`` (those that are there) and writes ``OUTPUT/bit``,
``OUTPUT/diffusion`` and ``OUTPUT/ar`` as safetensors. Parameter names are the same on both sides; sizes are read off
the shapes, and what shapes cannot tell (RoPE axes, resampling places, position extent) are the released settings.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, run_main
from ..storage import atomic_dir
from .bit import BITConfig
from .checkpoint import build_model, save_model, weight_hash
from .generator import GeneratorConfig

LICENSE = (
    "The released Instella-T2I weights are under AMD's research-only RAIL licence, which these converted files keep: "
    "read it beside the release before using or sharing them."
)
TEXT_ENCODER = {"name": "amd/AMD-OLMo-1B", "max_length": 128}
FILES = {"bit": "bae/model.safetensors", "diffusion": "diffusion.pt", "ar": "ar.pt"}

State = Mapping[str, Tensor]


def bit_config_from_state(
    state: State,
    *,
    rope_axes: tuple[int, int, int] = (8, 28, 28),
    downsample_after: tuple[int, ...] = (7,),
    upsample_after: tuple[int, ...] = (7,),
    position_extent: float | None = 64.0,
    image_size: int = 512,
) -> BITConfig:
    """The tokenizer's configuration from its tensors' shapes, with the released variants of every option."""
    encoder_width, _, patch, _ = state["encoder.patch_embedder.weight"].shape
    decoder_width = state["decoder.mask_tokens"].shape[-1]
    head_width = len(state["encoder.transformer_blocks.0.attn.norm_q.weight"])
    return BITConfig(
        image_size=image_size,
        patch_size=patch,
        num_tokens=state["encoder.latent_tokens"].shape[1],
        bits_per_token=len(state["quantizer.embed"]),
        encoder_width=encoder_width,
        encoder_layers=_depth(state, "encoder.transformer_blocks"),
        encoder_heads=encoder_width // head_width,
        decoder_width=decoder_width,
        decoder_layers=_depth(state, "decoder.transformer_blocks"),
        decoder_heads=decoder_width // head_width,
        rope_axes=rope_axes,
        rope="published",
        position_extent=position_extent,
        downsample_after=downsample_after,
        upsample_after=upsample_after,
        resample="conv",
        pixel_head="linear",
    )


def generator_config_from_state(state: State) -> GeneratorConfig:
    """A generator's configuration from its tensors' shapes: the split token tells AR from diffusion."""
    ar = "split_token" in state
    width, bits = state["x_embedder.weight"].shape
    positions = state["transformer_blocks.0.pos_emb"].shape[1]
    return GeneratorConfig(
        kind="ar" if ar else "diffusion",
        num_tokens=positions - 1 if ar else positions,
        bits_per_token=bits,
        width=width,
        layers=_depth(state, "transformer_blocks"),
        heads=width // len(state["transformer_blocks.0.attn.norm_q.weight"]),
        text_width=state["transformer_blocks.0.proj_cond.weight"].shape[1],
        position_std=0.0,
        zero_init=False,
        unused_time_embed=ar and "time_embed.linear_1.weight" in state,
    )


def load_published(path: Path) -> dict[str, Tensor]:
    """The tensors of one released file. Pickles are read with ``weights_only=True``: no code in them runs."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise UserError(f"{path}: expected a DeepSpeed checkpoint with its weights under 'module'")
    return content["module"]


def import_published(source: Path, output: Path) -> list[Path]:
    """Convert every released file found under ``source`` into a folder under ``output``; returns the folders."""
    found = {kind: source / file for kind, file in FILES.items() if (source / file).is_file()}
    if not found:
        raise UserError(f"{source}: none of the released files found; expected {', '.join(FILES.values())}")
    for kind in found:
        if (output / kind).exists():
            raise UserError(f"{output / kind}: exists already; choose another output folder")
    folders = []
    extra: dict[str, Any] = {"license": LICENSE}
    for kind, path in found.items():
        state = load_published(path)
        config = bit_config_from_state(state) if kind == "bit" else generator_config_from_state(state)
        with torch.device("meta"):
            model = build_model(config.model_dump())
        model.load_state_dict(state, strict=True, assign=True)
        with atomic_dir(str(output / kind)) as folder:
            save_model(folder, model, extra=extra)
        folders.append(output / kind)
        if kind == "bit":
            extra = {**extra, "text_encoder": TEXT_ENCODER, "tokenizer_hash": weight_hash(model)}
    return folders


def _depth(state: State, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max(int(m[1]) for name in state if (m := pattern.match(name)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instella_ray.models.published", description="Convert the released Instella-T2I checkpoints."
    )
    parser.add_argument(
        "source", type=Path, help="folder of the release, with bae/model.safetensors, diffusion.pt, ar.pt"
    )
    parser.add_argument("output", type=Path, help="new folder for bit/, diffusion/ and ar/")
    args = parser.parse_args(argv)

    def convert() -> None:
        print(LICENSE, file=sys.stderr)
        for folder in import_published(args.source, args.output):
            print(f"wrote {folder}")

    return run_main(convert)


if __name__ == "__main__":
    sys.exit(main())
