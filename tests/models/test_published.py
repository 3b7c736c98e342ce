"""Published checkpoints: names and shapes at full size, conversion, and the recorded numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models import golden, published
from instella_ray.models.bit import BITConfig
from instella_ray.models.checkpoint import build_model, load_model, read_checkpoint_config, weight_hash
from instella_ray.models.generator import GeneratorConfig

FULL = {
    "bit": BITConfig(rope="published", resample="conv"),
    "diffusion": GeneratorConfig(kind="diffusion", zero_init=False, position_std=0.0),
    "ar": GeneratorConfig(kind="ar", zero_init=False, position_std=0.0, unused_time_embed=True),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_size_names_and_shapes_equal_the_published_lists(kind: str, shared_dir: Path) -> None:
    lines = (shared_dir / "reference" / f"keys_{kind}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    listed = {name: eval(shape, {"__builtins__": {}}) for name, shape, _ in rows}
    with torch.device("meta"):
        model = build_model(FULL[kind].model_dump())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == listed


def test_sizes_are_read_off_the_shapes() -> None:
    for kind, config in FULL.items():
        with torch.device("meta"):
            state = build_model(config.model_dump()).state_dict()
        read = published.bit_config_from_state if kind == "bit" else published.generator_config_from_state
        assert read(state) == config


def test_a_release_becomes_model_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "release"
    (source / "bae").mkdir(parents=True)
    from safetensors.torch import save_file

    # Head width 64 and the released block numbers, all else small.
    bit_config = BITConfig(
        **{
            **FULL["bit"].model_dump(),
            **{"encoder_width": 64, "encoder_heads": 1, "decoder_width": 64, "decoder_heads": 1, "num_tokens": 4},
        }
    )
    bit = build_model(bit_config.model_dump())
    save_file(bit.state_dict(), source / "bae" / "model.safetensors")
    ar_config = GeneratorConfig(kind="ar", num_tokens=4, bits_per_token=64, width=32, layers=2, heads=2, text_width=8)
    ar = build_model(ar_config.model_dump())
    torch.save({"module": ar.state_dict()}, source / "ar.pt")
    assert published.main([str(source), str(tmp_path / "out")]) == 0
    assert "research-only" in capsys.readouterr().err
    loaded = load_model(tmp_path / "out" / "ar")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ar.state_dict().items())
    config = read_checkpoint_config(tmp_path / "out" / "ar")
    assert config["tokenizer_hash"] == weight_hash(bit) == weight_hash(tmp_path / "out" / "bit")
    assert published.main([str(source), str(tmp_path / "out")]) == 2  # nothing is overwritten


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    torch.save({"module": Evil()}, tmp_path / "diffusion.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        published.import_published(tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_no_released_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the released files"):
        published.import_published(tmp_path, tmp_path / "out")


def test_recorded_numbers_are_reproduced(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(shared_dir / "golden")]) == 0
    assert " 0 failed" in capsys.readouterr().out


def test_a_changed_weight_fails_the_recorded_numbers(shared_dir: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "golden"
    shutil.copytree(shared_dir / "golden", folder)
    weights = load_file(folder / "ar.safetensors")
    weights["proj_out.bias"] += 1e-3
    (folder / "ar.safetensors").unlink()
    save_file(weights, folder / "ar.safetensors")
    assert golden.main([str(folder)]) == 1
    assert golden.main([str(tmp_path)]) == 2
