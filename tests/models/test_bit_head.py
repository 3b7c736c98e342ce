"""The bit head: independent bits at first, the law of dependent bits once trained, and samples from that law."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from instella_ray.models.bit_head import BitHead
from instella_ray.models.checkpoint import load_expected, save_model
from instella_ray.models.diffusion import ar_loss
from instella_ray.models.generator import ARGenerator, GeneratorConfig
from instella_ray.models.sampling import SamplingParams, ar_step

WIDTH, BITS, HIDDEN = 6, 3, 8
WORDS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * BITS)


def head(trained: bool = True) -> BitHead:
    torch.manual_seed(0)
    made = BitHead(WIDTH, BITS, HIDDEN)
    if trained:
        torch.nn.init.normal_(made.bits_out)
    return made


def word_probabilities(head: BitHead, logits: Tensor, x: Tensor) -> Tensor:
    """Probability of each of :data:`WORDS` by teacher forcing, for one hidden state."""
    rows = len(WORDS)
    forced = head(logits.expand(rows, 1, -1), x.expand(rows, 1, -1), WORDS[:, None])[:, 0]
    return torch.where(WORDS > 0.5, forced, -forced).sigmoid().prod(1)


def test_it_starts_with_independent_bits() -> None:
    logits, x = torch.randn(2, 4, BITS), torch.randn(2, 4, WIDTH)
    bits = torch.randint(0, 2, (2, 4, BITS)).float()
    assert torch.equal(head(trained=False)(logits, x, bits), logits)


def test_no_bit_sees_itself_or_a_later_one() -> None:
    made, logits, x = head(), torch.randn(1, 1, BITS), torch.randn(1, 1, WIDTH)
    for bit in range(BITS):
        same = WORDS[(WORDS[:, :bit] == 1).all(1)]  # all words with the same bits before
        found = made(logits, x, same[:, None])[:, 0, bit]
        torch.testing.assert_close(found, found[:1].expand(len(same)))


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_samples_follow_the_law_that_training_fits(guidance_scale: float) -> None:
    made, count = head(), 20_000
    logits, x = torch.randn(2, BITS), torch.randn(2, WIDTH)
    outputs = torch.cat((logits, made.context(x)), dim=-1)
    rows = outputs[:, None].expand(-1, count, -1)
    params = SamplingParams.of(count, guidance_scale=guidance_scale, temperature=1.0)
    u = torch.rand(count, BITS, generator=torch.Generator().manual_seed(1))
    uncond = rows[1] if guidance_scale else None
    bits, probabilities = ar_step(rows[0], uncond, params, u, made)
    found = torch.bincount((bits @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=len(WORDS)) / count
    forced = made(
        logits[:, None].expand(-1, len(WORDS), -1), x[:, None].expand(-1, len(WORDS), -1), WORDS[None].expand(2, -1, -1)
    )
    guided = (1 + guidance_scale) * forced[0] - guidance_scale * forced[1]
    expected = torch.where(WORDS > 0.5, guided, -guided).sigmoid().prod(1)
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    # Five standard deviations of a share.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert torch.equal(bits, (u < probabilities).float())


def test_it_learns_bits_that_depend_on_each_other() -> None:
    """Of two equal bits, fair together, an output layer alone knows nothing: ln 2 nats a bit."""
    torch.manual_seed(0)
    made, bias = head(trained=False), torch.zeros(BITS, requires_grad=True)
    optimizer = torch.optim.Adam([*made.parameters(), bias], 0.05)
    first = torch.randint(0, 2, (256, 1, 1)).float()
    bits, x = first.expand(-1, -1, BITS), torch.zeros(256, 1, WIDTH)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ar_loss(made(bias.expand_as(bits), x, bits), bits)
        loss.backward()
        optimizer.step()
    assert loss < 0.26  # ln 2 / 3: only the first bit remains a guess
    torch.testing.assert_close(
        word_probabilities(made, bias[None], x[:1, 0]).detach()[[0, -1]], torch.tensor([0.5, 0.5]), atol=0.05, rtol=0
    )


@torch.no_grad()
def test_a_saved_model_has_it(tmp_path: Path) -> None:
    sizes = {"num_tokens": 2, "bits_per_token": BITS, "width": 8, "layers": 1, "heads": 1, "text_width": 4}
    model = ARGenerator(GeneratorConfig(kind="ar", bit_head_width=HIDDEN, **sizes)).eval()
    assert model.bit_head is not None
    torch.nn.init.normal_(model.bit_head.bits_out)
    save_model(tmp_path, model)
    loaded = load_expected(str(tmp_path), ARGenerator)
    text = model.text_kv(torch.randn(1, 3, 2, 4), torch.ones(3, 2, dtype=torch.bool))
    bits = torch.randint(0, 2, (3, 2, BITS)).float()
    assert torch.equal(loaded(bits[:, :-1], text, bits), model(bits[:, :-1], text, bits))


def test_only_ar_has_one() -> None:
    with pytest.raises(ValidationError, match="only kind ar has a bit head"):
        GeneratorConfig(bit_head_width=8)
    assert not any(
        "bit_head" in name for name in ARGenerator(GeneratorConfig(kind="ar", width=8, heads=1)).state_dict()
    )
