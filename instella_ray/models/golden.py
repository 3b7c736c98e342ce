"""Check this implementation against recorded numbers: ``python -m instella_ray.models.golden FOLDER``.

The folder holds small checkpoints under the published names and ``io.safetensors`` with inputs and outputs, described
by ``config.json``. For each recorded tensor the largest absolute difference and the number of wrong bits are printed.
The exit code is 1 past 1e-5 or with any wrong bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..diffusion import ar_loss, bit_accuracy, diffusion_loss, flip_noise, noise_probability, x0_logits
from ..errors import UserError, run_main
from ..sampling import (
    SamplingParams,
    diffusion_step,
    generate_ar,
    generate_diffusion,
    guided_probability,
    transition_probability,
)
from ..sampling import timestep as timestep_of
from .bit import BIT
from .checkpoint import build_model
from .generator import ARGenerator, DiffusionGenerator
from .published import ReleaseSettings, bit_config_from_state, generator_config_from_state
from .rope import rope_table

TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


class Comparison(NamedTuple):
    """One recorded tensor against ours."""

    name: str
    difference: float
    """Largest absolute difference; for bits the share of wrong ones is in ``wrong_bits``."""
    wrong_bits: int

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE and self.wrong_bits == 0


class Golden:
    """A folder of recorded numbers; :meth:`compare` yields one comparison a recorded output."""

    def __init__(self, folder: Path) -> None:
        for name in ("config.json", "io.safetensors", "bit.safetensors", "diffusion.safetensors", "ar.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}; expected a folder of recorded numbers")
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.io = load_file(folder / "io.safetensors")
        self.weights = {
            kind: {k: v.float() for k, v in load_file(folder / f"{kind}.safetensors").items()}
            for kind in ("bit", "diffusion", "ar")
        }

    @torch.no_grad()
    def compare(self) -> Iterator[Comparison]:
        for outputs in (self._tokenizer(), self._networks(), self._samplers()):
            for name, value in outputs:
                if name in self.io:
                    yield _compare(name, value, self.io[name])

    def bit(self, extent: float | None) -> BIT:
        """The recorded tokenizer with every grid side spanning ``extent`` positions (None: integer positions)."""
        facts = self.config["bit"]
        settings = ReleaseSettings(
            rope_axes=tuple(facts["axes_dims_rope"]),
            downsample_after=tuple(facts["downsample_idx"]),
            upsample_after=tuple(facts["upsample_idx"]),
            bae_scale=extent and extent * facts["patch_size"],
        )
        config = bit_config_from_state(self.weights["bit"], settings)
        model = build_model(config.model_dump())
        model.load_state_dict(self.weights["bit"])
        assert isinstance(model, BIT)
        return model.eval()

    def generator(self, kind: str) -> DiffusionGenerator | ARGenerator:
        model = build_model(generator_config_from_state(self.weights[kind]).model_dump())
        model.load_state_dict(self.weights[kind])
        assert not isinstance(model, BIT)
        return model.eval()

    def _tokenizer(self) -> Iterator[tuple[str, Tensor]]:
        scaled = self.bit(self.config["bae_scale"] / self.config["bit"]["patch_size"])
        plain = self.bit(None)
        sizes, codes = self.config["sizes"], self.io["bit.code_dec"]
        for key in ("x0", "x1"):
            if f"bit.{key}" not in self.io:
                continue
            logits = scaled.encode_logits(self.io[f"bit.{key}"])
            bits = scaled.encode(self.io[f"bit.{key}"])
            yield f"bit.{key}.logits", logits
            yield f"bit.{key}.code", bits
            yield f"bit.{key}.zq", bits.float() @ scaled.quantizer.embed
            soft = logits.sigmoid()
            yield f"bit.{key}.code_loss", (soft * (1 - soft)).mean().reshape(1)
            yield f"bit.{key}.logits_noscale", plain.encode_logits(self.io[f"bit.{key}"])
            yield f"bit.{key}.code_noscale", plain.encode(self.io[f"bit.{key}"])
        yield "bit.dec_base", scaled.decode(codes, *sizes["dec_base"])
        yield "bit.dec_alt_row0", scaled.decode(codes[:1], *sizes["dec_alt"])
        yield "bit.dec_base_row0_noscale", plain.decode(codes[:1], *sizes["dec_base"])
        yield from self._encoder_states(scaled)

    def _encoder_states(self, bit: BIT) -> Iterator[tuple[str, Tensor]]:
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _module, _inputs, output: states.append(output))
            for block in bit.encoder.transformer_blocks
        ]
        bit.encode_logits(self.io["bit.x0"][:1])
        for hook in hooks:
            hook.remove()
        for i, state in enumerate(states):
            yield f"debug.encoder.block{i}.x0_row0", state
        cfg, extent = bit.cfg, bit.cfg.position_extent
        height, width = (side // cfg.patch_size for side in self.io["bit.x0"].shape[-2:])
        for stage in range(1 + len(cfg.downsample_after)):
            cos, sin = rope_table(cfg.num_tokens, height, width, cfg.rope_axes, extent)
            yield f"debug.encoder.rope_cos.stage{stage}.x0", cos
            yield f"debug.encoder.rope_sin.stage{stage}.x0", sin
            height, width, extent = height // 2, width // 2, extent and extent // 2

    def _networks(self) -> Iterator[tuple[str, Tensor]]:
        io, z, mask = self.io, self.io["gen.z"].float(), self.io["gen.mask"].bool()
        diffusion, ar = self.generator("diffusion"), self.generator("ar")
        assert isinstance(diffusion, DiffusionGenerator) and isinstance(ar, ARGenerator)
        features = self._features("gen.feat", diffusion.cfg.layers)
        t, z_t = io["dit.t"], io["dit.zt"].float()
        out = diffusion(z_t, t, diffusion.text_kv(features, mask))
        logits = x0_logits(out, z_t)
        yield "dit.noise_p", noise_probability(z, t)
        yield "dit.zt", flip_noise(z, t, io["dit.noise_u"])
        yield "dit.out", out
        yield "dit.x0_logits", logits
        yield "dit.loss_epsilon", diffusion_loss(out, z_t, z).reshape(1)
        yield "dit.loss_x", diffusion_loss(out, z_t, z, target="x0").reshape(1)
        yield "dit.acc_percent", 100 * bit_accuracy(logits, z).mean().reshape(1)
        text = ar.text_kv(features, mask)
        forced = ar(z[:, :-1], text)
        yield "ar.out_tf", forced
        yield "ar.loss", ar_loss(forced, z).reshape(1)
        yield "ar.acc_percent", 100 * bit_accuracy(forced, z).mean().reshape(1)
        yield "ar.out_full", ar(z, text)
        yield "ar.out_first", ar(None, text)

    def _samplers(self) -> Iterator[tuple[str, Tensor]]:
        facts, mask = self.config["sampling"], self.io["samp.mask"].bool()
        batch = len(mask) // 2
        for name, sampler in (("alg1", "posterior"), ("alg2", "simplified")):
            params = SamplingParams.of(
                batch,
                num_inference_steps=facts["num_sampling_steps"],
                guidance_scale=facts["guidance_scale"],
                temperature=facts["temp"],
                rho=facts["rho"],
                sampler=sampler,
            )
            yield from self._diffusion_trajectory(f"samp.{name}", params, mask)
        yield from self._ar_trajectory(mask, batch)

    def _diffusion_trajectory(self, name: str, params: SamplingParams, mask: Tensor) -> Iterator[tuple[str, Tensor]]:
        model, batch, u = self.generator("diffusion"), len(params), self.io[f"{name}.u"]
        assert isinstance(model, DiffusionGenerator)
        text = model.text_kv(self._features("samp.feat", model.cfg.layers), mask)
        # Step by step, to see network outputs and probabilities; then once more through the real loop.
        z = (u[0] < 0.5).float()
        states, outs, probabilities = [z], [], [torch.full_like(z, 0.5)]
        x0_prob = z
        for index in range(int(params.num_inference_steps.max())):
            step = torch.full((batch,), index)
            t, s = timestep_of(step, params), timestep_of(step + 1, params)
            out = model(torch.cat((z, z)), torch.cat((t, t)), text)
            following, x0_prob = diffusion_step(
                z, out[:batch], out[batch:], step, params, u[min(index + 1, len(u) - 1)]
            )
            probabilities.append(transition_probability(z, x0_prob, t, s, params.sampler))
            z = following
            states.append(z)
            outs.append(out)
        yield f"{name}.out", torch.stack(outs)
        yield f"{name}.p", torch.stack(probabilities[: len(u)])
        looped = generate_diffusion(
            model, text.rows(slice(0, batch)), text.rows(slice(batch, None)), params, uniforms=u
        )
        yield f"{name}.z", torch.stack([*states[:-1], looped.float()])
        yield f"{name}.x0_prob_last", x0_prob

    def _ar_trajectory(self, mask: Tensor, batch: int) -> Iterator[tuple[str, Tensor]]:
        facts, model, u = self.config["ar_sampling"], self.generator("ar"), self.io["samp.ar.u"]
        assert isinstance(model, ARGenerator)
        params = SamplingParams.of(batch, guidance_scale=facts["guidance_scale"], temperature=facts["temp"])
        text = model.text_kv(self._features("samp.feat", model.cfg.layers), mask)
        halves = text.rows(slice(0, batch)), text.rows(slice(batch, None))
        z = generate_ar(model, *halves, params, uniforms=u)
        yield "samp.ar.z", z
        doubled = torch.cat((z, z)).float()
        outs = [model(doubled[:, :i] if i else None, text)[:, -1] for i in range(model.cfg.num_tokens)]
        yield "samp.ar.out_last", torch.stack(outs)
        yield "samp.ar.p", torch.stack([guided_probability(out[:batch], out[batch:], params) for out in outs])

    def _features(self, prefix: str, layers: int) -> Tensor:
        return torch.stack([self.io[f"{prefix}.{i}"] for i in range(layers)])


def _compare(name: str, ours: Tensor, recorded: Tensor) -> Comparison:
    if ours.shape != recorded.shape:
        raise UserError(f"{name}: ours has shape {tuple(ours.shape)}, the recording {tuple(recorded.shape)}")
    if recorded.dtype == torch.uint8:
        return Comparison(name, 0.0, int((ours.to(torch.uint8) != recorded).sum()))
    difference = (ours - recorded).abs().max()
    return Comparison(name, float(difference.nan_to_num(nan=float("inf"))), 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instella_ray.models.golden",
        description="Compare this implementation with recorded numbers; exit code 1 past 1e-5 or with any wrong bit.",
    )
    parser.add_argument("folder", type=Path, help="folder with config.json, io.safetensors and three checkpoints")
    args = parser.parse_args(argv)

    def check() -> int:
        results = list(Golden(args.folder).compare())
        for result in results:
            mark = "ok " if result.passed else "BAD"
            print(f"{mark} {result.name:<38} difference {result.difference:.2e}  wrong bits {result.wrong_bits}")
        failed = sum(not result.passed for result in results)
        print(f"{len(results)} tensors compared, {failed} failed")
        return 1 if failed or not results else 0

    return run_main(check)


if __name__ == "__main__":
    sys.exit(main())
