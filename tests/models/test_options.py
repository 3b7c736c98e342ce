"""Options in which paper and release differ: each computes what is written, is trained, kept in files and sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from instella_ray.engine.engine import Request
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import CONFIG, load_model, save_model
from instella_ray.models.diffusion import diffusion_loss, x0_logits
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from instella_ray.models.joint_attention import JointCache
from instella_ray.models.layers import LayerNorm
from instella_ray.models.sampling import SAMPLERS, SamplingParams, diffusion_step, generate
from instella_ray.training.generator_loss import ARLoss, DiffusionLoss

from ..kit.engines import drain

SIZES = {"num_tokens": 6, "bits_per_token": 5, "width": 16, "layers": 2, "heads": 2, "text_width": 12}
DIFFUSION: dict[str, Any] = {"time_layers": 1, "position_place": "block", "text_layers": "last", "target": "x0"}
AR: dict[str, Any] = {"norm": "layer", "position_place": "block", "text_layers": "last"}
EACH = [*(("diffusion", {name: value}) for name, value in DIFFUSION.items())]
EACH += [*(("ar", {name: value}) for name, value in AR.items()), ("diffusion", DIFFUSION), ("ar", AR)]
every_option = pytest.mark.parametrize(("kind", "options"), EACH, ids=lambda given: str(given))


def make(kind: str, **options: Any) -> DiffusionGenerator | ARGenerator:
    torch.manual_seed(0)
    model = build_generator(GeneratorConfig(kind=kind, **{"zero_init": False, **SIZES, **options}))
    with torch.no_grad():  # norms and biases begin with values that hide what becomes of them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, text features and their mask, whose first row has no text."""
    torch.manual_seed(1)
    mask = torch.arange(4)[None] >= 4 - torch.arange(rows)[:, None]
    return torch.randint(0, 2, (rows, 6, 5)).float(), torch.randn(2, rows, 4, 12), mask


