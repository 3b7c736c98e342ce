"""Data jobs on Ray and in the calling process: one implementation of each stage, and the same files to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.bulk.plan import SampleConfig
from instella_ray.bulk.sample import run_sample
from instella_ray.config import Config
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.encode import EncodeConfig, run_encode
from instella_ray.data.formats import rows as data_rows
from instella_ray.data.formats.rows import blocks
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.generation.recaption import RecaptionConfig, run_recaption
from instella_ray.data.generation.synthesize import SynthesizeConfig, run_synthesize
from instella_ray.data.pipeline import run_rows, run_stages
from instella_ray.data.stages import Pool, Stage
from instella_ray.demo.stand_ins import save_captioner, save_flux
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate

from ..kit.curation import COPY_FILTERS, shards_with_copies
from ..kit.models import make_generator, make_tokenizer
from ..kit.project import ROOT
from ..kit.shards import contents, image_bytes

SIZE = {"height": 32, "width": 32}
TIMES = {"run.json", "results.json", "report.html", "manifest.json", "rows.json"}
"""Files that also say when, and how long it took."""


def made_by(run: Callable[[Any], object], cfg: Config, folder: Path, **changes: Any) -> dict[str, bytes]:
    """Files of a job's output in ``folder``, without those of :data:`TIMES`."""
    run(cfg.model_copy(update={"output": str(folder), **changes}))
    return {name: data for name, data in contents(folder).items() if Path(name).name not in TIMES}


def assert_same(run: Callable[[Any], object], cfg: Config, folder: Path, at_least: int) -> None:
    """The job makes the same files, so many at least, on Ray and in this process."""
    here = made_by(run, cfg, folder / "here", local=True)
    assert len(here) >= at_least
    assert made_by(run, cfg, folder / "ray", local=False) == here


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shards_with_copies(tmp_path_factory.mktemp("shards")))


# --- the same files


@pytest.mark.ray
def test_curation_on_ray_and_here(ray_session: None, shards: str, tmp_path: Path) -> None:
    given = {"input": shards, "output": "x", "filters": {**COPY_FILTERS, "nsfw": {}}, "rows_per_shard": 3}
    assert_same(run_curate, CurateConfig.model_validate(given), tmp_path, 10)


@pytest.mark.ray
def test_encoding_on_ray_and_here(ray_session: None, shards: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "bit")
    given = {"input": shards, "output": "x", "tokenizer": str(tmp_path / "bit"), "crops": 2, "rows_per_file": 3}
    assert_same(run_encode, EncodeConfig.model_validate({**given, "batch_size": 4}), tmp_path, 6)


@pytest.mark.ray
def test_recaptioning_on_ray_and_here(ray_session: None, shards: str, tmp_path: Path) -> None:
    model = save_captioner(tmp_path / "captioner")
    question = {"prompt": "what is this", "max_new_tokens": 8}
    given = {"input": shards, "output": "x", "model": str(model), "long": question, "short": question}
    cfg = RecaptionConfig.model_validate({**given, "batch_size": 2, "rows_per_shard": 4, "max_pixels": 56 * 56})
    assert_same(run_recaption, cfg, tmp_path, 6)


