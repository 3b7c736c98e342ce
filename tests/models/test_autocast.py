"""Under autocast to bfloat16 every sigmoid, softmax, norm and loss has the gradients that it has in float32.

All inputs are representable in bfloat16, as a projection gives them. Where only a gradient is rounded, once, it is within
1/256 of the exact one; products of matrices round their factors too, and a network all of it several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.bit_layers import BinaryQuantizer, BITBlock, ConvPixelHead
from instella_ray.models.diffusion import ar_loss, diffusion_loss
from instella_ray.models.discriminator import DiscriminatorHeads, hinge_loss
from instella_ray.models.generator import GeneratorConfig, build_generator
from instella_ray.models.layers import (
    Attention,
    FeedForward,
    Modulation,
    RMSNorm,
    SwiGLU,
    TimestepEmbedding,
    modulated_norm,
)
from instella_ray.models.rope import apply_rope, rope_table
from instella_ray.training.adversarial import Adversary
from instella_ray.training.generator import ARLoss, DiffusionLoss
from instella_ray.training.losses import PerceptualConfig, ReconstructionLoss, TokenizerLossConfig
from instella_ray.training.tokenizer import TokenizerLoss

from ..kit.models import RESAMPLING_BIT, TINY_BIT
from ..kit.training import ADVERSARIAL, PLAIN_LOSS

ROUNDED = 2**-8
"""Relative error of one rounding to bfloat16, whose fractions have 8 bits."""
PRODUCT = 4 * ROUNDED
"""The same of products of matrices, with inputs, weights and gradients rounded."""
NETWORK = 0.03
"""The same of a whole network."""


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 can represent."""
    return (torch.randn(*shape) * scale).bfloat16().float()


