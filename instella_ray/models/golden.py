"""Comparison of this implementation with recorded tensors: ``python -m instella_ray.models.golden FOLDER``.

The folder contains ``config.json`` with settings that tensor shapes do not determine, ``io.safetensors`` with inputs and
outputs, and small checkpoints with published parameter names: ``bit``, ``diffusion`` and ``ar.safetensors``, of any size.
For each recorded output the largest absolute difference and the number of wrong bits are printed. The exit code is

- 0 if every recorded output was compared and agrees;
- 1 for a difference above 1e-5, a wrong bit, or an output that was not compared, because its name is unknown, or an
  input or checkpoint is missing. Outputs that were not recorded are no failure: a folder with some of the checkpoints
  passes if it records nothing of the others. Missing checkpoints are printed.
- 2 if the folder is malformed: no ``config.json``, no ``io.safetensors`` or no checkpoint, a damaged or missing file or
  setting, or inconsistent shapes.

At temperature 0 a recording must contain the greedy decision: the published samplers divide by the temperature and get
NaN, which never agrees.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..config import ArgumentParser, validate
from ..errors import UserError, run_main
from ..storage import read_json
from .bit import BIT
from .checkpoint import Model, read_tensors
from .diffusion import ar_loss, bit_accuracy, diffusion_loss, flip_noise, noise_probability, x0_logits
from .generator import ARGenerator, DiffusionGenerator
from .golden_facts import ARSamplingSection, RecordedFacts, SamplingSection, SizesSection, TokenizerSection
from .joint_attention import TextKV
from .published import FILES, RELEASED, ReleaseSettings, model_from_state
from .rope import rope_table
from .sampling import (
    SamplingParams,
    diffusion_step,
    generate_ar,
    generate_diffusion,
    guided_probability,
    transition_probability,
)
from .sampling import timestep as timestep_of

TOLERANCE = 1e-5
SAMPLERS = {"alg1": "posterior_release", "alg2": "simplified"}
INPUTS = re.compile(
    r"bit\.(x\d+|code_dec)|(gen|samp)\.(feat\.\d+|mask)|gen\.z|dit\.(t|noise_u|zt)|samp\.(alg1|alg2|ar)\.u"
)
"""Names of input tensors. ``dit.zt`` is also compared if its noise is recorded."""

F = TypeVar("F", bound=RecordedFacts)


class TensorComparison(NamedTuple):
    """Comparison of one recorded tensor with the computed one."""

    name: str
    difference: float = 0.0
    """Largest absolute difference; 0 for bits."""
    wrong_bits: int = 0
    not_checked: str = ""
    """Reason why the tensor was not compared; empty if it was."""

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE and self.wrong_bits == 0 and not self.not_checked

    def __str__(self) -> str:
        if self.not_checked:
            return f"NOT CHECKED {self.name} ({self.not_checked})"
        mark = "ok " if self.passed else "BAD"
        return f"{mark} {self.name:<38} difference {self.difference:.2e}  wrong bits {self.wrong_bits}"


class Absent(Exception):
    """A tensor or checkpoint is missing in the folder."""


class Recording(dict[str, Tensor]):
    """Recorded tensors by name."""

    def __missing__(self, name: str) -> Tensor:
        raise Absent(name)

    def floats(self, name: str) -> Tensor:
        """Return bits or numbers as float32, the networks' input dtype."""
        return self[name].float()


