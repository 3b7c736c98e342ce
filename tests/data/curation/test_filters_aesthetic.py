"""The aesthetic filter is open_clip's unit embedding through LAION's heads. The networks and heads have random weights
drawn on the spot, as the real ones cannot be had everywhere: what is checked is the arithmetic and how files are read."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from instella_ray.data.curation.filters.aesthetic import Aesthetic, read_head
from instella_ray.data.scenes import render, scene_at
from instella_ray.errors import UserError
from instella_ray.models.clip import load_clip

from ...kit.shards import IMAGE_SIZES

open_clip = pytest.importorskip("open_clip", reason="the extra 'curate' is not installed")
WIDTH = 16


def linear() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(WIDTH, 1)


def deep() -> nn.Module:
    """As the improved predictor is written: numbers with gaps, for its dropouts."""
    torch.manual_seed(3)
    widths = [WIDTH, 1024, 128, 64, 16, 1]
    layers = [nn.Linear(into, out) for into, out in pairwise(widths)]
    dropout = nn.Dropout(0.2)
    return nn.ModuleDict(
        {"layers": nn.Sequential(layers[0], dropout, layers[1], dropout, layers[2], dropout, *layers[3:])}
    ).eval()


def apply(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return head["layers"](x) if isinstance(head, nn.ModuleDict) else head(x)


def saved(path: Path, state: dict[str, Any]) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("make", [linear, deep])
def test_the_score_is_the_head_of_open_clips_unit_embedding(
    tiny_clip: tuple[str, str], tmp_path: Path, make: Any, suffix: str
) -> None:
    name, weights = tiny_clip
    images = [Image.fromarray(render(scene_at(0, index), 64)) for index in range(3)]
    network, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    with torch.no_grad():
        embeddings = network.eval().encode_image(torch.stack([preprocess(image) for image in images]))
        expected = apply(make(), embeddings / embeddings.norm(dim=1, keepdim=True))[:, 0].tolist()
    filter = Aesthetic(model=name, weights=weights, head=saved(tmp_path / f"head{suffix}", make().state_dict()))
    filter.check()
    scores = [found["aesthetic"] for found in filter.load("cpu")(images)]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(set(scores)) == 3


def test_any_image_gets_the_same_score_alone_and_in_a_batch(tiny_clip: tuple[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in IMAGE_SIZES]
    head = saved(tmp_path / "head.pth", linear().state_dict())
    score = Aesthetic(model=tiny_clip[0], weights=tiny_clip[1], head=head).load("cpu")
    together = [found["aesthetic"] for found in score(images)]
    assert together == pytest.approx([score([image])[0]["aesthetic"] for image in images], abs=1e-5)
    assert np.isfinite(together).all()


def test_a_score_under_the_minimum_is_the_reason() -> None:
    filter = Aesthetic(head="x", minimum=5)
    assert filter.reason({"aesthetic": 4.99}) == "aesthetic" and filter.reason({"aesthetic": 5}) is None


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_head_that_is_code_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "run"), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"filters.aesthetic.head .*head.pth: refused, not a file of plain tensors"):
        read_head(str(tmp_path / "head.pth"), "filters.aesthetic")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(1, 16)},
        {"weight": torch.zeros(2, 16), "bias": torch.zeros(2)},
        {"weight": torch.zeros(()), "bias": torch.zeros(1)},
        {"mean": torch.zeros(1, 16), "bias": torch.zeros(1)},
        {
            "0.weight": torch.zeros(8, 16),
            "0.bias": torch.zeros(8),
            "1.weight": torch.zeros(1, 8),
            "1.bias": torch.zeros(1),
        },
    ],
)
def test_tensors_that_are_neither_kind_of_head_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"expected weight and bias of one layer D-1 \(V1\), or of D-1024-128-64-16-1"):
        read_head(saved(tmp_path / "head.pth", state), "filters.aesthetic")


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_files_that_are_no_tensors_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=f"{name}: refused, not a file of plain tensors"):
        read_head(str(tmp_path / name), "filters.aesthetic")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = {"weight": torch.full((1, WIDTH), torch.nan), "bias": torch.zeros(1)}
    with pytest.raises(UserError, match="not finite"):
        read_head(saved(tmp_path / "head.pth", state), "filters.aesthetic")


def test_what_is_missing_or_does_not_fit_is_named_at_the_start(
    tiny_clip: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, weights = tiny_clip
    head = saved(tmp_path / "head.pth", linear().state_dict())
    wide = saved(tmp_path / "wide.pth", nn.Linear(768, 1).state_dict())
    for given, message in [
        ({"head": str(tmp_path / "none.pth")}, "none.pth: no such file"),
        ({"head": wide}, "wide.pth: for embeddings of size 768; expected 16, of tiny-test"),
        ({"model": "ViT-other"}, "filters.aesthetic: open_clip has no model 'ViT-other'"),
        ({"weights": "nowhere.pt"}, "filters.aesthetic: weights nowhere.pt: expected a local file or"),
    ]:
        with pytest.raises(UserError, match=message):
            Aesthetic(**{"model": name, "weights": weights, "head": head} | given).check()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"^filters.aesthetic: .*instella-ray\[curate\]"):
        Aesthetic(head=head).check()


def test_a_tag_that_cannot_be_fetched_is_one_line_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError("no route to host\nand ten lines of advice")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    head = saved(tmp_path / "wide.pth", nn.Linear(768, 1).state_dict())
    with pytest.raises(UserError) as told:
        Aesthetic(head=head).check()
    assert str(told.value) == "filters.aesthetic: cannot load ViT-L-14 from openai (no route to host)"


def test_weights_of_a_tag_get_the_activation_that_they_were_trained_with(
    tiny_clip: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, weights = tiny_clip
    tags = {"quick": {"file": weights, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    image = [Image.fromarray(render(scene_at(0, 0), 64))]

    def embedded(**given: Any) -> np.ndarray:
        network, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights, **given)
        with torch.no_grad():
            return network.eval().encode_image(preprocess(image[0])[None], normalize=True).numpy()

    ours = load_clip(name, "quick", asker="test", extra="curate").embed_images(image)
    np.testing.assert_allclose(ours, embedded(force_quick_gelu=True), atol=1e-6)
    assert np.abs(ours - embedded()).max() > 1e-4
