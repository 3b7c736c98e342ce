"""The FLOP model agrees with PyTorch's own counter on the real networks, and with the figures that are published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from instella_ray import flops
from instella_ray.flops import AMD_OLMO_1B, TextEncoderSizes, TrainingFlops
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig, build_generator
from instella_ray.models.joint_attention import JointCache

from .kit.models import BIT_SIZES

TOKENIZERS = {
    "paper": BITConfig(),
    "one-hot": BITConfig(**BIT_SIZES, downsample_after=(1,), upsample_after=(0,), quantizer="one_hot"),
    "no resampling": BITConfig(**BIT_SIZES, downsample_after=(), upsample_after=(), token_positions=True),
    "two merges, conv": BITConfig(
        **BIT_SIZES,
        downsample_after=(0, 2),
        upsample_after=(1, 3),
        resample="conv",
        pixel_head="conv",
        normalize_logits=True,
    ),
}
SMALL = GeneratorConfig(num_tokens=12, bits_per_token=20, width=96, layers=3, heads=4, text_width=40)
GENERATORS = {
    "paper, diffusion": GeneratorConfig(),
    "paper, AR": GeneratorConfig(kind="ar"),
    "small, diffusion": SMALL,
    "one linear layer of the timestep": SMALL.model_copy(update={"time_layers": 1, "position_place": "block"}),
    "last layer of the text": SMALL.model_copy(update={"text_layers": "last", "target": "x0"}),
    "small, AR": SMALL.model_copy(update={"kind": "ar"}),
    "layer norm": SMALL.model_copy(update={"kind": "ar", "norm": "layer", "position_place": "block"}),
    "bit head": SMALL.model_copy(update={"kind": "ar", "bit_head_width": 24}),
}


def counted(run: Callable[[], Any]) -> float:
    """FLOP of ``run``, by PyTorch. Plain attention: the counter knows no CPU kernel of the fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def on_meta(build: Callable[[], nn.Module]) -> Any:
    """A network without memory: its shapes are all that is counted."""
    with torch.device("meta"):
        return build()


def forward(model: DiffusionGenerator | ARGenerator, text_tokens: int, batch: int) -> Tensor:
    cfg = model.cfg
    with torch.device("meta"):
        features = torch.zeros(cfg.layers, batch, text_tokens, cfg.text_width)
        text = model.text_kv(features, torch.ones(batch, text_tokens, dtype=torch.bool))
        codes = torch.zeros(batch, cfg.num_tokens, cfg.bits_per_token)
        if isinstance(model, DiffusionGenerator):
            return model(codes, torch.rand(batch), text)
        return model(codes[:, :-1], text, codes)


