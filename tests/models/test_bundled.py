"""Models of the package: found by name, checked against their checksums, float32 again when they are loaded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models import bundled
from instella_ray.models.bit import BIT
from instella_ray.models.bundled import SUMS, bundled_folder, bundled_names, write_sums
from instella_ray.models.checkpoint import load_expected, save_weights, weight_hash
from instella_ray.models.folders import find_model

from ..kit.models import make_generator, make_tokenizer


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a set of models, of which a tokenizer of half precision, ``drawings/tokenizer``."""
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "bundled")
    (folder := tmp_path / "bundled" / "drawings" / "tokenizer").mkdir(parents=True)
    make_tokenizer(tmp_path / "trained")
    bit = load_expected(tmp_path / "trained", BIT)
    save_weights(folder, bit.cfg, {name: value.bfloat16() for name, value in bit.state_dict().items()})
    make_generator(folder.parent / "diffusion", weight_hash(folder))
    write_sums(folder.parent)
    bundled.check_sums.cache_clear()
    return folder


def test_a_model_of_the_package_is_found_by_its_name_alone(shipped: Path, tmp_path: Path) -> None:
    assert bundled_names() == ["drawings", "drawings/diffusion", "drawings/tokenizer"]
    assert find_model("drawings/tokenizer") == str(shipped)
    assert bundled_folder("paintings") is None and find_model("paintings").endswith("/paintings")


def test_a_set_stands_for_its_diffusion_generator(shipped: Path) -> None:
    assert find_model("drawings") == find_model("drawings/diffusion") == str(shipped.parent / "diffusion")


def test_a_model_folder_of_that_path_comes_first(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (mine := tmp_path / "drawings" / "tokenizer").parent.mkdir()
    assert find_model("drawings/tokenizer") == str(shipped)
    make_tokenizer(mine)
    assert find_model("drawings/tokenizer") == str(mine)


def test_half_precision_is_a_matter_of_the_file_only(shipped: Path) -> None:
    bit = load_expected(shipped, BIT)
    assert {value.dtype for value in bit.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert weight_hash(bit) == weight_hash(shipped)


def test_a_damaged_file_is_named_with_both_checksums(shipped: Path) -> None:
    weights = shipped / "model.safetensors"
    before = dict(line.split("  ")[::-1] for line in (shipped.parent / SUMS).read_text().splitlines())
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError) as error:
        find_model("drawings/tokenizer")
    assert str(weights) in str(error.value) and before["tokenizer/model.safetensors"] in str(error.value)
    (shipped.parent / SUMS).write_text("")
    with pytest.raises(UserError, match=r"SHA256SUMS: does not list diffusion/config.yaml"):
        find_model("drawings/tokenizer")
    (shipped.parent / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in before.items()))
    weights.unlink()
    with pytest.raises(UserError, match="missing from the installation"):
        find_model("drawings/tokenizer")


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_what_ships_is_what_its_checksums_say() -> None:
    sets = sorted(file.parent for file in bundled.FOLDER.rglob(SUMS))
    assert {folder.name for folder in sets} == {name.partition("/")[0] for name in bundled_names()}
    for folder in sets:
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=True)
        listed = {line.partition("  ")[2] for line in (folder / SUMS).read_text().splitlines()}
        assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == listed | {SUMS}