class Golden:
    """A folder of recorded tensors; :meth:`compare` yields one comparison per recorded output."""

    def __init__(self, folder: Path) -> None:
        for name in ("config.json", "io.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}; expected a folder of recorded tensors")
        self.folder = folder
        self.missing = [f"{kind}.safetensors" for kind in FILES if not (folder / f"{kind}.safetensors").is_file()]
        if len(self.missing) == len(FILES):
            raise UserError(f"{folder}: no checkpoint; expected at least one of {', '.join(self.missing)}")
        self.config = read_json(str(folder / "config.json"))
        if not isinstance(self.config, dict):
            raise UserError(f"{folder / 'config.json'}: expected an object, got {type(self.config).__name__}")
        self.io = Recording(read_tensors(folder / "io.safetensors"))
        # Several outputs come from the same run.
        self.diffusion_trajectory = cache(self._diffusion_trajectory)
        self.ar_trajectory = cache(self._ar_trajectory)

    @torch.no_grad()
    def compare(self) -> Iterator[TensorComparison]:
        for name in sorted(self.io):
            found = ((check, match) for pattern, check in CHECKS.items() if (match := re.fullmatch(pattern, name)))
            check, match = next(found, (None, None))
            if check and match:
                yield from self._compare(name, partial(check, self, *match.groups()))
            elif not INPUTS.fullmatch(name):
                yield TensorComparison(name, not_checked="unknown output name")

    def encoding(self, image: str, part: str, noscale: str | None) -> Tensor:
        """Compute ``bit.x0.logits``, ``code``, ``zq`` or ``code_loss`` of every recorded image."""
        bit, images = self.bit(noscale), self._images(image)
        logits = bit.encode_logits(images)
        soft = logits.sigmoid()
        return {
            "logits": lambda: logits,
            "code": lambda: bit.encode(images),
            "zq": lambda: bit.encode(images).float() @ bit.quantizer.embed,
            "code_loss": lambda: (soft * (1 - soft)).mean().reshape(1),
        }[part]()

    def decoding(self, size: str, row: str | None, noscale: str | None) -> Tensor:
        """Compute ``bit.dec_SIZE``: decode all codes or one row, at the named size."""
        codes, sizes = self.io["bit.code_dec"], self.facts(SizesSection).sizes
        if size not in sizes:
            raise UserError(f"{self.folder / 'config.json'}: key 'sizes.{size}' is required")
        chosen = codes if row is None else codes[int(row) : int(row) + 1]
        return self.bit(noscale).decode(chosen, *sizes[size])

    def encoder_state(self, block: str, image: str, row: str) -> Tensor:
        """Compute all tokens ``[1, L + H * W, d]`` after an encoder block, before a following merge."""
        states: list[Tensor] = []
        bit, images = self.bit(), self._images(image)
        module = bit.encoder.transformer_blocks[int(block)]
        hook = module.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        bit.encode_logits(images[int(row) : int(row) + 1])
        hook.remove()
        return states[0]

    def encoder_rope(self, function: str, stage: str, image: str) -> Tensor:
        """Compute RoPE cosines or sines ``[L + H * W, D]`` after ``stage`` merges."""
        cfg = self.bit().cfg
        height, width = (side // cfg.patch_size for side in self._images(image).shape[-2:])
        extent = cfg.position_extent
        for _ in range(int(stage)):
            height, width, extent = height // 2, width // 2, extent and extent // 2
        cos, sin = rope_table(cfg.num_tokens, height, width, cfg.rope_axes, extent)
        return cos if function == "cos" else sin

    def diffusion_network(self, part: str) -> Tensor:
        """Compute ``dit.*``: noise, network output and losses."""
        z, t, z_t = (partial(self.io.floats, name) for name in ("gen.z", "dit.t", "dit.zt"))

        def out() -> Tensor:
            return self.diffusion(z_t(), t(), self._text(self.diffusion, "gen"))

        def logits() -> Tensor:
            return x0_logits(out(), z_t())

        return {
            "noise_p": lambda: noise_probability(z(), t()),
            "zt": lambda: flip_noise(z(), t(), self.io["dit.noise_u"]),
            "out": out,
            "x0_logits": logits,
            "loss_epsilon": lambda: diffusion_loss(out(), z_t(), z()).reshape(1),
            "loss_x": lambda: diffusion_loss(out(), z_t(), z(), target="x0").reshape(1),
            "acc_percent": lambda: 100 * bit_accuracy(logits(), z()).mean().reshape(1),
        }[part]()

    def ar_network(self, part: str) -> Tensor:
        """Compute ``ar.*``: outputs with teacher forcing, for the whole sequence and the first token, and losses."""
        z, text = partial(self.io.floats, "gen.z"), self._text(self.ar, "gen")

        def forced() -> Tensor:
            return self.ar(z()[:, :-1], text)

        return {
            "out_tf": forced,
            "out_full": lambda: self.ar(z(), text),
            "out_first": lambda: self.ar(None, text),
            "loss": lambda: ar_loss(forced(), z()).reshape(1),
            "acc_percent": lambda: 100 * bit_accuracy(forced(), z()).mean().reshape(1),
        }[part]()

    def bit(self, noscale: str | None = None) -> BIT:
        """Return the recorded tokenizer, with integer positions for names that end in ``noscale``."""
        return self._unscaled_bit if noscale else self._scaled_bit

    @cached_property
    def diffusion(self) -> DiffusionGenerator:
        model = self._model("diffusion")
        assert isinstance(model, DiffusionGenerator)
        return model

    @cached_property
    def ar(self) -> ARGenerator:
        model = self._model("ar")
        assert isinstance(model, ARGenerator)
        return model

    def facts(self, section: type[F]) -> F:
        """Validate a section of ``config.json``; UserError names a missing or wrong key."""
        return validate(section, self.config, str(self.folder / "config.json"))

    @cached_property
    def _scaled_bit(self) -> BIT:
        return self._bit(self.facts(TokenizerSection).bae_scale)

    @cached_property
    def _unscaled_bit(self) -> BIT:
        return self._bit(None)

    def _bit(self, scale: float | None) -> BIT:
        facts = self.facts(TokenizerSection).bit
        options: dict[str, Any] = {
            "rope_axes": facts.axes_dims_rope,
            "downsample_after": facts.downsample_idx,
            "upsample_after": facts.upsample_idx,
            "bae_scale": scale,
        }
        model = self._model("bit", validate(ReleaseSettings, options, str(self.folder / "config.json")))
        assert isinstance(model, BIT)
        return model

    def _model(self, kind: str, settings: ReleaseSettings = RELEASED) -> Model:
        path = self.folder / f"{kind}.safetensors"
        if path.name in self.missing:
            raise Absent(path.name)
        state = {name: value.float() for name, value in read_tensors(path).items()}
        return model_from_state(kind, state, path, settings)

    def _images(self, name: str) -> Tensor:
        """Return recorded images ``[N, 3, H, W]``, cropped to multiples of the patch size.

        The published patch embedding ignores the remainder.
        """
        images, patch = self.io[f"bit.{name}"], self.bit().cfg.patch_size
        height, width = (side - side % patch for side in images.shape[-2:])
        return images[..., :height, :width]

    def _text(self, model: DiffusionGenerator | ARGenerator, prefix: str) -> TextKV:
        features = torch.stack([self.io[f"{prefix}.feat.{i}"] for i in range(model.cfg.layers)])
        return model.text_kv(features, self.io[f"{prefix}.mask"].bool())

    def _diffusion_trajectory(self, name: str) -> dict[str, Tensor]:
        facts, model, u = self.facts(SamplingSection).sampling, self.diffusion, self.io[f"samp.{name}.u"]
        text = self._text(model, "samp")
        batch, steps = len(text) // 2, facts.num_sampling_steps
        params = SamplingParams.of(
            batch,
            num_inference_steps=steps,
            guidance_scale=facts.guidance_scale,
            temperature=facts.temp,
            rho=facts.rho,
            sampler=SAMPLERS[name],
        )
        halves = text.rows(slice(0, batch)), text.rows(slice(batch, None))
        looped = generate_diffusion(model, *halves, params, uniforms=u)
        # Repeated step by step to obtain network outputs and probabilities.
        z = (u[0] < 0.5).float()
        states, outs, probabilities, x0_prob = [z], [], [torch.full_like(z, 0.5)], z
        for index in range(steps):
            step = torch.full((batch,), index)
            t, s = timestep_of(step, params), timestep_of(step + 1, params)
            out = model(torch.cat((z, z)), torch.cat((t, t)), text)
            draw = u[min(index + 1, len(u) - 1)]  # the last step thresholds and uses no draw
            next_z, x0_prob = diffusion_step(z, out[:batch], out[batch:], step, params, draw)
            probabilities.append(transition_probability(z, x0_prob, t, s, params.sampler))
            z = next_z
            states.append(z)
            outs.append(out)
        return {
            "out": torch.stack(outs),
            "p": torch.stack(probabilities[:steps]),
            "z": torch.stack([*states[:-1], looped.float()]),
            "x0_prob_last": x0_prob,
        }

    def _ar_trajectory(self) -> dict[str, Tensor]:
        facts, model = self.facts(ARSamplingSection).ar_sampling, self.ar
        text = self._text(model, "samp")
        batch = len(text) // 2
        params = SamplingParams.of(batch, guidance_scale=facts.guidance_scale, temperature=facts.temp)
        halves = text.rows(slice(0, batch)), text.rows(slice(batch, None))
        z = generate_ar(model, *halves, params, uniforms=self.io["samp.ar.u"])
        doubled = torch.cat((z, z)).float()
        outs = [model(doubled[:, :i] if i else None, text)[:, -1] for i in range(model.cfg.num_tokens)]
        return {
            "z": z,
            "out_last": torch.stack(outs),
            "p": torch.stack([guided_probability(out[:batch], out[batch:], params) for out in outs]),
        }

    def _compare(self, name: str, compute: Callable[[], Tensor]) -> Iterator[TensorComparison]:
        recorded = self.io[name]
        try:
            computed = compute()
        except Absent as absent:
            if not INPUTS.fullmatch(name):
                yield TensorComparison(name, not_checked=f"the folder has no {absent}")
            return
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (RuntimeError, IndexError, TypeError, ValueError) as error:  # inconsistent tensor shapes
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.folder}: {name} cannot be computed from its inputs ({reason})") from None
        if computed.shape != recorded.shape:
            raise UserError(f"{name}: computed shape {tuple(computed.shape)}, recorded shape {tuple(recorded.shape)}")
        if not recorded.is_floating_point():
            yield TensorComparison(name, wrong_bits=int((computed.to(recorded.dtype) != recorded).sum()))
            return
        difference = (computed - recorded).abs().max() if recorded.numel() else torch.zeros(())
        yield TensorComparison(name, float(difference.nan_to_num(nan=float("inf"))))