def run(model: DiffusionGenerator | ARGenerator, z: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    text = model.text_kv(features, mask)
    if isinstance(model, ARGenerator):
        return model(z[:, :-1], text)
    return model(z, torch.linspace(0.1, 0.9, len(z)), text)


def joint(block: nn.Module, y: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Attention of ``y`` to the text and to itself, written out; both have 2 heads of 8."""
    attn = block.attn

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 8)).transpose(1, 2)

    both = torch.cat((block.proj_cond(text), y), dim=1)
    q, k, v = attn.norm_q(heads(attn.q_proj(y))), attn.norm_k(heads(attn.k_proj(both))), heads(attn.v_proj(both))
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, float("-inf"))
    return attn.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_two_blocks_of_ar_as_the_paper_writes_them() -> None:
    """Positions stay in the residual stream, norms are PyTorch's layer norm, all blocks read the last layer."""
    model, (z, features, mask) = make("ar", **AR), inputs()

    def norm(layer: LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), layer.weight, layer.bias, eps=1e-6)

    x = torch.cat((model.split_token.expand(3, -1, -1), model.x_embedder(z[:, :-1])), dim=1)
    seen = torch.cat((mask[:, None].expand(-1, 6, -1), torch.ones(6, 6).tril().bool().expand(3, -1, -1)), dim=2)[
        :, None
    ]
    for block in model.transformer_blocks:
        x = x + block.pos_emb[:, :6]
        x = x + joint(block, norm(block.input_layernorm, x), features[-1], seen)
        x = x + block.mlp(norm(block.post_attention_layernorm, x))
    torch.testing.assert_close(run(model, z, features, mask), model.proj_out(norm(model.norm_out, x)))


def test_two_blocks_of_diffusion_as_the_paper_writes_them() -> None:
    """One linear layer embeds t, positions stay in the residual stream."""
    model, (z, features, mask) = make("diffusion", time_layers=1, position_place="block"), inputs()
    time = torch.linspace(0.1, 0.9, 3)[:, None] @ model.time_embed.linear_1.weight.T + model.time_embed.linear_1.bias

    def modulations(layer: nn.Module) -> list[Tensor]:
        return list(layer.linear(F.silu(time))[:, None].chunk(layer.parts, dim=-1))

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift

    x, seen = model.x_embedder(z), torch.cat((mask, torch.ones(3, 6, dtype=torch.bool)), dim=1)[:, None, None]
    for block, layer in zip(model.transformer_blocks, features, strict=True):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulations(block.norm1)
        x = x + block.pos_emb
        x = x + gate_1 * joint(block, norm(x, scale_1, shift_1), layer, seen)
        x = x + gate_2 * block.ff(norm(x, scale_2, shift_2))
    expected = model.proj_out(norm(x, *modulations(model.norm_out)))
    torch.testing.assert_close(run(model, z, features, mask), expected)


def test_layer_norm_is_pytorchs_in_every_precision() -> None:
    ours, theirs = LayerNorm(16), nn.LayerNorm(16, eps=1e-6)
    for norm in (ours, theirs):
        torch.manual_seed(0)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 + 5 * torch.randn(4, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    half = ours.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs(x.bfloat16().float()), atol=0.03, rtol=0.02)


@every_option
def test_every_parameter_gets_a_gradient_and_the_loss_falls(kind: str, options: dict[str, Any]) -> None:
    """Else DistributedDataParallel would wait for it."""
    model, (codes, features, mask) = make(kind, **options), inputs(8)
    loss = ARLoss(model) if isinstance(model, ARGenerator) else DiffusionLoss(model)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(40):
        value, _ = loss(codes, features, mask, torch.arange(8))
        value.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.8 * losses[0]


@every_option
def test_a_model_folder_keeps_the_option(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, given = make(kind, **options), inputs()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.cfg == model.cfg and not isinstance(loaded, BIT)
    assert torch.equal(run(loaded, *given), run(model, *given))


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_folder_from_before_the_options_is_the_model_that_it_was(kind: str, tmp_path: Path) -> None:
    model, given = make(kind), inputs()
    save_model(tmp_path, model)
    config = yaml.safe_load((tmp_path / CONFIG).read_text())
    for name in {**DIFFUSION, **AR}:
        del config["model"][name]
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config))
    loaded = load_model(tmp_path)
    assert loaded.cfg == model.cfg and not isinstance(loaded, BIT)
    assert torch.equal(run(loaded, *given), run(model, *given))


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"position_place": "block"}, {"text_layers": "last"}, AR])
def test_cached_ar_steps_equal_the_whole_prefix(options: dict[str, Any]) -> None:
    model, (z, features, mask) = make("ar", **options), inputs()
    assert isinstance(model, ARGenerator)
    text = model.text_kv(features, mask)
    cache = JointCache.of(text, 6)
    with torch.no_grad():
        steps = [model.step(z[:, max(i - 1, 0)], torch.full((3,), i), cache) for i in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), model(z[:, :-1], text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_both_targets_step_alike_from_the_same_posterior(sampler: str, temperature: float) -> None:
    """Given as the logits of z = 1, or of the flips that it is equal to."""
    torch.manual_seed(2)
    z, u = torch.randint(0, 2, (4, 6, 5)).float(), torch.rand(4, 6, 5)
    cond, uncond = torch.randn(2, 4, 6, 5)
    given = {"num_inference_steps": 5, "guidance_scale": 2.5, "temperature": temperature, "sampler": sampler}
    params, step = SamplingParams.of(4, final_draw=[False, True] * 2, **given), torch.tensor([0, 2, 4, 4])
    flips = [torch.where(z > 0.5, -logits, logits) for logits in (cond, uncond)]
    bits, x0_prob = diffusion_step(z, cond, uncond, step, params, u, "x0")
    same_bits, same_prob = diffusion_step(z, *flips, step, params, u, "flip")
    torch.testing.assert_close(x0_prob, same_prob, atol=1e-6, rtol=0)
    assert torch.equal(bits, same_bits)
    if temperature:
        torch.testing.assert_close(x0_prob, ((3.5 * cond - 2.5 * uncond) / temperature).sigmoid())
    clean = torch.randint(0, 2, z.shape).float()
    torch.testing.assert_close(diffusion_loss(cond, z, clean, "x0"), diffusion_loss(flips[0], z, clean, "flip"))
    torch.testing.assert_close(x0_logits(cond, z, "x0"), x0_logits(flips[0], z, "flip"))


@pytest.mark.parametrize(("target", "expected"), [("x0", 1), ("flip", 0)])
def test_samplers_engine_and_loss_follow_the_target_of_the_model(target: str, expected: int) -> None:
    """A network that is sure of a one: of a set bit, whatever the noise, or of a flip, which undoes itself."""
    model = make("diffusion", target=target)
    assert isinstance(model, DiffusionGenerator)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.constant_(model.proj_out.bias, 20.0)
    _, features, mask = inputs(2)
    params = SamplingParams.of(2, seed=[3, 4], num_inference_steps=2, guidance_scale=0.0)
    text = model.text_kv(features, mask)
    codes = generate(model, text, text, params)
    engine = build_engine(model, torch.zeros(2, 0, 12), EngineOptions(slots=2, text_length=4))
    for row in range(2):
        own = params.map(lambda value, row=row: value[row : row + 1])
        engine.submit(Request(str(row), features[:, row, mask[row]], own))
    done = drain(engine)
    assert all(torch.equal(codes[row], done[str(row)]) for row in range(2))
    assert bool(codes.all()) == bool(expected)
    clean = torch.ones(2, 6, 5)
    loss, parts = DiffusionLoss(model)(clean, features, mask, torch.arange(2))
    assert (float(parts["bit_accuracy"]) == 1) == (float(loss.detach()) < 1e-6) == bool(expected)


def test_all_blocks_read_the_last_layer_alone() -> None:
    _, features, mask = inputs()
    model = make("diffusion", text_layers="last")
    spoiled = torch.cat((torch.full_like(features, float("nan")), features[-1:]))  # of a deeper language model
    kv, alone = model.text_kv(spoiled, mask), model.text_kv(features[-1:], mask)
    for block, keys, same in zip(model.transformer_blocks, kv.keys, alone.keys, strict=True):
        expected = block.text_kv(features[-1].masked_fill(~mask[..., None], 0))[0]
        assert torch.equal(keys, expected) and torch.equal(same, expected)
    with pytest.raises(UserError, match="2 layers of width 5, expected any layers of width 12"):
        model.text_kv(torch.zeros(2, 1, 4, 5), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="3 layers of width 12, expected 2 layers"):
        make("diffusion").text_kv(spoiled, mask)


def test_the_last_layer_is_calibrated_for_every_block() -> None:
    model = make("ar", text_layers="last")
    features, mask = 7 + torch.tensor([9.0] + 11 * [1.0]) * torch.randn(2, 40, 9, 12), torch.ones(40, 9).bool()
    features[0] = float("nan")
    model.calibrate_text(features, mask, ridge=0.0)
    for block in model.transformer_blocks:
        out = block.proj_cond(features[-1]).flatten(0, 1)
        spread = torch.linalg.eigvalsh(out.T @ out / len(out)).flip(0)[:12]
        assert out.mean(0).abs().max() < 1e-4 and spread.min() > 0.99 and spread.max() < 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "diffusion", "norm": "layer"}, "norm layer: only kind ar has a choice of norms, expected rms"),
        ({"kind": "ar", "target": "x0"}, "target x0: only kind diffusion has a prediction target, expected flip"),
        ({"kind": "ar", "time_layers": 1}, "time_layers 1: only kind diffusion has a timestep embedding, expected 2"),
        ({"kind": "diffusion", "bit_head_width": 8}, "bit_head_width 8: only kind ar has a bit head, expected 0"),
    ],
)
def test_an_option_of_the_other_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GeneratorConfig(**options)
