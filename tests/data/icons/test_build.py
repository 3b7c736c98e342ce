"""The icons job on a small package: what is used, what is left out and why, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray.config import load_config
from instella_ray.data.formats.png import write_png
from instella_ray.data.formats.shards import write_webdataset
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.data.icons import build
from instella_ray.data.icons.build import IconsConfig, check_icons, run_icons
from instella_ray.data.icons.drawings import Vocabulary, concept_of, read_clip_art
from instella_ray.data.icons.sets import CLIP_ART, SetList, set_list
from instella_ray.errors import UserError

from ...kit.icons import INFO, listed, write_files, write_vocabulary

LABELS = {
    "1f345": "tomato",
    "1f34e": "red apple",
    "1f347": "grapes",
    "1f431": "cat face",
    "1f1e6": "regional indicator A",
}


def shape(number: int) -> str:
    """A drawing unlike those of other numbers."""
    bars = "".join(f'<rect x="{n}" y="{(n * number) % 7}" width="1" height="{1 + number % 3}"/>' for n in range(10))
    return f'<g fill="#{37 * number % 256:02x}40c0">{bars}</g>'


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Unpacked packages: the vocabulary and two sets."""
    folder = tmp_path / "packages"
    entries = [{"label": label, "hexcode": code.upper(), "group": 4} for code, label in LABELS.items()]
    entries[-1] = {"label": LABELS["1f1e6"], "hexcode": "1F1E6"}
    write_vocabulary(folder, entries, {"1F431": "kitty"})
    icons = {
        "tomato": {"body": shape(1)},
        "apple": {"body": shape(2)},
        "kitty": {"body": shape(3)},
        "tomato-dark-skin-tone": {"body": shape(4)},
        "flag-fr": {"body": shape(5)},
        "letter-a": {"body": shape(6)},
        "something": {"body": shape(7)},
        "old": {"body": shape(8), "hidden": True},
        "grapes": {"body": '<image href="/etc/passwd" width="9" height="9"/>'},
    }
    data = {"icons": icons, "aliases": {"tomate": {"parent": "tomato"}}, "width": 10, "height": 10}
    files = {"icons.json": data, "chars.json": {"1f34e": "apple"}, "info.json": INFO}
    write_files(folder / "@iconify-json/one", files)
    plain = {"icons": {"tomato": {"body": shape(9)}, "redapple": {"body": shape(10)}}, "width": 10, "height": 10}
    write_files(folder / "@iconify-json/two", {"icons.json": plain, "chars.json": {}, "info.json": INFO})
    return folder


@pytest.fixture
def cfg(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., IconsConfig]:
    pytest.importorskip("resvg_py", reason="the extra 'icons' is not installed")
    here = listed(sources)
    monkeypatch.setattr(build, "set_list", lambda: here)
    folders = {"sources": str(sources), "output": str(tmp_path / "icons"), "sets": ("one", "two"), "size": 16}
    return lambda **more: IconsConfig(**folders | {"hold_out": {"concepts": 0, "pairs": 0, "drawings": 0}} | more)


