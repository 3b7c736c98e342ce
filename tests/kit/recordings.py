"""Writes folders of recorded numbers at any sizes, with the project's own networks.

Samplers are written out here once more, from the formulas, so that the checker's are compared with something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.checkpoint import build_model
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig
from instella_ray.models.joint_attention import TextKV

Tensors = dict[str, Tensor]

TOKENIZER: dict[str, Any] = {
    "patch_size": 4,
    "num_tokens": 5,
    "bits_per_token": 3,
    "encoder_width": 16,
    "encoder_layers": 3,
    "encoder_heads": 2,
    "decoder_width": 8,
    "decoder_layers": 2,
    "decoder_heads": 1,
    "rope_axes": (2, 2, 4),
    "downsample_after": (0,),
    "upsample_after": (1,),
}
GENERATOR: dict[str, Any] = {
    "num_tokens": 4,
    "bits_per_token": 7,
    "width": 18,
    "layers": 2,
    "heads": 3,
    "text_width": 10,
}
SAMPLING = {"num_sampling_steps": 3, "guidance_scale": 1.5, "temp": 0.7, "rho": 1.3}
SIZES = {"x0": (32, 16), "x1": (16, 24), "dec_base": (16, 32), "dec_alt": (24, 8)}


def record(
    folder: Path,
    *,
    tokenizer: dict[str, Any] | None = None,
    generator: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    sizes: dict[str, tuple[int, int]] | None = None,
    bae_scale: float = 60,
    text_length: int = 6,
) -> Path:
    """A whole folder; the dictionaries change single values of the constants above."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    settings, sizes = {**SAMPLING, **(sampling or {})}, {**SIZES, **(sizes or {})}
    tokenizer = {**TOKENIZER, **(tokenizer or {})}
    generator = {**GENERATOR, **(generator or {})}
    variant = {"kind": "bit", "rope": "published", "resample": "conv"}
    extent = bae_scale / tokenizer["patch_size"]
    cfg = BITConfig(**variant, **tokenizer, position_extent=extent, image_size=tokenizer["patch_size"] * 8)
    scaled = build_model(cfg.model_dump())
    plain = build_model(cfg.model_copy(update={"position_extent": None}).model_dump())
    plain.load_state_dict(scaled.state_dict())
    diffusion, ar = (
        build_model(
            GeneratorConfig(kind=kind, zero_init=False, unused_time_embed=kind == "ar", **generator).model_dump()
        )
        for kind in ("diffusion", "ar")
    )
    assert isinstance(scaled, BIT) and isinstance(plain, BIT)
    assert isinstance(diffusion, DiffusionGenerator) and isinstance(ar, ARGenerator)
    with torch.no_grad():
        io = {
            **_tokenizer(scaled, plain, sizes),
            **_networks(diffusion, ar, text_length),
            **_samplers(diffusion, ar, text_length, settings),
        }
    for name, model in (("bit", scaled), ("diffusion", diffusion), ("ar", ar)):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    save_file({name: value.contiguous() for name, value in io.items()}, folder / "io.safetensors")
    facts = {
        "what": "recorded by the tests",
        "bit": {
            "axes_dims_rope": cfg.rope_axes,
            "downsample_idx": cfg.downsample_after,
            "upsample_idx": cfg.upsample_after,
        },
        "bae_scale": bae_scale,
        "sizes": sizes,
        "sampling": settings,
        "ar_sampling": {"guidance_scale": settings["guidance_scale"], "temp": settings["temp"]},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def _tokenizer(scaled: BIT, plain: BIT, sizes: dict[str, tuple[int, int]]) -> Tensors:
    io: Tensors = {}
    for name in (name for name in sizes if name.startswith("x")):
        images = io[f"bit.{name}"] = torch.rand(2, 3, *sizes[name]) * 2 - 1
        # Pixels beyond the last whole patch are never read.
        height, width = (side // scaled.cfg.patch_size * scaled.cfg.patch_size for side in sizes[name])
        images = images[..., :height, :width]
        for bit, suffix in ((scaled, ""), (plain, "_noscale")):
            logits = bit.encode_logits(images)
            code = (logits > 0).to(torch.uint8)
            io[f"bit.{name}.logits{suffix}"], io[f"bit.{name}.code{suffix}"] = logits, code
        io[f"bit.{name}.zq"] = torch.einsum("bln,nd->bld", io[f"bit.{name}.code"].float(), scaled.quantizer.embed)
        soft = io[f"bit.{name}.logits"].sigmoid()
        io[f"bit.{name}.code_loss"] = (soft * (1 - soft)).mean()[None]
    codes = io["bit.code_dec"] = torch.randint(
        0, 2, (2, scaled.cfg.num_tokens, scaled.cfg.bits_per_token), dtype=torch.uint8
    )
    io["bit.dec_base"] = scaled.decode(codes, *sizes["dec_base"])
    io["bit.dec_alt_row0"] = scaled.decode(codes[:1], *sizes["dec_alt"])
    io["bit.dec_base_row1_noscale"] = plain.decode(codes[1:], *sizes["dec_base"])
    return io


def _text(prefix: str, model: DiffusionGenerator, rows: int, length: int) -> Tensors:
    """Left-padded features with garbage at the padding; the last row is the empty prompt."""
    lengths = torch.tensor([min(length, 2 + i) for i in range(rows - 1)] + [0])
    mask = torch.arange(length)[None] >= length - lengths[:, None]
    io = {f"{prefix}.mask": mask.to(torch.uint8)}
    for i in range(model.cfg.layers):
        features = torch.randn(rows, length, model.cfg.text_width)
        io[f"{prefix}.feat.{i}"] = features.masked_fill(~mask[..., None], 1e6)
    return io


def _kv(model: DiffusionGenerator | ARGenerator, io: Tensors, prefix: str) -> TextKV:
    features = torch.stack([io[f"{prefix}.feat.{i}"] for i in range(model.cfg.layers)])
    return model.text_kv(features, io[f"{prefix}.mask"].bool())


def _networks(diffusion: DiffusionGenerator, ar: ARGenerator, text_length: int) -> Tensors:
    io = _text("gen", diffusion, 3, text_length)
    shape = (3, diffusion.cfg.num_tokens, diffusion.cfg.bits_per_token)
    bits = io["gen.z"] = torch.randint(0, 2, shape, dtype=torch.uint8)
    z, t, u = bits.float(), torch.rand(3), torch.rand(shape)
    p = z * (1 - t[:, None, None]) + t[:, None, None] / 2
    noisy = (u < p).float()
    out = diffusion(noisy, t, _kv(diffusion, io, "gen"))
    logits = noisy * -out + (1 - noisy) * out
    bce = F.binary_cross_entropy_with_logits
    forced = ar(z[:, :-1], _kv(ar, io, "gen"))
    return {
        **io,
        "dit.t": t,
        "dit.noise_u": u,
        "dit.noise_p": p,
        "dit.zt": noisy.to(torch.uint8),
        "dit.out": out,
        "dit.x0_logits": logits,
        "dit.loss_epsilon": bce(logits, z)[None],
        "dit.loss_x": bce(out, z)[None],
        "dit.acc_percent": 100 * ((logits > 0) == (z > 0)).float().mean()[None],
        "ar.out_tf": forced,
        "ar.out_full": ar(z, _kv(ar, io, "gen")),
        "ar.out_first": ar(None, _kv(ar, io, "gen")),
        "ar.loss": bce(forced, z)[None],
        "ar.acc_percent": 100 * ((forced > 0) == (z > 0)).float().mean()[None],
    }


def _samplers(diffusion: DiffusionGenerator, ar: ARGenerator, text_length: int, settings: dict[str, Any]) -> Tensors:
    io = _text("samp", diffusion, 4, text_length)
    for name in ("alg1", "alg2"):
        io.update(_diffusion_trajectory(name, diffusion, _kv(diffusion, io, "samp"), settings))
    io.update(_ar_trajectory(ar, _kv(ar, io, "samp"), settings))
    return io


def _guided(out: Tensor, settings: dict[str, Any]) -> Tensor:
    cond, uncond = out.chunk(2)
    logits = (1 + settings["guidance_scale"]) * cond - settings["guidance_scale"] * uncond
    return (logits / settings["temp"]).sigmoid() if settings["temp"] else (logits > 0).float()


def _uniforms(p: Tensor) -> Tensor:
    """Uniforms that leave every decision a margin."""
    u = torch.rand_like(p)
    return torch.where((u - p).abs() < 1e-3, (p + 0.1) % 1, u)


def _diffusion_trajectory(name: str, model: DiffusionGenerator, text: TextKV, settings: dict[str, Any]) -> Tensors:
    steps = settings["num_sampling_steps"]
    times = [(1 - i / steps) ** settings["rho"] for i in range(steps)]
    probabilities = [torch.full((2, model.cfg.num_tokens, model.cfg.bits_per_token), 0.5)]
    uniforms = [_uniforms(probabilities[0])]
    states, outs = [(uniforms[0] < 0.5).float()], []
    for i, t in enumerate(times):
        z = states[-1]
        outs.append(model(torch.cat((z, z)), torch.full((4,), t), text))
        flip = _guided(outs[-1], settings)
        q = z * (1 - flip) + (1 - z) * flip
        if i == steps - 1:
            states.append((q > 0.5).float())
            break
        s = times[i + 1]
        p = q * (1 - s) + s / 2
        if name == "alg1":
            a0 = (1 - q) * (1 - s) + s / 2
            b1, b0 = z - (t - s) * (z - 0.5), (1 - z) - (t - s) * ((1 - z) - 0.5)
            p = p * b1 / (p * b1 + a0 * b0)
        probabilities.append(p)
        uniforms.append(_uniforms(p))
        states.append((uniforms[-1] < p).float())
    return {
        f"samp.{name}.u": torch.stack(uniforms),
        f"samp.{name}.p": torch.stack(probabilities),
        f"samp.{name}.z": torch.stack(states).to(torch.uint8),
        f"samp.{name}.out": torch.stack(outs),
        f"samp.{name}.x0_prob_last": q,
    }


def _ar_trajectory(model: ARGenerator, text: TextKV, settings: dict[str, Any]) -> Tensors:
    z = torch.zeros(2, 0, model.cfg.bits_per_token)
    uniforms, probabilities, outs = [], [], []
    for _ in range(model.cfg.num_tokens):
        outs.append(model(torch.cat((z, z)), text)[:, -1])
        probabilities.append(_guided(outs[-1], settings))
        uniforms.append(_uniforms(probabilities[-1]))
        z = torch.cat((z, (uniforms[-1] < probabilities[-1]).float()[:, None]), dim=1)
    return {
        "samp.ar.u": torch.stack(uniforms),
        "samp.ar.p": torch.stack(probabilities),
        "samp.ar.z": z.to(torch.uint8),
        "samp.ar.out_last": torch.stack(outs),
    }
