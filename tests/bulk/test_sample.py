"""Bulk samples: the same bits whatever makes them, each exactly once, and nothing wrong goes unnamed."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from instella_ray.bulk import decode
from instella_ray.bulk.decode import DecodeConfig, run_decode
from instella_ray.bulk.decode import DecodeWorker as Decoding
from instella_ray.bulk.plan import SampleConfig, Sweep
from instella_ray.bulk.sample import plan_job, run_sample
from instella_ray.bulk.sample_set import BadFile, SampleSet, find_sample_sets, write_block
from instella_ray.bulk.sampler import Sampler
from instella_ray.data.formats.images import read_metadata
from instella_ray.engine.engine import Request
from instella_ray.engine.events import Finished
from instella_ray.engine.kinds import build_engine
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model, save_model
from instella_ray.models.sampling import SamplingConfig, SamplingParams

from ..kit.models import make_generator, make_tokenizer
from ..kit.processes import descendants
from ..kit.project import ROOT

PROMPTS = ["a cat", "", "two red squares", "a cat", "words " * 60, "été 猫"]
SETTINGS = {
    "quick": SamplingConfig(num_inference_steps=3, guidance_scale=2, temperature=0.5),
    "slow": SamplingConfig(num_inference_steps=11, guidance_scale=0, sampler="posterior", final_draw=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random tokenizer, a generator of each kind, and prompts in a file."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(root / "bit")
    prompts = root / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": text or "x", "id": f"../{i}"}) for i, text in enumerate(PROMPTS))
    )
    made = {kind: make_generator(root / kind, tokenizer, kind) for kind in ("diffusion", "ar")}
    return {"bit": str(root / "bit"), "prompts": str(prompts), **made}


def config(folders: dict[str, str], output: Path, kind: str = "diffusion", **changes: Any) -> SampleConfig:
    given = {
        "model": folders[kind],
        "prompts": folders["prompts"],
        "output": str(output),
        "images_per_prompt": 3,
        "sampling": SETTINGS["quick"],
        "samples_per_file": 4,
        "text_length": 24,
        "local": True,
    }
    return SampleConfig.model_validate({**given, **changes})


def contents(folder: Path) -> dict[str, tuple[str, int, bytes]]:
    """Prompt, seed and bits by sample id; each must be there once."""
    found = {}
    for samples in find_sample_sets(str(folder)).values():
        for block in samples.blocks():
            for i, name in enumerate(block.ids):
                key = f"{samples.folder.removeprefix(str(folder))}:{name}"
                assert key not in found
                found[key] = (block.prompts[i], block.seeds[i], block.codes[i].tobytes())
    return found


def directly(cfg: SampleConfig) -> dict[str, tuple[str, int, bytes]]:
    """The contents of a job's folder, made in this process at one go."""
    job = plan_job(cfg)
    codes = Sampler(job.sampler).run(job.samples, {"": job.runs[""].sampling})[""]
    return {
        f":{s.prompt.id}/{s.index}": (s.prompt.text, s.seed, bits.tobytes())
        for s, bits in zip(job.samples, codes, strict=True)
    }


# --- without Ray


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_bits_depend_on_no_batch_size_and_no_company(folders: dict[str, str], tmp_path: Path, kind: str) -> None:
    made = {}
    for batch_size in (1, 7, 16):
        job = plan_job(config(folders, tmp_path, kind, batch_size=batch_size))
        made[batch_size] = Sampler(job.sampler).run(job.samples, SETTINGS)
    for name in SETTINGS:
        assert np.array_equal(made[1][name], made[7][name]) and np.array_equal(made[1][name], made[16][name])
        alone = Sampler(job.sampler).run(job.samples[5:6], {name: SETTINGS[name]})[name]
        assert np.array_equal(alone[0], made[16][name][5])
    # "a cat" comes twice among the prompts, and no image does.
    assert len({codes.tobytes() for codes in made[16]["slow"]}) == len(PROMPTS) * 3


def test_only_prompts_that_come_again_are_cached(folders: dict[str, str], tmp_path: Path) -> None:
    job = plan_job(config(folders, tmp_path))
    sampler = Sampler(job.sampler)
    cached, first = sampler.engine.slots.project.cache.items, job.samples[0]
    sampler.run([first], {"slow": SETTINGS["slow"]})
    assert not cached
    sampler.run([first], SETTINGS)
    assert list(cached) == [first.prompt.text]


def test_bits_are_those_of_a_request_with_the_samples_seed(folders: dict[str, str], tmp_path: Path) -> None:
    job = plan_job(config(folders, tmp_path))
    sampler = Sampler(job.sampler)
    made = sampler.run(job.samples, SETTINGS)["slow"]
    model: Any = load_model(folders["diffusion"])
    for number in (0, 7, 13):
        sample = job.samples[number]
        features, mask = sampler.encoder.encode([sample.prompt.text])
        empty, none = sampler.encoder.encode([""])
        engine = build_engine(model, empty[:, 0, none[0]], EngineOptions(slots=6, text_length=24))
        params = SamplingParams.of(1, seed=sample.seed, **SETTINGS["slow"].model_dump())
        engine.submit(Request("x", features[:, 0, mask[0]], params))
        events = [event for _ in range(11) for event in engine.step()]
        assert isinstance(events[0], Finished) and torch.equal(events[0].codes, torch.from_numpy(made[number]))