def samples(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with path.open("rb") as stream:
            found |= {
                row["key"]: {**json.loads(row["meta"]), "txt": row["caption"]}
                for row in read_samples(stream, path.name)
            }
    return found


def test_each_drawing_is_used_or_left_out_for_a_reason(cfg: Callable[..., IconsConfig]) -> None:
    ledger = run_icons(cfg())
    assert ledger.kept == 5
    reasons = ("skin_tone", "flag", "letter", "not_in_vocabulary", "hidden", "further_name", "element_image")
    assert dict(ledger.dropped) == dict.fromkeys(reasons, 1)
    found = samples(f"{cfg().output}/train")
    assert {key: about["concept"] for key, about in found.items()} == {
        "one-tomato": "tomato",
        "one-apple": "red apple",
        "one-kitty": "cat face",
        "two-tomato": "tomato",
        "two-redapple": "red apple",
    }


def test_a_sample_says_what_it_is_and_where_it_is_from(cfg: Callable[..., IconsConfig]) -> None:
    run_icons(cfg())
    about = samples(f"{cfg().output}/train")["one-apple"]
    assert about["txt"] == about["caption_short"] == "a red apple, style one style"
    assert about["caption_long"].startswith(about["caption_short"])
    assert about["source"] == "@iconify-json/one@1.0.0#apple"
    facts = ("set", "style", "licence", "width", "height", "split")
    assert tuple(about[name] for name in facts) == ("one", "style one", "MIT", 16, 16, "train")


def test_the_same_packages_give_the_same_files(cfg: Callable[..., IconsConfig], tmp_path: Path) -> None:
    first, second = cfg(), cfg(output=str(tmp_path / "again"), sets=("two", "one"), workers=1)
    run_icons(first)
    run_icons(second)
    assert (Path(first.output) / "train/00000.tar").read_bytes() == (
        Path(second.output) / "train/00000.tar"
    ).read_bytes()


def test_an_unfinished_build_is_begun_again_and_a_finished_one_is_left_alone(cfg: Callable[..., IconsConfig]) -> None:
    run_icons(cfg())
    folder = Path(cfg().output)
    with pytest.raises(UserError, match="exists already"):
        run_icons(cfg())
    tar = folder / "train/00000.tar"
    tar.write_bytes(b"half")
    assert run_icons(cfg(mode="resume")).kept == 5 and tar.read_bytes() == b"half"
    (folder / "ledger.json").unlink()
    assert run_icons(cfg(mode="resume")).kept == 5 and len(samples(str(folder / "train"))) == 5


def test_a_build_that_keeps_nothing_is_no_finished_one(cfg: Callable[..., IconsConfig]) -> None:
    everything = {"concepts": 0, "pairs": 0.999999, "drawings": 0}
    for mode in ("new", "resume"):
        with pytest.raises(UserError, match="no drawing was kept"):
            run_icons(cfg(mode=mode, hold_out=everything))


def test_folders_of_images_may_repeat_names_and_lack_concepts(cfg: Callable[..., IconsConfig], tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    for shard, captions in {
        "a": ["a drawing of a tree", "a drawing of "],
        "b": ["a drawing of a house", "a photo"],
    }.items():
        rows = [
            (str(n), write_png(np.full((16, 16, 3), 40 * n + ord(shard), np.uint8), {}), c, {})
            for n, c in enumerate(captions)
        ]
        list(write_webdataset(iter(rows), str(mine / shard), 10))
    about = {
        "style": "crayon",
        "licence": "MIT",
        "attribution": "a",
        "source": "b",
        "concept": "(a drawing of (?P<concept>.*))?",
    }
    given = cfg(sets=(), images={"mine": {"path": f"{mine}/*/*.tar", **about}})
    assert run_icons(given).dropped == {"no_concept": 2}
    found = samples(f"{given.output}/train")
    assert sorted(row["concept"] for row in found.values()) == ["a house", "a tree"]
    identities = [each["identity"] for each in json.loads((Path(given.output) / "run.json").read_text())["inputs"]]
    write_files(mine, {"more.txt": "a"})
    (mine / "b" / "00000.tar").unlink()
    with pytest.raises(UserError, match="inputs"):
        run_icons(given.model_copy(update={"mode": "resume"}))
    assert len(identities) == 2


def test_a_folder_of_another_kind_is_not_touched(cfg: Callable[..., IconsConfig]) -> None:
    write_files(Path(cfg().output), {"mine.txt": "a"})
    with pytest.raises(UserError, match="not made by this job"):
        run_icons(cfg(mode="fresh"))
    assert (Path(cfg().output) / "mine.txt").read_text() == "a"


def test_a_package_with_other_files_is_named_with_both_digests(cfg: Callable[..., IconsConfig], sources: Path) -> None:
    write_files(sources / "@iconify-json/two", {"chars.json": {"1f345": "tomato"}})
    with pytest.raises(UserError, match=r"two: digest [0-9a-f]{64}, expected [0-9a-f]{64} of @iconify-json/two@1.0.0"):
        run_icons(cfg())


def test_a_missing_package_is_named(cfg: Callable[..., IconsConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder emojibase-data"):
        run_icons(cfg(sources=str(tmp_path)))


def test_missing_packages_and_clients_are_known_before_anything_is_written(
    cfg: Callable[..., IconsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_icons(cfg())
    with pytest.raises(UserError, match="no folder emojibase-data"):
        check_icons(cfg(sources=str(tmp_path)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm: not installed, and sources is not set"):
        check_icons(cfg(sources=None))
    with pytest.raises(UserError, match="npm: not installed, and sources is not set"):
        run_icons(cfg(sources=None))


def test_unknown_and_closed_sets_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'noto'"):
        set_list().choose(["notto"])
    with pytest.raises(UserError, match="JoyPixels: left out, "):
        set_list().choose(["JoyPixels"])


def test_a_licence_that_forbids_training_or_sharing_is_refused(cfg: Callable[..., IconsConfig]) -> None:
    folder = {"path": "a", "style": "photo", "licence": "CC-BY-NC-4.0", "attribution": "a", "source": "b"}
    with pytest.raises(UserError, match=r"images.mine: licence CC-BY-NC-4.0 does not allow"):
        run_icons(cfg(images={"mine": folder}))


def test_each_set_and_its_licence_is_described() -> None:
    listed: SetList = set_list()
    assert all(entry.licence in listed.licences for entry in (listed.vocabulary, *listed.sets.values()))
    assert len({entry.style for entry in listed.sets.values()}) == len(listed.sets)
    default = load_config(IconsConfig, "icons/build", ["output=a"]).sets
    assert default == tuple(name for name in listed.sets if name != "openclipart")


def test_labels_become_phrases(sources: Path) -> None:
    assert concept_of("man: red hair") == "man with red hair"
    assert concept_of("family: man, woman, boy") == "family of man, woman and boy"
    assert concept_of("woman’s hat") == "woman's hat"
    emoji = Vocabulary(sources / "emojibase-data").find(["1F345-FE0F"], ["grapes"])
    assert emoji is not None and emoji.concept == "tomato"


def test_clip_art_needs_a_title_and_a_public_domain_licence(tmp_path: Path) -> None:
    free = '<cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/>'
    named = "<dc:title>Red  Car</dc:title><rdf:li>vehicle</rdf:li>"
    files = {"a/car": free + named, "b/b": free + "<dc:title>fc_08</dc:title>", "c/c": named, "flags/d": free + named}
    write_files(tmp_path / CLIP_ART, {f"{name}.svg": f"<svg>{text}</svg>" for name, text in files.items()})
    found = list(read_clip_art("openclipart", set_list().sets["openclipart"], tmp_path))
    assert [verdict for verdict, _ in found] == ["kept", "dropped:no_title", "dropped:licence", "dropped:flag"]
    drawing = found[0][1]
    assert drawing is not None and (drawing.key, drawing.concept) == ("openclipart-a/car", "red car")
    assert drawing.keywords == ("vehicle",)