@pytest.mark.parametrize("cfg", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_cost_what_pytorch_counts_at_any_size(cfg: BITConfig) -> None:
    bit = on_meta(lambda: BIT(cfg)).eval()
    height, width = 2 * cfg.image_size, cfg.image_size // 2
    images = torch.zeros(3, 3, height, width, device="meta")
    codes = torch.zeros(3, cfg.num_tokens, cfg.bits_per_token, device="meta")
    words = flops.linear(2**cfg.bits_per_token, 16, 16) if cfg.quantizer == "one_hot" else 0
    assert 3 * flops.bit_encode(cfg, height, width).forward + words == counted(lambda: bit.encode(images))
    assert 3 * flops.bit_decode(cfg, height, width).forward + words == counted(lambda: bit.decode(codes, height, width))


@pytest.mark.parametrize("cfg", TOKENIZERS.values(), ids=TOKENIZERS)
def test_training_a_tokenizer_costs_what_pytorch_counts(cfg: BITConfig) -> None:
    bit = on_meta(lambda: BIT(cfg)).train()
    size = cfg.image_size
    images = torch.zeros(2, 3, size, size, device="meta")

    def step(output: int) -> None:
        out = bit(images, temperature=0.5, height=output, width=output)
        out.images.sum().backward()

    # Of one-hot words, which are computed once a batch, no gradient is asked here.
    words = flops.linear(2**cfg.bits_per_token, 16, 16) if cfg.quantizer == "one_hot" else 0
    assert counted(lambda: step(2 * size)) == 2 * flops.tokenizer_training(cfg, size, 2 * size).model + words
    bit.encoder.requires_grad_(False)
    # The quantizer learns with the decoder; its one small matrix is counted with the encoder.
    frozen = flops.tokenizer_training(cfg, size, size, frozen_encoder=True)
    assert counted(lambda: step(size)) == pytest.approx(2 * frozen.model, rel=0.01)


@pytest.mark.parametrize("cfg", GENERATORS.values(), ids=GENERATORS)
def test_generators_cost_what_pytorch_counts(cfg: GeneratorConfig) -> None:
    text_tokens = 48
    model = on_meta(lambda: build_generator(cfg))
    step = flops.generator_training(cfg, text_tokens)
    assert counted(lambda: forward(model, text_tokens, 3)) == 3 * step.forward
    assert counted(lambda: forward(model, text_tokens, 3).sum().backward()) == 3 * step.model
    again = flops.generator_training(cfg, text_tokens, gradient_checkpointing=True)
    assert again.hardware == step.hardware + step.forward and again.model == step.model == step.hardware


@pytest.mark.parametrize("cfg", GENERATORS.values(), ids=GENERATORS)
def test_a_sampling_step_costs_what_pytorch_counts(cfg: GeneratorConfig) -> None:
    rows, text_tokens = 6, 48
    model = on_meta(lambda: build_generator(cfg)).bfloat16()
    with torch.device("meta"), torch.no_grad():
        features = torch.zeros(cfg.layers, rows, text_tokens, cfg.text_width)
        text = model.text_kv(features, torch.ones(rows, text_tokens, dtype=torch.bool))
        cache = JointCache.of(text, cfg.num_tokens)
        codes = torch.zeros(rows, cfg.num_tokens, cfg.bits_per_token, dtype=torch.bfloat16)
        position = torch.zeros(rows, dtype=torch.int64)
        if isinstance(model, DiffusionGenerator):
            modulations = model.modulations(torch.zeros(rows, dtype=torch.bfloat16))
            found = counted(lambda: model(codes, None, cache, modulations))
        else:
            found = counted(lambda: model.step(codes[:, 0], position, cache))
    work = flops.generator_pass(cfg, rows, text_tokens, 2)
    assert work.flop == found
    # What does not grow with the rows is the weights; the rest is keys and values, read and in part written.
    more = flops.generator_pass(cfg, 2 * rows, text_tokens, 2).bytes - work.bytes
    written = cache.keys[0][:, :, : cfg.num_tokens if cfg.kind == "diffusion" else 1].nbytes * 2 * cfg.layers
    assert more == sum(part.nbytes for part in (*cache.keys, *cache.values)) + written
    used = ("q_proj", "k_proj", "v_proj", "o_proj", "ff", "mlp", "x_embedder", "proj_out", "bit_head")
    weights = sum(p.nbytes for n, p in model.named_parameters() if p.ndim == 2 and any(part in n for part in used))
    assert work.bytes - more == weights


def test_a_device_is_bound_by_what_takes_it_longer() -> None:
    chip = flops.ACCELERATORS["h200"]
    assert chip.least_seconds(flops.DeviceWork(chip.peak, 0.5 * chip.bandwidth)) == (1.0, "compute")
    assert chip.least_seconds(flops.DeviceWork(chip.peak, 2 * chip.bandwidth)) == (2.0, "memory")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("olmo", {"intermediate_size": 96}),
        ("llama", {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 24}),
        ("bert", {"intermediate_size": 96}),
        ("gpt2", {}),
    ],
)
def test_text_encoders_cost_what_pytorch_counts(kind: str, options: dict[str, int]) -> None:
    from transformers import AutoConfig, AutoModel

    cfg = AutoConfig.for_model(
        kind,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=60,
        attn_implementation="sdpa",
        **options,
    )
    model = AutoModel.from_config(cfg)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    sizes = TextEncoderSizes.of(model)
    assert sizes.parameters == sum(p.numel() for p in model.parameters()) and (sizes.layers, sizes.width) == (3, 32)
    with torch.no_grad():
        measured = counted(lambda: model(input_ids=torch.ones(2, 20, dtype=torch.long)))
    # Rotary tables of some architectures are a product too, of a thousandth.
    assert 2 * flops.text_encoder_forward(sizes, 20) == pytest.approx(measured, rel=0.01)
    assert TextEncoderSizes.of(model, 2).matrix_weights * 3 == sizes.matrix_weights * 2


def test_the_papers_text_encoder_has_the_sizes_that_its_architecture_gives() -> None:
    from transformers import OlmoConfig, OlmoModel

    sizes = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192}
    assert TextEncoderSizes.of(on_meta(lambda: OlmoModel(OlmoConfig(**sizes, vocab_size=50304)))) == AMD_OLMO_1B


def test_the_papers_sample_costs_what_its_throughput_is_reckoned_with() -> None:
    """120 images a second on an MI300X are some 14 % of its peak with recomputation and encoding, 220 some 26 %."""
    model = GeneratorConfig()
    sample = flops.generator_training(model, 128, AMD_OLMO_1B, tokenizer=BITConfig(), gradient_checkpointing=True)
    assert sample.hardware == pytest.approx(1.55e12, rel=0.01) and sample.model == pytest.approx(1.29e12, rel=0.01)
    assert sample.frozen == pytest.approx((277 + 240) * 1e9, rel=0.01)
    peak = flops.ACCELERATORS["mi300x"].peak
    assert [round(rate * sample.hardware / peak, 2) for rate in (120, 220)] == [0.14, 0.26]
    # A cached text saves a fifth of a sampling step.
    step, text = flops.generator_forward(model, 128).forward, flops.generator_text(model, 128).forward
    assert (round(step / 1e9), round((step - text) / 1e9)) == (263, 211)


def test_work_adds_up() -> None:
    encode, decode = (work(BITConfig(), 512, 512) for work in (flops.bit_encode, flops.bit_decode))
    assert (encode + decode).forward == encode.forward + decode.forward
    assert (encode + decode).backward == pytest.approx(encode.backward + decode.backward)
    assert TrainingFlops(1, 2, 3, 4).model == 6 and TrainingFlops(1, 2, 3, 4).hardware == 10


def test_devices_are_known_by_the_names_that_pytorch_gives_them() -> None:
    names = {
        "AMD Instinct MI300X": 1307.4,
        "AMD Instinct MI355X OAM": 2516.6,
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-80GB": 312,
    }
    for name, peak in names.items():
        found = flops.find_accelerator(name)
        assert found and found.peak == peak * 1e12, name
    for name in ("AMD EPYC 9554 64-Core Processor", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090", "NVIDIA GH200 480GB"):
        assert flops.find_accelerator(name) is None
