"""Recaptioning: a caption is a function of image, question and weights; nothing is lost, and nothing bad gets through.

The captioner is a Qwen2.5-VL of two layers with random weights: what it says means nothing, but it is loaded, padded,
batched and cut as the large one is.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instella_ray.data.formats.images import UndecodableError
from instella_ray.data.formats.names import find_shards
from instella_ray.data.formats.parts import PartFolder, PartWriter
from instella_ray.data.formats.rows import SCHEMA
from instella_ray.data.formats.shards import write_samples, write_tar
from instella_ray.data.formats.sources import find_images, read_blocks
from instella_ray.data.formats.tar_source import read_samples
from instella_ray.data.generation.captioner import Captioner, Question, decode_for_captioner, full_sentences
from instella_ray.data.generation.pretrained import located, short_name, weights_identity
from instella_ray.data.generation.recaption import RecaptionConfig, Recaptioner, recaption_settings, run_recaption
from instella_ray.demo.stand_ins import save_captioner
from instella_ray.errors import UserError

from ...kit.shards import HOSTILE, contents, image_bytes, sample, tar_bytes

LONG, SHORT = Question(prompt="a red ball", max_new_tokens=24), Question(prompt="box", max_new_tokens=7)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner") / "tiny", seed=2)


@pytest.fixture(scope="module")
def captioner(model: Path) -> Captioner:
    return Captioner(str(model), torch.device("cpu"), "fp32")


def config(shards: Path, model: Path, output: Path, **more: Any) -> RecaptionConfig:
    places = {"input": str(shards), "model": str(model), "output": str(output)}
    sizes = {"max_pixels": 900, "batch_size": 4, "rows_per_shard": 5, "local": True}
    return RecaptionConfig(**{**places, "long": LONG, "short": SHORT, **sizes, **more})


def images(count: int) -> list[Image.Image]:
    """Of growing size, which the model reads as more and more tokens."""
    return [decode_for_captioner(image_bytes(i, (12 + 6 * i, 24)), 900) for i in range(count)]


def rows(data: bytes) -> list[dict[str, Any]]:
    return list(read_samples(io.BytesIO(data), "shard"))


# --- the captioner


def test_a_caption_depends_on_the_image_and_not_on_what_shares_its_batch(captioner: Captioner) -> None:
    given = images(8)
    together = captioner.answers(given, (LONG, SHORT))
    # Larger images beside it mean more padding.
    assert [captioner.answers([p], (LONG, SHORT))[0] for p in given] == together
    assert captioner.answers(given[::-1], (LONG, SHORT)) == together[::-1]
    assert [captioner.answers([p], (SHORT,))[0][0] for p in given] == [short for _, short in together]
    assert len({long.text for long, _ in together}) >= 6


def test_answers_end_at_their_own_limit_and_with_a_full_sentence(captioner: Captioner) -> None:
    answers = captioner.answers(images(16), (LONG, SHORT))
    for question, of_question in zip((LONG, SHORT), zip(*answers, strict=True), strict=True):
        assert {a.finished for a in of_question} == {True, False}  # the test sees both
        assert all(len(a.text.split()) <= question.max_new_tokens for a in of_question)
        assert all(a.text.endswith(".") or not a.text for a in of_question if not a.finished)
    assert max(len(long.text.split()) for long, _ in answers) > SHORT.max_new_tokens


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A cat sits. A dog st", "A cat sits."),
        ("It costs 3.5 of them", ""),
        ('A sign says "Stop!" It is r', 'A sign says "Stop!"'),
        ("一只猫坐着。一只狗", "一只猫坐着。"),
        ("One. Two? Three", "One. Two?"),
        ("No end here", ""),
        ("", ""),
    ],
)
def test_text_is_cut_back_to_its_last_full_sentence(text: str, kept: str) -> None:
    assert full_sentences(text) == kept


@given(st.text("ab .!。\"'", max_size=40))
def test_what_is_cut_back_is_a_beginning_and_stays_as_it_is(text: str) -> None:
    kept = full_sentences(text)
    assert text.startswith(kept) and full_sentences(kept) == kept


def test_images_are_shrunk_to_the_limit_and_stripes_refused() -> None:
    assert decode_for_captioner(image_bytes(0, (64, 48)), 64 * 48).size == (64, 48)
    for size in ((1600, 800), (40, 3999), (2000, 2000)):
        made = decode_for_captioner(image_bytes(1, size), 10_000)
        assert 0.8 < made.width * made.height / 10_000 <= 1
        assert made.width / made.height == pytest.approx(size[0] / size[1], rel=0.15)
    with pytest.raises(UndecodableError, match="too_narrow"):
        decode_for_captioner(image_bytes(2, (1010, 10)), 10_000)


# --- the job


def test_every_hostile_sample_gets_its_verdict_and_the_others_their_captions(model: Path, tmp_path: Path) -> None:
    """Those that have no caption are welcome here; those with captions too long, too."""
    table = pa.Table.from_pylist(rows(tar_bytes([m for members, _ in HOSTILE.values() for m in members])), SCHEMA)
    stripe = {"problem": None, "image": image_bytes(1, (2000, 3)), "meta": "{}", "caption": "c", "key": "stripe"}
    listed = {"problem": "no_caption", "image": image_bytes(1), "meta": "[]", "key": "listed"}
    table = pa.concat_tables([table, pa.Table.from_pylist([stripe, listed], SCHEMA)])
    made = Recaptioner(config(tmp_path, model, tmp_path))(table).to_pylist()
    verdicts = dict(zip([*HOSTILE, "stripe", "listed"], (row["verdict"] for row in made), strict=True))
    expected = {name: verdict for name, (_, verdict) in HOSTILE.items() if verdict.startswith("quarantined")}
    del expected["nocaption"]
    expected |= {"stripe": "quarantined:too_narrow", "listed": "quarantined:bad_metadata"}
    assert {name: v for name, v in verdicts.items() if v.startswith("quarantined")} == expected
    assert {v for v in verdicts.values() if not v.startswith("quarantined")} <= {
        "kept",
        "dropped:empty_caption",
        "dropped:unfinished_caption",
    }
    for row in made:
        if row["verdict"] == "kept":
            meta = json.loads(row["meta"])
            assert row["caption"] == meta["caption_long"] != "" != meta["caption_short"]
            assert meta["captioner"] == "tiny"
        elif row["verdict"].startswith("dropped"):
            assert row["image"] is None


def test_an_image_is_dropped_for_the_first_caption_that_it_lacks(model: Path, tmp_path: Path) -> None:
    brief = Question(prompt="box", max_new_tokens=2)
    work = Recaptioner(config(tmp_path, model, tmp_path, short=brief))
    given = images(24)
    row = {"key": "a", "image": b"bytes", "caption": "old", "meta": "{}"}
    found = work.described([row] * len(given), given)
    for made, answers in zip(found, work.captioner.answers(given, (LONG, brief)), strict=True):
        missing = [answer for answer in answers if not answer.text]
        dropped = f"dropped:{'empty' if missing[0].finished else 'unfinished'}_caption" if missing else None
        assert made["verdict"] == (dropped or "kept")
        assert made["image"] == (None if missing else b"bytes")
    assert len({made["verdict"] for made in found}) == 3  # the test sees all


def make_parts(cfg: RecaptionConfig, shards: Sequence[str]) -> None:
    """What a run leaves that was killed when it had come so far, without Ray."""
    labels = find_images(cfg.input)
    PartFolder(cfg.output).open("new", recaption_settings(cfg), labels)
    write, work = PartWriter(cfg.output, ".tar", write_samples), Recaptioner(cfg)
    for name in shards:
        url = f"{cfg.input}/{name}.tar"
        for table in read_blocks(url, labels[url], cfg.rows_per_shard):
            write(work(table))


def test_a_killed_run_goes_on_to_the_same_files(model: Path, tmp_path: Path) -> None:
    for number in range(2):
        samples = [(f"{number}-{i}", image_bytes(10 * number + i), f"old {i}", {"n": i}) for i in range(10)]
        write_tar(str(tmp_path / "in" / f"{number}.tar"), [*samples, (f"{number}-bad", b"no image", "caption", {})])
    whole, out = tmp_path / "whole", tmp_path / "out"
    make_parts(config(tmp_path / "in", model, whole), "01")
    make_parts(config(tmp_path / "in", model, out), "0")
    (out / "1-0000000.tar.1234.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="exists already"):
        run_recaption(config(tmp_path / "in", model, out))
    elsewhere = shutil.copytree(model, tmp_path / "tiny")
    save_captioner(elsewhere, seed=5)
    for name, more, what in ((elsewhere, {}, "weights="), (model, {"long": SHORT}, "long=")):
        with pytest.raises(UserError, match=f"made with {what}"):
            run_recaption(config(tmp_path / "in", name, out, mode="resume", **more))

    # Batches of another size: the same captions.
    ledger = run_recaption(config(tmp_path / "in", model, out, mode="resume", batch_size=3)).to_json()
    after = contents(out)
    assert len(json.loads(after.pop("shards.json"))["shards"]) == len([name for name in after if name.endswith(".tar")])
    assert ledger == json.loads(after.pop("ledger.json")) and after == contents(whole)
    assert ledger["in"] == 22 == ledger["kept"] + sum(ledger["dropped"].values()) + 2
    assert ledger["quarantined"] == {"undecodable": 2} and ledger["kept"] >= 8
    kept = [row for url in find_shards(str(out)) for row in rows(Path(url).read_bytes())]
    assert len(kept) == ledger["kept"]
    for row in kept:
        meta = json.loads(row["meta"])
        assert (row["caption"], meta["caption_original"]) == (meta["caption_long"], f"old {meta['n']}")
        assert row["image"] == image_bytes(10 * int(row["key"][0]) + meta["n"])


def test_a_model_of_the_hub_is_known_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--someone--captioner"
    for name, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "{}")):
        (kept / name).parent.mkdir(parents=True)
        (kept / name).write_text(text)
    assert weights_identity("model", "someone/captioner", "config.json") == "0" * 40
    assert located("someone/captioner") == short_name("someone/captioner") == "someone/captioner"
    with pytest.raises(UserError, match=r"^model 'someone/other': cannot be loaded"):
        weights_identity("model", "someone/other", "config.json")


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickled")


def _cut_weights(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _text_only(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))


def _no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "tiny': cannot be loaded"),
        (lambda model: (model / "config.json").write_text("no JSON"), "tiny': cannot be loaded"),
        (_no_weights, "tiny': no weights found; expected .safetensors files"),
        (_cut_weights, "model.safetensors: not a complete safetensors file"),
        (_text_only, "tiny': a bert, expected a model that answers questions on images"),
        (_no_template, "tiny': its processor has no chat template"),
    ],
)
def test_a_model_that_cannot_describe_is_a_user_error_before_any_work(
    model: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoiled = shutil.copytree(model, tmp_path / "tiny")
    spoil(spoiled)
    (tmp_path / "a.tar").write_bytes(tar_bytes(sample("a")))
    with pytest.raises(UserError) as refused:
        run_recaption(config(tmp_path / "a.tar", spoiled, tmp_path / "out"))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
