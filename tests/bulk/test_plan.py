"""What a sampling job is to make: each sample has a number and a seed of its own, and a sweep every combination."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.bulk.plan import (
    SampleConfig,
    Sweep,
    own_sampling,
    own_size,
    plan_samples,
    sample_seed,
    settings_by_prompt,
)
from instella_ray.data.prompts import Prompt
from instella_ray.errors import UserError
from instella_ray.models.sampling import SamplingConfig

TEXTS = st.text(min_size=1, max_size=8)


@given(texts=st.lists(TEXTS, min_size=1, max_size=12), images=st.integers(1, 4), seed=st.integers(0, 2**62))
def test_a_sample_is_a_function_of_text_number_and_seed(texts: list[str], images: int, seed: int) -> None:
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    planned = list(plan_samples(prompts, images, seed))
    assert len(planned) == len(texts) * images
    assert all(s.seed == sample_seed(seed, s.prompt.text, s.index) and 0 <= s.seed < 2**63 for s in planned)
    # No two are the same image, not even where a text comes again, and the order of prompts changes no seed.
    assert len({s.seed for s in planned}) == len(planned)
    assert {s.seed for s in plan_samples(prompts[::-1], images, seed)} == {s.seed for s in planned}


def test_a_sweep_is_every_combination() -> None:
    base = SamplingConfig(temperature=0.5)
    assert Sweep().settings(base) == {"": base}
    found = Sweep(num_inference_steps=(5, 10), guidance_scale=(1.0, 2.5, 1.0)).settings(base)
    assert list(found) == [f"num_inference_steps={n}+guidance_scale={g}" for n in (5, 10) for g in (1.0, 2.5)]
    assert found["num_inference_steps=10+guidance_scale=2.5"] == SamplingConfig(
        num_inference_steps=10, guidance_scale=2.5, temperature=0.5
    )


def test_a_prompt_s_settings_count_for_it_alone() -> None:
    base = SamplingConfig(temperature=0.5, guidance_scale=3.0)
    plain, own = (
        Prompt("a", "x", meta={"settings": "of a table"}),
        Prompt("b", "y", meta={"settings": {"temperature": 0.8, "size": 64}}),
    )
    assert own_sampling(plain, base) is base and own_size(plain) is None
    assert own_sampling(own, base) == SamplingConfig(temperature=0.8, guidance_scale=3.0) and own_size(own) == 64
    cfg = SampleConfig(model="m", output="o")
    assert settings_by_prompt(cfg, "diffusion", [plain, own]) == ("size", "temperature")


@pytest.mark.parametrize(
    ("kind", "settings", "sweep", "message"),
    [
        (
            "diffusion",
            {"temprature": 1},
            {},
            "prompt 'a': settings: unknown key 'temprature', did you mean 'temperature'",
        ),
        ("diffusion", {"guidance_scale": "x"}, {}, "prompt 'a': settings: 'guidance_scale' = 'x'"),
        ("diffusion", {"size": 1.5}, {}, "prompt 'a': settings.size = 1.5: expected a number of pixels"),
        ("ar", {"num_inference_steps": 20}, {}, "settings.num_inference_steps: autoregressive models have none"),
        (
            "diffusion",
            {"temperature": 1},
            {"temperature": (0.5, 1.0)},
            "sweep.temperature: prompts scenes give it themselves",
        ),
    ],
)
def test_wrong_settings_of_a_prompt_are_one_line(kind: str, settings: object, sweep: object, message: str) -> None:
    cfg = SampleConfig.model_validate({"model": "m", "output": "o", "sweep": sweep})
    with pytest.raises(UserError, match=message):
        settings_by_prompt(cfg, kind, [Prompt("a", "x", meta={"settings": settings})])