@pytest.mark.ray
def test_synthesis_on_ray_and_here(ray_session: None, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'synthesize' is not installed")
    (tmp_path / "prompts.txt").write_text("a red ball\na blue box\na round box\n")
    pipeline = {"pipeline": str(save_flux(tmp_path / "flux")), "num_inference_steps": 2, "guidance_scale": 0.0, **SIZE}
    given = {"prompts": str(tmp_path / "prompts.txt"), "output": "x", "models": {"flux": pipeline}}
    cfg = SynthesizeConfig.model_validate({**given, "prompts_per_shard": 2})
    assert_same(run_synthesize, cfg, tmp_path, 6)


@pytest.mark.ray
def test_sampling_and_evaluation_on_ray_and_here(ray_session: None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "bit")
    model = make_generator(tmp_path / "model", tokenizer)
    sampling = {"num_inference_steps": 2, "temperature": 0.5}
    given = {"model": model, "output": "x", "count": 6, "text_length": 24, "sampling": sampling, "actors": 1}
    cfg = SampleConfig.model_validate({**given, "samples_per_file": 4})
    made = {where: tmp_path / where for where in ("here", "ray")}
    for where, folder in made.items():
        run_sample(cfg.model_copy(update={"output": str(folder), "local": where == "here"}))
    codes = {where: codes_in(folder) for where, folder in made.items()}
    assert len(codes["here"]) == 6 and codes["here"] == codes["ray"]
    measured = EvaluateConfig(samples=str(made["here"]), tokenizer=str(tmp_path / "bit"), output="x", actors=1)
    assert_same(run_evaluate, measured, tmp_path / "measured", 5)
    results = [json.loads((tmp_path / "measured" / w / "results.json").read_text()) for w in ("here", "ray")]
    assert results[0]["settings"] == results[1]["settings"]


def codes_in(folder: Path) -> dict[str, bytes]:
    """Codes by the sample's id."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["sample_id", "codes"]) for path in sorted(folder.glob("samples-*.parquet"))]
    return {row["sample_id"]: row["codes"] for table in tables for row in table.to_pylist()}


# --- tables stay what they are


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 7), st.integers(1, 30))
def test_tables_are_cut_by_rows_and_by_bytes_and_nothing_else(sizes: list[int], rows: int, limit: int) -> None:
    given = [{"key": str(i), "image": bytes(size) or None} for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_rows, "BLOCK_BYTES", limit)
        tables = list(blocks(given, rows))
    assert [key for table in tables for key in table["key"].to_pylist()] == [row["key"] for row in given]
    assert [last for table in tables for last in table["last"].to_pylist()] == [False] * (len(given) - 1) + [True]
    totals = [sum(len(image or b"") for image in table["image"].to_pylist()) for table in tables]
    for number, table in enumerate(tables):
        assert 1 <= table.num_rows <= rows
        # Full by rows or by bytes, but for the last; and never begun when it was full.
        assert table.num_rows == rows or totals[number] >= limit or number == len(tables) - 1
        assert totals[number] - len(table["image"][-1].as_py() or b"") < limit


@given(st.lists(st.lists(st.binary(max_size=5) | st.none(), max_size=4), min_size=1, max_size=5), st.data())
def test_a_table_comes_out_of_a_block_of_rays_as_it_went_in(
    columns: list[list[bytes | None]], data: st.DataObject
) -> None:
    from instella_ray.data.ray_data import unwrapped, wrapped

    schema = pa.schema([("image", pa.large_binary()), ("place", pa.int64()), ("names", pa.list_(pa.string()))])
    tables = [
        pa.table([pa.array(c, pa.large_binary()), pa.array(range(len(c)), pa.int64()), [["a"]] * len(c)], schema=schema)
        for c in columns
    ]
    # Ray joins and cuts blocks anywhere between rows.
    block = pa.concat_tables(map(wrapped, tables))
    cut = data.draw(st.integers(0, len(tables)))
    parts = [block.slice(0, cut).combine_chunks(), block.slice(cut)]
    found = [table for part in parts for table in unwrapped(part)]
    assert [table.schema for table in found] == [schema] * len(tables)
    assert [table.to_pylist() for table in found] == [table.to_pylist() for table in tables]


# --- in the calling process


def test_stages_follow_one_another_in_order_and_are_opened_once() -> None:
    opened: list[str] = []

    class Adding:
        def __init__(self, name: str) -> None:
            opened.append(name)
            self.name = name

        def __call__(self, table: pa.Table) -> pa.Table:
            return pa.table({"text": [text + self.name for text in table["text"].to_pylist()]})

    stages = [Stage(lambda: Adding("b"), Pool()), Stage(lambda: Adding("c"), Pool())]
    sources = [lambda text=text: iter([pa.table({"text": [text]})] * 2) for text in "xy"]
    found = [row["text"] for row in run_stages(sources, stages, local=True)]
    assert found == ["xbc", "xbc", "ybc", "ybc"] and opened == ["b", "c"]
    assert [row["text"] for row in run_rows([{"text": "z"}], stages[0], local=True)] == ["zb"]


def test_threads_of_torch_are_as_before_and_one_within() -> None:
    import torch

    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:

        def note(table: pa.Table) -> pa.Table:
            seen.append(torch.get_num_threads())
            return table

        assert list(run_rows([{"a": 1}], Stage(note), local=True)) == [{"a": 1}]
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def interrupted(write: Callable[..., object], after: int) -> Callable[..., object]:
    """``write`` that is Ctrl-C after so many calls."""
    left = [after]

    def run(*args: Any) -> object:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return write(*args)

    return run


def test_ctrl_c_and_resume_make_the_same_files(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instella_ray.data.curation import dedup_job, job
    from instella_ray.runs import read_record

    given = {"input": shards, "output": "x", "filters": COPY_FILTERS, "rows_per_shard": 3, "local": True}
    cfg = CurateConfig.model_validate(given)
    whole = made_by(run_curate, cfg, tmp_path / "whole")
    for module, name in ((job, "_write"), (dedup_job, "write_samples")):
        folder = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted(getattr(module, name), 1))
            run_curate(cfg.model_copy(update={"output": str(folder)}))
        record = read_record(str(folder))
        assert record is not None and record.attempts[-1].status == "interrupted"
        assert not (folder / "ledger.json").exists()
        assert made_by(run_curate, cfg, folder, mode="resume") == whole


@pytest.mark.process
def test_local_jobs_never_load_ray(shards: str, tmp_path: Path) -> None:
    """In a process of its own: what this one has imported is no measure."""
    make_tokenizer(tmp_path / "bit")
    write_tar(str(tmp_path / "one" / "0.tar"), [("a", image_bytes(1), "a ball", {})])
    jobs = {
        "curate": ["input={tmp}/one", "output={tmp}/curated", "filters.resolution.target_size=16"],
        "encode": ["input={tmp}/curated", "tokenizer={tmp}/bit", "output={tmp}/codes"],
        "evaluate": ["images={tmp}/curated", "tokenizer={tmp}/bit", "output={tmp}/measured"],
    }
    lines = ["import sys", "from tests.kit.project import job"]
    for name, sets in jobs.items():
        argv = ["--local", *(word for each in sets for word in ("--set", each.format(tmp=tmp_path)))]
        lines.append(f"assert job({name!r})({argv!r}) == 0")
        lines.append("assert 'ray' not in sys.modules")
        if name == "curate":
            lines.append("assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "codes" / "manifest.json").exists() and (tmp_path / "measured" / "report.html").exists()
