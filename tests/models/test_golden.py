"""The checker of recorded numbers: other sizes, parts of a folder, and folders that are malformed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from instella_ray.models import golden

from ..kit.recordings import record

OTHER_SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_resampling": {
        "tokenizer": {"downsample_after": (), "upsample_after": ()},
        "sizes": {"x0": (20, 8), "x1": (8, 12), "dec_base": (12, 8), "dec_alt": (8, 20)},
    },
    "encode_finer_than_decode": {"tokenizer": {"downsample_after": ()}, "sizes": {"x0": (20, 16)}},
    "two_downs_two_ups": {
        "tokenizer": {"downsample_after": (0, 1), "upsample_after": (0, 1)},
        "sizes": {"x0": (32, 48), "x1": (48, 32), "dec_base": (32, 48), "dec_alt": (48, 64)},
    },
    "other_patch_and_axes": {
        "tokenizer": {
            **{"patch_size": 6, "rope_axes": (6, 2, 4), "num_tokens": 1, "bits_per_token": 1},
            **{"encoder_width": 12, "encoder_heads": 1, "decoder_width": 24, "decoder_heads": 2},
        },
        "sizes": {"x0": (24, 36), "x1": (36, 24), "dec_base": (36, 24), "dec_alt": (24, 48)},
    },
    "pixels_beyond_the_last_patch": {"sizes": {"x0": (33, 18)}},
    "one_token_one_layer": {"generator": {"num_tokens": 1, "bits_per_token": 1, "layers": 1, "heads": 1}},
    "no_text_positions": {"text_length": 0},
    "one_step": {"sampling": {"num_sampling_steps": 1}},
    "many_steps": {"sampling": {"num_sampling_steps": 11, "rho": 0.5}},
    "no_guidance": {"sampling": {"guidance_scale": 0}},
    "greedy": {"sampling": {"temp": 0}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return record(tmp_path / "golden")


def change_io(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    io = load_file(folder / "io.safetensors")
    change(io)
    (folder / "io.safetensors").unlink()  # it may be mapped into memory
    save_file({name: value.contiguous() for name, value in io.items()}, folder / "io.safetensors")


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_recorded_numbers_are_reproduced(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(shared_dir / "golden")]) == 0
    assert "41 tensors compared, 0 failed\n" in capsys.readouterr().out


def test_a_changed_weight_fails_the_recorded_numbers(folder: Path) -> None:
    weights = load_file(folder / "ar.safetensors")
    weights["proj_out.bias"] += 1e-3
    (folder / "ar.safetensors").unlink()
    save_file(weights, folder / "ar.safetensors")
    assert golden.main([str(folder)]) == 1


def test_a_wrong_bit_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_io(folder, lambda io: io["samp.ar.z"][0, 0, :2].bitwise_xor_(torch.ones(2, dtype=torch.uint8)))
    assert golden.main([str(folder)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "samp.ar.z" in line)
    assert line.startswith("BAD") and line.endswith("wrong bits 2")


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_recordings_of_other_sizes_are_compared_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(tmp_path / "golden", **OTHER_SIZES[name])
    code = golden.main([str(folder)])
    out = capsys.readouterr().out
    assert code == 0, out
    outputs = [tensor for tensor in load_file(folder / "io.safetensors") if not golden.INPUTS.fullmatch(tensor)]
    assert f"{len(outputs) + 1} tensors compared, 0 failed\n" in out  # and dit.zt, which is an input as well


def test_an_image_of_any_number_is_an_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rename(io: dict[str, Tensor]) -> None:
        for name in [name for name in io if name.startswith("bit.x1")]:
            io[name.replace("x1", "x12")] = io.pop(name)

    change_io(folder, rename)
    assert golden.main([str(folder)]) == 0
    assert "bit.x12.logits_noscale" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bit.x0.colour", "bit.x9.logits", "dit.extra", "debug.decoder.block0", "other"])
def test_an_output_that_nothing_is_compared_with_fails(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_io(folder, lambda io: io.update({name: torch.zeros(1)}))
    assert golden.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"NOT CHECKED {name} (" in out and out.endswith(" 0 failed, 1 not checked\n")


@pytest.mark.parametrize(
    ("absent", "left_out"),
    [
        ("bit.code_dec", ["bit.dec_alt_row0", "bit.dec_base", "bit.dec_base_row1_noscale"]),
        ("bit.x0", [f"bit.x0.{part}" for part in ("code", "code_noscale", "logits", "zq")]),
        ("gen.z", ["ar.loss", "ar.out_full", "ar.out_tf", "dit.noise_p", "dit.loss_x"]),
        ("gen.feat.1", ["ar.out_first", "dit.out", "dit.acc_percent"]),
        ("dit.t", ["dit.out"]),
        ("samp.mask", ["samp.ar.z", "samp.alg1.out"]),
        ("samp.alg1.u", [f"samp.alg1.{part}" for part in ("out", "p", "x0_prob_last", "z")]),
        ("samp.ar.u", [f"samp.ar.{part}" for part in ("out_last", "p", "z")]),
    ],
)
def test_an_absent_input_leaves_out_what_it_gives(
    absent: str, left_out: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_io(folder, lambda io: io.pop(absent))
    assert golden.main([str(folder)]) == 1
    out = capsys.readouterr().out
    for name in left_out:
        assert f"NOT CHECKED {name} (the folder has no {absent})" in out
    assert " 0 failed, " in out


@pytest.mark.parametrize(
    "absent", ["dit.noise_u", "samp.alg2.p", "bit.x1.logits_noscale", "bit.dec_alt_row0", "dit.noise_p"]
)
def test_what_was_not_recorded_is_no_failure(absent: str, folder: Path) -> None:
    change_io(folder, lambda io: io.pop(absent))
    assert golden.main([str(folder)]) == 0


def test_facts_that_nothing_needs_may_be_missing(folder: Path) -> None:
    change_io(folder, lambda io: [io.pop(name) for name in list(io) if "dec_alt" in name or "samp." in name])
    change_config(folder, lambda config: [config.pop("sampling"), config["sizes"].pop("dec_alt")])
    assert golden.main([str(folder)]) == 0


@pytest.mark.parametrize("kind", ["bit", "diffusion", "ar"])
def test_a_folder_may_hold_some_of_the_checkpoints(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / f"{kind}.safetensors").unlink()
    assert golden.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"no {kind}.safetensors in ") and f"(the folder has no {kind}.safetensors)" in out
    left_out = [line.split()[2] for line in out.splitlines() if line.startswith("NOT CHECKED")]
    change_io(folder, lambda io: [io.pop(name) for name in left_out])
    assert golden.main([str(folder)]) == 0


def cut(path: Path) -> None:
    """A file that ends half-way."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no_io": (lambda f: (f / "io.safetensors").unlink(), "no io.safetensors"),
    "no_checkpoint": (
        lambda f: [(f / f"{kind}.safetensors").unlink() for kind in ("bit", "diffusion", "ar")],
        "no checkpoint",
    ),
    "bad_json": (lambda f: (f / "config.json").write_text('{"bit": '), "config.json: not valid JSON"),
    "json_list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: expected an object, got list"),
    "no_bit_facts": (lambda f: change_config(f, lambda c: c.pop("bit")), "key 'bit' is required"),
    "no_axes": (
        lambda f: change_config(f, lambda c: c["bit"].pop("axes_dims_rope")),
        "key 'bit.axes_dims_rope' is required",
    ),
    "no_scale": (lambda f: change_config(f, lambda c: c.pop("bae_scale")), "key 'bae_scale' is required"),
    "no_size": (
        lambda f: change_config(f, lambda c: c["sizes"].pop("dec_alt")),
        "bit.dec_alt_row0: .*key 'sizes.dec_alt' is required",
    ),
    "no_rho": (lambda f: change_config(f, lambda c: c["sampling"].pop("rho")), "key 'sampling.rho' is required"),
    "no_ar_sampling": (lambda f: change_config(f, lambda c: c.pop("ar_sampling")), "key 'ar_sampling' is required"),
    "other_axes": (
        lambda f: change_config(f, lambda c: c["bit"].update(axes_dims_rope=[2, 2, 2])),
        r"bit.safetensors: .*sum\(rope_axes\) = 6",
    ),
    "steps_in_words": (
        lambda f: change_config(f, lambda c: c["sampling"].update(num_sampling_steps="six")),
        "'sampling.num_sampling_steps' = 'six'",
    ),
    "odd_size": (
        lambda f: change_config(f, lambda c: c["sizes"].update(dec_base=[17, 16])),
        "bit.dec_base: image size 16x17",
    ),
    "cut_io": (lambda f: cut(f / "io.safetensors"), "io.safetensors: not a complete safetensors file"),
    "cut_checkpoint": (lambda f: cut(f / "ar.safetensors"), "ar.safetensors: not a complete safetensors file"),
    "other_checkpoint": (
        lambda f: shutil.copy(f / "ar.safetensors", f / "diffusion.safetensors"),
        "diffusion.safetensors: holds the weights of a generator of kind ar",
    ),
    "no_weights": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "bit.safetensors"),
        "bit.safetensors: expected a tensor encoder.patch_embedder.weight",
    ),
    "output_shape": (
        lambda f: change_io(f, lambda io: io.update({"dit.out": torch.zeros(3, 4, 6)})),
        r"dit.out: computed shape \(3, 4, 7\), recorded shape \(3, 4, 6\)",
    ),
    "mask_shape": (
        lambda f: change_io(f, lambda io: io.update({"gen.mask": torch.ones(3, 5, dtype=torch.uint8)})),
        "ar.acc_percent cannot be computed from its inputs",
    ),
    "codes_shape": (
        lambda f: change_io(f, lambda io: io.update({"bit.code_dec": torch.zeros(2, 5, 4)})),
        "bit.dec_alt_row0 cannot be computed from its inputs",
    ),
    "feature_width": (
        lambda f: change_io(f, lambda io: io.update({f"gen.feat.{i}": torch.zeros(3, 6, 9) for i in range(2)})),
        "ar.acc_percent: text features have 2 layers of width 9",
    ),
    "too_few_uniforms": (
        lambda f: change_io(f, lambda io: io.update({"samp.alg1.u": io["samp.alg1.u"][:2]})),
        "samp.alg1.out: uniforms for replay: expected 3 draws, got 2",
    ),
    "uniforms_without_axes": (
        lambda f: change_io(f, lambda io: io.update({"samp.ar.u": torch.zeros(())})),
        "samp.ar.out_last cannot be computed from its inputs",
    ),
    "no_such_block": (
        lambda f: change_io(f, lambda io: io.update({"debug.encoder.block7.x0_row0": torch.zeros(1)})),
        "debug.encoder.block7.x0_row0 cannot be computed",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_folder_is_one_clear_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = MALFORMED[name]
    spoil(folder)
    assert golden.main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_no_folder_at_all_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(tmp_path / "none")]) == 2
    assert "none: no config.json" in capsys.readouterr().err
