"""What the demo holds out of shards and images of one's own, and that bad input is refused before anything is touched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from instella_ray import cli
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.sources import read_rows
from instella_ray.demo import stages
from instella_ray.demo.images import HeldOutImages, demo_prompts, held_out_boundary, own_images, written_images
from instella_ray.demo.recipe import DemoConfig, tokenizer_config
from instella_ray.demo.state import DemoState
from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import save_model

from ..kit.shards import HOSTILE, Members, image_bytes, sample, tar_bytes


def write_tars(folder: Path, *contents: Members) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, members in enumerate(contents):
        (folder / f"{number}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/*.tar"


def samples(count: int, start: int = 0) -> Members:
    return [member for i in range(start, start + count) for member in sample(f"{i:05d}", i, caption=f"image {i}")]


def without_captions(count: int) -> Members:
    return [(f"{i:05d}.jpg", image_bytes(i)) for i in range(count)]


def trained_on(images: HeldOutImages) -> str:
    """The numbers of the tars."""
    return "".join(re.findall(r"(\d)\.tar", " ".join(images.train)))


def demo(shards: str, **changes: object) -> DemoConfig:
    return DemoConfig(shards=shards, size=32, **changes)  # type: ignore[arg-type]


def test_whole_tars_are_held_out_until_there_are_enough_images(tmp_path: Path) -> None:
    shards = write_tars(tmp_path, *[samples(20, 20 * i) for i in range(5)], samples(1, 100))
    images = own_images(demo(shards))
    assert trained_on(images) == "0123"
    assert images.captions == [f"image {i}" for i in range(80, 101)]
    assert images.pixels.shape == (21, 32, 32, 3) and images.pixels.dtype == np.uint8
    # As many as are asked for, though the tar holds more.
    few = own_images(demo(shards, held_out=3))
    assert (trained_on(few), few.captions) == ("0123", ["image 80", "image 81", "image 82"])


def test_names_of_captions_are_those_of_the_configuration(tmp_path: Path) -> None:
    members = [(f"{i}.{e}", d) for i in range(32) for e, d in (("jpg", image_bytes(i)), ("json", b'{"vlm": "a dog"}'))]
    shards = write_tars(tmp_path, members[:32], members[32:])
    with pytest.raises(UserError, match="shard without captions"):
        own_images(demo(shards))
    assert own_images(demo(shards, caption_keys=("vlm",))).captions == ["a dog"] * 16


def test_a_small_set_holds_out_a_share_and_a_large_one_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_tars(tmp_path, *[samples(17, 17 * i) for i in range(9)])
    assert trained_on(own_images(demo(shards))) == "0123456"
    monkeypatch.setattr("instella_ray.demo.images.ENOUGH", 17)
    assert trained_on(own_images(demo(shards))) == "01234567"


def test_held_out_images_are_those_that_curation_keeps(tmp_path: Path) -> None:
    hostile = [member for members, _ in HOSTILE.values() for member in members]
    shards = write_tars(tmp_path, samples(4), hostile + samples(16))
    images = own_images(DemoConfig(shards=shards, size=64))
    kept = sum(verdict == "kept" for _, verdict in HOSTILE.values())
    assert len(images.captions) == len(images.pixels) == 16 + kept and trained_on(images) == "0"


def test_prompts_are_captions_of_held_out_images(tmp_path: Path) -> None:
    cfg = demo(write_tars(tmp_path, samples(16), samples(16, 16) + samples(4, 16)), prompts_per_category=12)
    prompts = demo_prompts(cfg, own_images(cfg))
    assert prompts == [(f"image {i}", "captions") for i in range(16, 28)]


def test_real_shards_hold_out_hundreds(shared_dir: Path) -> None:
    images = own_images(demo(f"{shared_dir}/data/emoji3d/*.tar", held_out=220))
    assert len(images.captions) == 220 and trained_on(images) == "012"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([samples(40)], "0 usable images in the tars after the first, expected at least 16"),
        ([samples(40), samples(15)], "15 usable images in the tars after the first, expected at least 16"),
        ([samples(40), without_captions(40)], "0 usable images in the tars after the first"),
        ([without_captions(2), samples(40)], "shard without captions"),
        ([without_captions(2), without_captions(40)], "shard without captions"),
        ([[], samples(40)], "no usable image"),
    ],
)
def test_bad_shards_are_refused_and_an_old_demo_survives(
    contents: list[Members], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = DemoState(DemoConfig(folder=str(tmp_path / "demo")), "new")
    old.begin()
    before = (tmp_path / "demo" / "state.json").read_bytes()
    shards = write_tars(tmp_path / "shards", *contents)
    assert cli.main(["demo", "--folder", old.folder, "--size", "32", "--shards", shards, "--fresh"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(tmp_path / "shards") in line
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "demo").iterdir()] == [("state.json", before)]


# --- images of one's own


def write_folder(folder: Path, count: int, **files: bytes) -> str:
    """Images with captions beside them, and further files, whose names have an underscore for the dot."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(image_bytes(i))
        (folder / f"{i:03d}.txt").write_text(f"image {i}")
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return str(folder)


def as_folder(path: Path) -> str:
    return write_folder(path / "in", 60, mute_jpg=image_bytes(60), cut_jpg=image_bytes(61)[:-300], cut_txt=b"an image")


def as_csv(path: Path) -> str:
    as_folder(path)
    names = [*(f"{i:03d}.jpg,image {i}" for i in range(60)), "mute.jpg,", "cut.jpg,an image"]
    (path / "in" / "all.csv").write_text("\n".join(["file_name,caption", *names]))
    return str(path / "in" / "all.csv")