CHECKS: dict[str, Callable[..., Tensor]] = {
    r"bit\.(x\d+)\.(logits|code|zq|code_loss)(_noscale)?": Golden.encoding,
    r"bit\.(dec_\w+?)(?:_row(\d+))?(_noscale)?": Golden.decoding,
    r"debug\.encoder\.block(\d+)\.(x\d+)_row(\d+)": Golden.encoder_state,
    r"debug\.encoder\.rope_(cos|sin)\.stage(\d+)\.(x\d+)": Golden.encoder_rope,
    r"dit\.(noise_p|zt|out|x0_logits|loss_epsilon|loss_x|acc_percent)": Golden.diffusion_network,
    r"ar\.(out_tf|out_full|out_first|loss|acc_percent)": Golden.ar_network,
    r"samp\.(alg1|alg2)\.(out|p|z|x0_prob_last)": lambda golden, name, part: golden.diffusion_trajectory(name)[part],
    r"samp\.ar\.(z|out_last|p)": lambda golden, part: golden.ar_trajectory()[part],
}
"""Function that computes each output, by a pattern of its name; the pattern's groups are the arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m instella_ray.models.golden",
        description="Compare this implementation with recorded tensors; exit code 1 for a difference above 1e-5, a wrong "
        "bit, or an output that was not compared.",
    )
    parser.add_argument("folder", type=Path, help="folder with config.json, io.safetensors and checkpoints")
    args = parser.parse_args(argv)

    def check() -> int:
        golden = Golden(args.folder)
        for name in golden.missing:
            print(f"no {name} in {args.folder}: its outputs are not compared")
        results = list(golden.compare())
        for result in results:
            print(result)
        compared = [result for result in results if not result.not_checked]
        failed = sum(not result.passed for result in compared)
        skipped = len(results) - len(compared)
        print(f"{len(compared)} tensors compared, {failed} failed" + (f", {skipped} not checked" if skipped else ""))
        return 1 if failed or skipped or not compared else 0

    return run_main(check)


if __name__ == "__main__":
    sys.exit(main())