def bits(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float()


def loss_of(result: Tensor, weights: Tensor) -> Tensor:
    """Any smooth loss: a sum with weights, which are the gradient at the result."""
    return (result.float() * weights).sum()


class Case:
    """A function of tensors and of a module's weights, whose value is a loss."""

    def __init__(
        self, loss: Callable[..., Tensor], inputs: Sequence[Tensor], module: nn.Module | None, error: float
    ) -> None:
        self.loss, self.inputs, self.module, self.error = loss, inputs, module, error

    def gradients(self, *, bf16: bool) -> list[Tensor]:
        """Gradients of inputs and weights; with ``bf16`` inputs are bfloat16, as under autocast a projection's are."""
        inputs = [each.detach().to(torch.bfloat16 if bf16 else torch.float32).requires_grad_() for each in self.inputs]
        weights = [p for p in self.module.parameters() if p.requires_grad] if self.module else []
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.loss(*inputs)
        assert loss.dtype == torch.float32
        return [each.float() for each in torch.autograd.grad(loss, [*inputs, *weights])]


def of_module(module: nn.Module, *inputs: Tensor, error: float) -> Case:
    with torch.no_grad():
        weights = draw(*module(*inputs).shape)
    return Case(lambda *given: loss_of(module(*given), weights), inputs, module, error)


def quantizer() -> Case:
    weights, u = draw(4, 6, 5), torch.rand(4, 6, 5)
    quantize = BinaryQuantizer(3, 5).quantize
    return Case(lambda logits: loss_of(quantize(logits, 0.5, u), weights), [draw(4, 6, 5, scale=3)], None, ROUNDED)


def normalized_logits() -> Case:
    module, weights = BinaryQuantizer(8, 5, normalized_tokens=6).train(), draw(16, 6, 5)
    module.embed.requires_grad_(False)
    # The gradient of a batch norm is a small difference of larger ones, and that of the projection's bias is 0.
    module.proj.requires_grad_(False)
    return Case(lambda tokens: loss_of(module.logits(tokens), weights), [draw(16, 6, 8)], None, PRODUCT)


def decided(bit: BIT) -> None:
    """Moves logits away from 0, where rounding would turn bits over and the code loss has no gradient."""
    bias = bit.quantizer.proj[0].bias
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        bias.copy_(3.0 - 6.0 * (torch.arange(len(bias)) % 2))


def code_loss() -> Case:
    bit = BIT(TINY_BIT.model_copy(update={"normalize_logits": False}))
    decided(bit)
    return Case(lambda images: bit(images, temperature=0.0).code_loss, [draw(4, 3, 32, 32)], None, NETWORK)


def norm() -> Case:
    module = RMSNorm(16)
    nn.init.normal_(module.weight, 1, 0.2)
    return of_module(module, draw(8, 16, scale=3), error=PRODUCT)  # rounded before and after the weights


def adaptive_norm() -> Case:
    weights = draw(4, 6, 16)
    inputs = [draw(4, 6, 16), draw(4, 1, 16, scale=0.01), draw(4, 1, 16)]
    return Case(
        lambda x, scale, shift: loss_of(modulated_norm(x.float(), scale, shift), weights), inputs, None, ROUNDED
    )


def attention() -> Case:
    module, weights = Attention(16, 2), draw(4, 6, 16)

    def attend(x: Tensor) -> Tensor:
        return loss_of(module.attend(module.query(x), *module.key_value(x)), weights)

    return Case(attend, [draw(4, 6, 16)], module, PRODUCT)


def rope() -> Case:
    table, weights = rope_table(2, 2, 2, (4, 2, 2), 16.0), draw(2, 2, 6, 8)
    return Case(lambda x: loss_of(apply_rope(x, table, "rotary"), weights), [draw(2, 2, 6, 8)], None, ROUNDED)


def block() -> Case:
    module, table = BITBlock(16, 2, "rotary"), rope_table(2, 2, 2, (4, 2, 2), 16.0)
    weights = draw(2, 6, 16)
    return Case(lambda x: loss_of(module(x.float(), table), weights), [draw(2, 6, 16)], module, PRODUCT)


def timestep() -> Case:
    """At timesteps that bfloat16 cannot represent."""
    module, weights, t = TimestepEmbedding(16), draw(8, 16), torch.linspace(0.9, 0.91, 8)
    return Case(lambda: loss_of(module(t), weights), [], module, 1e-6)


def diffusion() -> Case:
    z_t, z = bits(4, 6, 5), bits(4, 6, 5)
    return Case(lambda out: diffusion_loss(out, z_t, z), [draw(4, 6, 5, scale=5)], None, ROUNDED)


def autoregressive() -> Case:
    z = bits(4, 6, 5)
    return Case(lambda out: ar_loss(out, z), [draw(4, 6, 5, scale=5)], None, ROUNDED)


def pixels(reconstruction: str) -> Case:
    cfg = TokenizerLossConfig.model_validate(
        {"reconstruction": reconstruction, "gradient_weight": 0.5, "perceptual": {"network": "none"}}
    )
    module, targets = ReconstructionLoss(cfg), torch.rand(2, 3, 16, 16) * 2 - 1
    return Case(lambda images: module(images, targets, torch.zeros(2, 2))[0], [draw(2, 3, 16, 16)], None, ROUNDED)


def perceptual() -> Case:
    look = PerceptualConfig(network="vgg", weights="random", size=32, crop=16)
    module = ReconstructionLoss(TokenizerLossConfig(perceptual=look))
    targets = draw(2, 3, 32, 32)
    return Case(lambda images: module(images, targets, torch.zeros(2, 2))[0], [draw(2, 3, 32, 32)], None, NETWORK)


def hinge() -> Case:
    return Case(lambda a, b: hinge_loss(a.float(), b.float()), [draw(4, 8), draw(4, 8)], None, ROUNDED)


def adversarial() -> Case:
    adversary = Adversary(ADVERSARIAL, 1, 0)
    adversary.model.ratios.fill_(1.0)
    adversary.before_step(5, 0)
    targets, draws = draw(2, 3, 32, 32), torch.rand(2, 9)
    last = torch.ones(1, requires_grad=True)

    def loss(images: Tensor) -> Tensor:
        return adversary.add_loss((last.sum() * 0).float(), images.float() * last, targets, draws, last)[0]

    return Case(loss, [draw(2, 3, 32, 32)], None, NETWORK)


def discriminator() -> Case:
    adversary = Adversary(ADVERSARIAL, 1, 0)
    images, targets, draws = draw(2, 3, 32, 32), draw(2, 3, 32, 32), torch.rand(2, 9)
    module = adversary.step_module
    return Case(lambda: module(images, targets, draws)[0], [], module, NETWORK)


def generator(kind: str) -> Case:
    cfg = GeneratorConfig.model_validate(
        {"kind": kind, "num_tokens": 8, "bits_per_token": 6, "width": 32, "layers": 3, "heads": 2, "text_width": 16}
    ).model_copy(update={"zero_init": False})
    model = build_generator(cfg)
    module = DiffusionLoss(model) if kind == "diffusion" else ARLoss(model)  # type: ignore[arg-type]
    codes, mask, seeds = bits(4, 8, 6), torch.ones(4, 5, dtype=torch.bool), torch.arange(4)
    return Case(lambda features: module(codes, features, mask, seeds)[0], [draw(3, 4, 5, 16)], module, NETWORK)


def tokenizer(cfg: BITConfig) -> Case:
    module = TokenizerLoss(BIT(cfg).train(), PLAIN_LOSS)
    decided(module.bit)
    images = draw(8, 3, 32, 32)
    return Case(lambda: module(images, images, torch.arange(8), 0.0)[0], [], module, NETWORK)


CASES: dict[str, Callable[[], Case]] = {
    "quantizer": quantizer,
    "normalized logits": normalized_logits,
    "code loss": code_loss,
    "RMS norm": norm,
    "adaptive layer norm": adaptive_norm,
    "group norm": lambda: of_module(nn.GroupNorm(2, 8), draw(4, 8, 3, 3), error=PRODUCT),
    "attention": attention,
    "rope": rope,
    "tokenizer block": block,
    "SwiGLU": lambda: of_module(SwiGLU(16, 32), draw(8, 16), error=PRODUCT),
    "feed-forward": lambda: of_module(FeedForward(16), draw(8, 16), error=PRODUCT),
    "timestep embedding": timestep,
    "modulation": lambda: of_module(Modulation(16, 6), draw(8, 16), error=PRODUCT),
    "convolutional pixels": lambda: of_module(ConvPixelHead(32, 4), draw(2, 32, 4, 4), error=NETWORK),
    "discriminator heads": lambda: of_module(_OneMap(DiscriminatorHeads(8, 1, 8)), draw(2, 8, 4, 4), error=NETWORK),
    "diffusion loss": diffusion,
    "AR loss": autoregressive,
    "smooth L1 loss": lambda: pixels("smooth_l1"),
    "squared error": lambda: pixels("mse"),
    "perceptual loss": perceptual,
    "hinge loss": hinge,
    "adversarial loss": adversarial,
    "discriminator loss": discriminator,
    "diffusion generator": lambda: generator("diffusion"),
    "AR generator": lambda: generator("ar"),
    "tokenizer": lambda: tokenizer(RESAMPLING_BIT),
}


class _OneMap(nn.Module):
    def __init__(self, heads: DiscriminatorHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, maps: Tensor) -> Tensor:
        return self.heads([maps])


@pytest.mark.parametrize("name", CASES)
def test_gradients_under_autocast_are_those_of_float32(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    exact, half = (torch.cat([each.flatten() for each in case.gradients(bf16=bf16)]) for bf16 in (False, True))
    assert exact.norm() > 0
    error = float((half - exact).norm() / exact.norm())
    assert error <= case.error, f"{error:.4f}"


@pytest.mark.parametrize("size", [0.5, 5.0, 6.5, 8.0, 12.0])
def test_set_and_cleared_bits_learn_alike(size: float) -> None:
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for z in (1.0, 0.0):
            logit = torch.tensor([size if z else -size], dtype=torch.bfloat16, requires_grad=True)
            bit = BinaryQuantizer(1, 1).quantize(logit, 0.5, torch.full((1,), 0.5))
            assert bit.tolist() == [z]
            loss = torch.stack((bit.sum(), ar_loss(logit, torch.tensor([z])), ar_loss(logit, torch.tensor([1 - z]))))
            found.append([float(torch.autograd.grad(each, logit, retain_graph=True)[0]) for each in loss])
    (set_bit, *right), (cleared, *wrong) = found
    assert set_bit > 0 and set_bit == pytest.approx(cleared, rel=0.015)
    assert right == pytest.approx([-value for value in wrong], rel=0.015)


def test_attention_of_a_training_step_is_computed_in_float32_on_cpus() -> None:
    module = Attention(16, 2)
    nn.init.eye_(module.o_proj.weight)
    q, k, v = (draw(4, 2, 6, 8).bfloat16().requires_grad_() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        made = module.attend(q, k, v)
    exact = module.attend(q.float(), k.float(), v.float())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, exact.bfloat16(), atol=0, rtol=0)


def test_bits_are_exact_under_autocast() -> None:
    module, x = BinaryQuantizer(32, 64, normalized_tokens=8).train(), torch.randn(16, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module.logits(x)
        bits = module.quantize(logits, 0.5, torch.rand(logits.shape))
    assert logits.dtype == bits.dtype == torch.float32
    assert set(bits.unique().tolist()) == {0.0, 1.0}


def test_small_scales_and_residuals_are_not_rounded_away() -> None:
    x, scale = torch.randn(4, 6, 16), torch.full((4, 1, 16), 2.0**-10)
    with torch.autocast("cpu", torch.bfloat16):
        changed = modulated_norm(x, scale.bfloat16(), torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(changed, modulated_norm(x, scale, torch.zeros(1)))
    model = build_generator(GeneratorConfig(num_tokens=4, bits_per_token=6, width=32, layers=2, heads=2, text_width=16))
    dtypes = []
    for each in model.transformer_blocks:
        each.register_forward_pre_hook(lambda _module, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        text = model.text_kv(torch.zeros(2, 1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
        model(bits(1, 4, 6), torch.rand(1), text)  # type: ignore[call-arg, arg-type]
    assert dtypes == [torch.float32] * 2
