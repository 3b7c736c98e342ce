"""Projections of prompts: shared by requests with the same prompt, with the same bits, within a limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ..kit.engines import drain, engine, images, request


def features(number: int) -> torch.Tensor:
    return torch.randn(2, number % 7, 8, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_requests_with_the_same_prompt_share_its_projection_and_keep_their_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, other = engine(kind), engine(kind)
    calls, project = list[int](), e.slots.model.text_kv
    monkeypatch.setattr(e.slots.model, "text_kv", lambda *given: calls.append(1) or project(*given))  # type: ignore[func-returns-value]
    done, expected = {}, {}
    for number in range(12):  # four prompts, in slots that had other prompts before
        given = replace(request(number), features=features(number % 4))
        e.submit(replace(given, prompt=f"prompt {number % 4}"))
        other.submit(given)
        done.update(images(e))
        expected.update(images(other))
    done.update(drain(e))
    expected.update(drain(other))
    assert done.keys() == expected.keys() and all(torch.equal(done[name], expected[name]) for name in done)
    assert len(calls) == 4
    e.submit(replace(request(3), prompt=None))
    drain(e)
    assert len(calls) == 5 and len(e.slots.project.cache.items) == 4


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_the_cache_holds_the_latest_prompts_within_its_limit(kind: str) -> None:
    project = engine(kind).slots.project
    # Two blocks, keys and values, 32 numbers of 4 bytes, and the mask: 513 bytes a token of the prompt, not of the slot.
    size = project(features(3), "measured").nbytes
    assert size == 3 * 513 == project.cache.used
    project.cache.limit = 4 * size
    for number in range(40):
        project(features(3), f"prompt {number}")
        assert project.cache.used <= 4 * size
    assert list(project.cache.items) == [f"prompt {number}" for number in range(36, 40)]
    project.cache.limit = 0
    project(features(6), "larger than the limit")
    assert list(project.cache.items) == ["larger than the limit"]