def as_parquet(path: Path) -> str:
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(Path(as_folder(path)).glob("*.jpg"))]
    captions = [*(f"image {i}" for i in range(60)), "an image", None]
    pq.write_table(pa.table({"image": images, "text": captions}), path / "all.parquet")
    return str(path / "all.parquet")


@pytest.mark.parametrize("write", [as_folder, as_csv, as_parquet])
def test_images_of_ones_own_are_written_once_some_apart(
    tmp_path: Path, write: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = DemoConfig(folder=str(tmp_path / "demo"), images=write(tmp_path), size=32)
    facts = stages.write_images(cfg, held_out_boundary(cfg))
    assert (
        capsys.readouterr().out == f"{facts['images']} images to train on, {facts['held_out']} held out, 1 no_caption\n"
    )
    assert facts["images"] + facts["held_out"] == 61 and facts["held_out"] in (16, 17)
    images = written_images(cfg)
    trained = [row["caption"] for url in find_shards(images.train) for row in read_rows(url, "")]
    assert len(images.captions) == len(images.pixels) == 16
    # The one that cannot be decoded is wherever its hash places it: curation counts it.
    assert sorted({*trained, *images.captions} - {"an image"}) == sorted(f"image {i}" for i in range(60))
    assert {caption for caption, _ in demo_prompts(cfg, images)} == set(images.captions)


def test_captions_of_images_are_found_by_the_names_of_the_configuration(tmp_path: Path) -> None:
    table = Path(as_csv(tmp_path))
    table.write_text(table.read_text().replace("file_name,caption", "file_name,vlm"))
    cfg = DemoConfig(folder=str(tmp_path / "demo"), images=str(table), caption_keys=("vlm",), size=32)
    facts = stages.write_images(cfg, held_out_boundary(cfg))
    assert facts["images"] + facts["held_out"] == 61 and facts["left_out"] == {"no_caption": 1}


def test_copies_of_an_image_are_held_out_together(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "in", 40))
    for i in range(40):
        shutil.copy(folder / f"{i:03d}.jpg", folder / f"copy{i:03d}.jpg")
        (folder / f"copy{i:03d}.txt").write_text(f"image {i}")
    cfg = DemoConfig(folder=str(tmp_path / "demo"), images=str(folder), size=32)
    facts = stages.write_images(cfg, held_out_boundary(cfg))
    assert (facts["held_out"], facts["images"]) == (32, 48)
    images = written_images(cfg)
    assert {row["caption"] for url in find_shards(images.train) for row in read_rows(url, "")}.isdisjoint(
        images.captions
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda path: str(path / "none"), "none: no shard found; expected WebDataset tars, .parquet, .csv"),
        (
            lambda path: write_folder(path / "in", 31),
            "31 of 31 kept, 31 of them different; expected at least 32 usable",
        ),
        (lambda path: write_folder(path / "in", 0, a_jpg=b"x"), "shard without captions; expected NAME.txt"),
        (lambda path: write_folder(path / "in", 0, a_txt=b"x"), "no images found"),
        (lambda path: write_folder(path / "in", 0, a_jpg=b"x", a_txt=b"c"), "0 of 1 kept (1 undecodable)"),
        (lambda path: f"{write_folder(path / 'in', 0, a_csv=b'url,text')}/a.csv", "links without images; curate first"),
        (lambda path: f"{write_folder(path / 'in', 0, a_csv=b'file_name')}/a.csv", "no column with captions"),
    ],
)
def test_unusable_images_are_refused_and_an_old_demo_survives(
    made: Callable[[Path], str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = DemoState(DemoConfig(folder=str(tmp_path / "demo")), "new")
    old.begin()
    before = (tmp_path / "demo" / "state.json").read_bytes()
    argv = ["demo", "--folder", old.folder, "--size", "32", "--images", made(tmp_path), "--fresh"]
    assert cli.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert line.startswith("error: ") and message in line
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "demo").iterdir()] == [("state.json", before)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images=a", "shards, images: expected at most one of them"),
        ("width=16", "'width' = 16: Input should be a multiple of 32"),
        ("width=0", "'width' = 0: Input should be greater than or equal to 32"),
        ("generator_width=100", "'generator_width' = 100: Input should be a multiple of 32"),
        ("steps.ar=0", "'steps.ar' = 0: Input should be greater than or equal to 1"),
        ("prompts_per_category=0", "'prompts_per_category' = 0"),
        ("workers.count=3", "global_batch 32 is not a multiple of 3 workers"),
        ("workers.cpus=1000", "1 workers need 1000 CPU"),
        ("text_encoder.name=package:no_such_package/x", "text encoder 'package:no_such_package/x'"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--shards", "a"] if override.startswith("images") else []
    assert cli.main(["demo", "--folder", str(tmp_path / "d"), *shards, "--set", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "d").exists()


def test_the_tokenizer_is_measured_against_the_weights_it_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = DemoConfig(folder=str(tmp_path / "demo"), shards="own", size=32, width=32, seed=5)
    torch.manual_seed(cfg.seed)
    start = BIT(tokenizer_config(cfg, "").model)
    save_model(tmp_path, start)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    torch.manual_seed(77)
    facts = stages.measure_tokenizer(cfg, HeldOutImages("", ["an image"] * 16, pixels), str(tmp_path))
    assert facts["psnr_before"] == facts["psnr_after"] and facts["images"] == 16
    bars = capsys.readouterr().err
    assert "before training: 100%" in bars and "after training: 100%" in bars
