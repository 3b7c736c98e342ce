"""Prompts of groups are chosen by a hash: the same whatever the order, and more of them begin with fewer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instella_ray import cli
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompt_groups import grouped_prompts
from instella_ray.data.prompts import Prompt, read_prompts
from instella_ray.errors import UserError

from ..kit.labelled import labelled_rows, write_labelled

LABELS = ("style", "concept")


def groups(folder: Path) -> list[str]:
    return [write_labelled(folder / name, 2, name) for name in ("train", "held-out")]


def test_each_group_has_as_many_prompts_with_its_labels(tmp_path: Path) -> None:
    folders = groups(tmp_path)
    prompts = grouped_prompts(tuple(folders), "split", LABELS, 5)
    assert [p.category for p in prompts] == ["held-out"] * 5 + ["train"] * 5
    assert all(p.text == f"a {p.meta['concept']}, {p.meta['style']} style" for p in prompts)
    assert len({(p.category, p.text) for p in prompts}) == 10 and prompts[0].id == "held-out-0000"
    assert grouped_prompts(tuple(folders[::-1]), "split", LABELS, 5) == prompts
    fewer = grouped_prompts(tuple(folders), "split", LABELS, 2)
    assert fewer == prompts[:2] + prompts[5:7]
    assert grouped_prompts(tuple(folders), "split", LABELS, 5, seed=1) != prompts


def test_groups_with_too_few_captions_and_captions_of_several_labels_are_named(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "a", 2)
    with pytest.raises(UserError, match="8 captions of split 'train', expected at least count=9"):
        grouped_prompts(folder, "split", LABELS, 9)
    with pytest.raises(UserError, match="no text 'mood' in its metadata"):
        grouped_prompts(folder, "split", ("mood",), 1)
    rows = [(key, image, "one caption", meta) for key, image, _, meta in labelled_rows(1)]
    write_tar(str(tmp_path / "b" / "0.tar"), rows)
    with pytest.raises(UserError, match=r"the caption 'one caption' is that of .* and of "):
        grouped_prompts(str(tmp_path / "b"), "split", LABELS, 1)


@pytest.mark.parametrize("name", ["prompt", "id", "Category", "tag", "settings", "caption", "prompt_id"])
def test_labels_that_are_fields_of_prompts_are_refused(name: str) -> None:
    expected = f"label '{name}': a field that prompts have themselves; expected another key of KEY.json"
    with pytest.raises(UserError, match=expected):
        grouped_prompts("nowhere", "split", ("style", name), 1)
    with pytest.raises(UserError, match=expected):
        grouped_prompts("nowhere", name, ("style",), 1)


def test_the_file_is_read_as_prompts_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, output = groups(tmp_path), str(tmp_path / "prompts.jsonl")
    command = ["prompts", *folders, "--count", "3", "--output", output]
    assert cli.main(command) == 0 and "prompts.jsonl: 3 held-out, 3 train" in capsys.readouterr().out
    first = read_prompts(output)[0]
    row = json.loads(Path(output).read_text().splitlines()[0])
    labels = {name: row[name] for name in ("split", *LABELS)}
    assert first == Prompt("held-out-0000", row["prompt"], "held-out", labels)
    assert cli.main(command) == 2 and "exists; choose another name" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "new.jsonl"), "--labels", "prompt"]) == 2
    assert "label 'prompt': a field that prompts have themselves" in capsys.readouterr().err
