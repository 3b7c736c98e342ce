"""Model folders: what was saved comes back, and a folder that is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from instella_ray.errors import UserError
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.checkpoint import check_weights, load_model, parse_model, save_model, weight_hash

from ..kit.models import RESAMPLING_BIT


def test_saved_models_come_back_equal_with_the_same_hash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bit = BIT(RESAMPLING_BIT)
    ema = {name: value + 1 for name, value in bit.state_dict().items()}
    save_model(tmp_path, bit, ema=ema)
    assert weight_hash(tmp_path, ema=False) == weight_hash(bit)
    averaged = load_model(tmp_path)
    assert weight_hash(tmp_path) == weight_hash(averaged) != weight_hash(bit)
    assert not averaged.training and averaged.cfg == bit.cfg


@pytest.mark.parametrize("content", [None, "a: 1"])
def test_a_folder_without_a_model_is_named(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["model: 3", "model: [", "[1, 2]", "model: {kind: bit, patch_size: "])
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    save_model(tmp_path, BIT(RESAMPLING_BIT))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.yaml[^\n]*$"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_head": 2}, "unknown key 'encoder_head', did you mean 'encoder_heads'"),
        ({"encoder_heads": 0}, "'encoder_heads' = 0: Input should be greater than or equal to 1"),
        ({"decoder_layers": "many"}, "'decoder_layers' = 'many'"),
        ({"rope_axes": [2, 2, 2]}, r"must equal sum\(rope_axes\) = 6"),
        ({"kind": "diffusion"}, "unknown key"),
        ({"kind": "vae"}, "'kind' = 'vae'"),
    ],
)
def test_a_key_that_cannot_be_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model(tmp_path, BIT(RESAMPLING_BIT))
    config = {"model": {**RESAMPLING_BIT.model_dump(mode="json"), **change}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.yaml: [^\n]*{message}[^\n]*$"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_a_weight_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    bit = BIT(RESAMPLING_BIT)
    save_model(tmp_path, bit, ema=bit.state_dict())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-100])
    for read in (load_model, weight_hash):
        with pytest.raises(UserError, match=rf"^{path}: not a complete safetensors file[^\n]*$"):
            read(tmp_path, ema=name.startswith("ema"))
    if name.startswith("ema"):
        with pytest.raises(UserError, match=rf"^{path}: not a complete safetensors file[^\n]*$"):
            check_weights(tmp_path)


def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    bit = BIT(RESAMPLING_BIT)
    save_model(tmp_path, bit)
    path, state = tmp_path / "model.safetensors", bit.state_dict()
    for change, message in (
        ({"decoder.mask_tokens": torch.zeros(1, 1, 8)}, r"decoder.mask_tokens has shape \(1, 1, 8\), .* \(1, 1, 16\)$"),
        ({"more": torch.zeros(1), "most": torch.zeros(1)}, r"tensor more is not part of the model \(and 1 more\)$"),
        ({"quantizer.embed": None}, "no tensor quantizer.embed$"),
    ):
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        for read in (load_model, check_weights):
            with pytest.raises(UserError, match=rf"^{path}: the weights do not fit the model: [^\n]*{message}"):
                read(tmp_path)


def test_a_tokenizer_that_names_an_option_that_is_gone_loads_where_it_was_off() -> None:
    section = BITConfig().model_dump()
    assert parse_model({**section, "repa_layer": None, "repa_width": 384}) == BITConfig()
    with pytest.raises(UserError, match="unknown key 'repa_layer'"):
        parse_model({**section, "repa_layer": 3, "repa_width": 384})