def test_everything_that_counts_is_part_of_the_run(folders: dict[str, str], tmp_path: Path) -> None:
    base = plan_job(config(folders, tmp_path)).runs[""]
    changes: list[dict[str, Any]] = [
        {"kind": "ar"},
        {"seed": 1},
        {"images_per_prompt": 2},
        {"sampling": SETTINGS["slow"]},
        {"text_length": 5},
        {"precision": "bf16"},
        {"prompts": "scenes"},
    ]
    others = [plan_job(config(folders, tmp_path, **change)).runs[""].id for change in changes]
    assert len({base.id, *others}) == len(changes) + 1
    same: list[dict[str, Any]] = [{"batch_size": 2}, {"samples_per_file": 9}, {"actors": 2}, {"price_per_hour": 3}]
    assert {plan_job(config(folders, tmp_path, **change)).runs[""].id for change in same} == {base.id}


# --- files


@pytest.fixture(scope="module")
def finished(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of 18 samples in 5 files; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run_sample(config(folders, folder))
    return folder


def test_an_output_is_never_overwritten_or_mixed(finished: Path, folders: dict[str, str], tmp_path: Path) -> None:
    cfg, before = config(folders, finished), contents(finished)
    with pytest.raises(UserError, match="exists already"):
        run_sample(cfg)
    with pytest.raises(UserError, match="made with seed=0, now 1"):
        run_sample(cfg.model_copy(update={"mode": "resume", "seed": 1}))
    assert run_sample(cfg.model_copy(update={"mode": "resume"}))[""].rows == 18 and contents(finished) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not made by this job"):
        run_sample(config(folders, tmp_path / "foreign", mode="fresh"))
    with pytest.raises(UserError, match="autoregressive models have none"):
        run_sample(config(folders, tmp_path / "x", "ar", sweep=Sweep(num_inference_steps=(1, 2))))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tar"])
def test_codes_become_images_of_any_size(finished: Path, folders: dict[str, str], tmp_path: Path, kind: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    worker = Decoding(DecodeConfig(format=kind, tokenizer=folders["bit"], batch_size=4), str(out), 64)
    for number in range(5):
        worker(pa.table({"setting": [""], "number": [number]}))
    if kind == "tar":
        tars = sorted((out / "images-64").glob("*.tar"))
        files = {name: data for path in tars for name, data in members(path)}
        assert len(tars) == 5 and len(files) == 3 * 18
        captions = {data.decode() for name, data in files.items() if name.endswith(".txt")}
        assert captions == {text.strip() or "x" for text in PROMPTS}
        images = [data for name, data in files.items() if name.endswith(".png")]
    else:
        images = [path.read_bytes() for path in (out / "images-64").glob(f"*.{kind}")]
    assert len(images) == 18
    for data in images:
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        about = read_metadata(data)
        assert about is not None and about["num_inference_steps"] == 3 and about["seed"] >= 0
    # Ids of the prompts led out of the folder, file names do not.
    assert {path.parent.name for path in tmp_path.rglob(f"*.{kind}")} == {"images-64"}


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def test_codes_of_another_tokenizer_are_not_decoded(finished: Path, folders: dict[str, str], tmp_path: Path) -> None:
    bit = load_model(folders["bit"])
    for parameter in bit.parameters():
        parameter.add_(1)
    (tmp_path / "bit").mkdir()
    save_model(tmp_path / "bit", bit)
    with pytest.raises(UserError, match="codes of another tokenizer"):
        run_decode(DecodeConfig(format="png", tokenizer=str(tmp_path / "bit")), str(finished))
    with pytest.raises(UserError, match="size 33: not a multiple"):
        run_decode(DecodeConfig(format="png", tokenizer=folders["bit"], size=33), str(finished))


# --- with Ray


@pytest.mark.ray
@pytest.mark.nightly
def test_two_actors_a_sweep_and_other_files_change_no_bit(
    ray_session: None, folders: dict[str, str], tmp_path: Path
) -> None:
    sweep = Sweep(num_inference_steps=(2, 9), guidance_scale=(0, 3))
    cfg = config(folders, tmp_path / "out", sweep=sweep, actors=2, samples_per_file=5, local=False)
    manifests = run_sample(cfg)
    assert len(manifests) == 4 and all(m.rows == 18 and len(m.files) == 4 for m in manifests.values())
    found = contents(tmp_path / "out")
    assert len(found) == 4 * 18
    for name, manifest in manifests.items():
        cfg = config(folders, tmp_path, sampling=manifest.run.sampling, batch_size=5)
        assert plan_job(cfg).runs[""].id == manifest.run_id
        assert {k.removeprefix(f"/{name}"): v for k, v in found.items() if k.startswith(f"/{name}:")} == directly(cfg)


def test_what_is_damaged_foreign_or_missing_is_named_and_made_anew(
    finished: Path, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    cfg, whole = config(folders, out), contents(finished)
    other = plan_job(config(folders, out, seed=1)).runs[""]
    files = sorted(out.glob("samples-*.parquet"))
    assert len(files) == 5 and len(whole) == 18
    data = bytearray(files[0].read_bytes())
    data[len(data) // 3] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-9])
    files[2].unlink()
    write_block(str(files[3]), SampleSet(str(finished)).block(3), other, 1.0)
    (out / "samples-00099.parquet").write_bytes(b"?")
    samples = SampleSet(str(out))
    for number, problem in enumerate(["damaged", "damaged", "missing", "of another run"]):
        with pytest.raises(BadFile, match=f"{files[number].name}: {problem}.* mode=resume"):
            samples.block(number)
    kept = files[4].stat().st_mtime_ns
    run_sample(cfg.model_copy(update={"mode": "resume"}))
    said = caplog.text
    assert contents(out) == whole and files[4].stat().st_mtime_ns == kept
    assert all(f"{name}: " in said for name in (files[0], files[1], files[3], out / "samples-00099.parquet"))
    aside = {path.name for path in (out / "quarantine").iterdir()}
    assert aside == {files[0].name, files[1].name, files[3].name, "samples-00099.parquet"}


def test_images_that_are_there_are_not_decoded_again(finished: Path, folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    cfg = DecodeConfig(format="png", tokenizer=folders["bit"], batch_size=4)
    assert run_decode(cfg, str(out), local=True) == 18
    made = {path: path.stat().st_mtime_ns for path in (out / "images-32").iterdir()}
    assert len(made) == 18
    assert run_decode(cfg, str(out), local=True) == 18
    assert {path: path.stat().st_mtime_ns for path in (out / "images-32").iterdir()} == made


def test_the_next_batch_is_decoded_while_files_are_encoded(
    finished: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the first batch is done before a second one is decoded; the number of threads changes no file."""
    one, two = (shutil.copytree(finished, tmp_path / name) for name in ("one", "two"))
    given = {"format": "png", "tokenizer": folders["bit"], "batch_size": 1}
    run_decode(DecodeConfig.model_validate({**given, "file_threads": 1}), str(one), local=True)
    encode, to_pixels, second, batches = decode.encode_image, decode.to_pixels, threading.Event(), itertools.count(1)

    def waiting(*args: Any) -> bytes:
        assert second.wait(20)
        return encode(*args)

    def counting(images: Tensor) -> np.ndarray:
        if next(batches) == 2:
            second.set()
        return to_pixels(images)

    monkeypatch.setattr(decode, "encode_image", waiting)
    monkeypatch.setattr(decode, "to_pixels", counting)
    run_decode(DecodeConfig.model_validate(given), str(two), local=True)
    first, again = ({path.name: path.read_bytes() for path in (out / "images-32").iterdir()} for out in (one, two))
    assert len(first) == 18 and first == again


# --- and with kill -9


@pytest.mark.ray
@pytest.mark.slow
def test_killed_actors_and_drivers_cost_time_and_nothing_else(
    ray_session: None, folders: dict[str, str], tmp_path: Path
) -> None:
    slow = {"num_inference_steps": 400, "guidance_scale": 2.0}
    cfg = config(folders, tmp_path / "out", sampling=slow, samples_per_file=1, batch_size=2, actors=1, local=False)
    job = command(cfg, tmp_path)

    def files() -> list[Path]:
        return list((tmp_path / "out").glob("samples-*.parquet"))

    try:
        wait_for(lambda: files(), job)
        (victim,) = descendants(b"MapWorker")
        os.kill(victim, signal.SIGKILL)
        before = len(files())
        wait_for(lambda: len(files()) > before + 1 and descendants(b"MapWorker") != [victim], job)
    finally:
        job.kill()
        job.communicate()
    there = {path: path.stat().st_mtime_ns for path in files()}
    assert not (tmp_path / "out" / "manifest.json").exists() and len(there) < 18
    with pytest.raises(UserError, match=r"not a finished folder of samples.*mode=resume"):
        SampleSet(str(tmp_path / "out"))
    run_sample(cfg.model_copy(update={"mode": "resume", "local": True}))
    assert all(path.stat().st_mtime_ns == made for path, made in there.items())
    assert contents(tmp_path / "out") == directly(cfg)


def command(cfg: SampleConfig, tmp_path: Path) -> subprocess.Popen[str]:
    import ray

    file = tmp_path / "sample.yaml"
    file.write_text(yaml.safe_dump({"sample": cfg.model_dump(mode="json")}))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "sample.py"), "--config", str(file)],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Any, job: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0] if job.poll() is not None else "slow"
        time.sleep(0.05)
