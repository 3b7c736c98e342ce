"""Images of samples: nothing stops all of them, what cannot work is told before, and each file makes itself again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instella_ray.bulk.decode import DecodeConfig, SampleDecoder, check_decode, image_name, run_decode
from instella_ray.bulk.plan import Planned, SampleConfig, plan_samples
from instella_ray.bulk.sample import run_sample
from instella_ray.bulk.sample_set import SampleSet
from instella_ray.bulk.sampler import Sampler, SamplerOptions
from instella_ray.commands.sample import job
from instella_ray.data.formats.images import decode_rgb, read_metadata
from instella_ray.data.prompts import Prompt
from instella_ray.data.ray_data import StageActor, StageError, wrapped
from instella_ray.data.stages import Pool, Stage
from instella_ray.engine.slots import EngineOptions
from instella_ray.errors import UserError, run_main, task_error
from instella_ray.models.checkpoint import weight_hash
from instella_ray.models.sampling import SamplingConfig
from instella_ray.models.text_encoder import TextEncoderConfig

from ..kit.models import make_generator, make_tokenizer

LONG = "a very detailed castle " * 3500


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a generator of its codes, and one of another's."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(root / "bit")
    make_generator(root / "generator", tokenizer)
    make_generator(root / "other", "ab" * 32)
    return root


def sampled(models: Path, output: Path, texts: str, **changes: Any) -> SampleConfig:
    """Samples of prompts in a text file, in this process."""
    file = output.parent / "prompts.txt"
    file.write_text(texts)
    given = {"model": str(models / "generator"), "prompts": str(file), "output": str(output), "local": True}
    quick = {"sampling": {"num_inference_steps": 2}, "text_length": 24, "samples_per_file": 2, "batch_size": 4}
    cfg = SampleConfig.model_validate({**given, **quick, **changes})
    run_sample(cfg)
    return cfg


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tar"])
def test_one_long_prompt_stops_no_other_image(models: Path, tmp_path: Path, kind: Any) -> None:
    sampled(models, tmp_path / "out", f"a small cat\n{LONG}\na dog\n")
    cfg = DecodeConfig(format=kind, tokenizer=str(models / "bit"))
    assert run_decode(cfg, str(tmp_path / "out"), local=True) == 3
    if kind == "tar":
        return
    about = [read_metadata(path.read_bytes()) or {} for path in (tmp_path / "out" / "images-32").iterdir()]
    prompts = {found["prompt"]: "prompt_truncated" in found for found in about}
    (long,) = prompts.keys() - {"a small cat", "a dog"}
    assert LONG.startswith(long) and len(prompts) == 3
    assert prompts[long] == (kind != "png") and (long == LONG.strip()) == (kind == "png")


def test_a_file_holds_all_that_makes_its_pixels_again(models: Path, tmp_path: Path) -> None:
    sampling = {"num_inference_steps": 3, "guidance_scale": 2.0, "temperature": 0.7, "sampler": "posterior", "rho": 1.5}
    settings: dict[str, Any] = {"sampling": sampling, "images_per_prompt": 2, "quantization": "int8", "seed": 5}
    sampled(models, tmp_path / "out", "a cat\nété 猫\n", **settings)
    run_decode(DecodeConfig(format="png", tokenizer=str(models / "bit"), size=48), str(tmp_path / "out"), local=True)
    files = sorted((tmp_path / "out" / "images-48").iterdir())
    assert len(files) == 4
    for file in files[::3]:
        about: Any = read_metadata(file.read_bytes())
        found = {weight_hash(folder): str(folder) for folder in (models / "bit", models / "generator")}
        encoder = TextEncoderConfig(**{**about["text_encoder"], "max_length": about["text_length"]})
        engine = EngineOptions(1, about["text_length"], quantization=about["quantization"])
        generator = found[about["weights"]["generator"]]
        sampler = Sampler(SamplerOptions(generator, encoder, engine, about["precision"], device="cpu"))
        settings = {name: about[name] for name in SamplingConfig.model_fields}
        sample = Planned(Prompt(about["prompt_id"], about["prompt"]), about["index"], about["seed"])
        codes = sampler.run([sample], {"": SamplingConfig(**settings)})[""]
        (pixels,) = SampleDecoder(found[about["weights"]["tokenizer"]], about["size"]).images(codes)
        assert np.array_equal(pixels, np.asarray(decode_rgb(file.read_bytes())))
        assert about["format"] == "png" and about["kind"] == "diffusion" and about["model_name"].endswith("/generator")
        assert {*about["versions"]} == {"sampling", "decoding"} and about["versions"]["sampling"]["torch"]


def test_a_prompt_has_its_own_settings_and_size(models: Path, tmp_path: Path) -> None:
    """Its bits are those of a run with these settings, and its file says them."""
    own = {"num_inference_steps": 3, "guidance_scale": 2.0, "temperature": 0.7, "sampler": "posterior"}
    rows = [
        {"prompt": "a cat", "settings": {**own, "size": 64}},
        {"prompt": "a dog"},
        {"prompt": "a cow", "settings": {"rho": 2.0}},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"model": str(models / "generator"), "output": str(tmp_path / "out"), "local": True, "text_length": 24}
    quick = {"sampling": {"num_inference_steps": 2}, "batch_size": 4, "prompts": str(tmp_path / "p.jsonl")}
    (manifest,) = run_sample(SampleConfig.model_validate({**given, **quick})).values()
    assert manifest.run.by_prompt == ("guidance_scale", "num_inference_steps", "rho", "sampler", "size", "temperature")
    found = SampleSet(str(tmp_path / "out")).block(0).codes
    for row, sampling in enumerate((own, {"num_inference_steps": 2}, {"num_inference_steps": 2, "rho": 2.0})):
        (tmp_path / "one.txt").write_text(rows[row]["prompt"])  # type: ignore[arg-type]
        alone = {"sampling": sampling, "prompts": str(tmp_path / "one.txt"), "output": str(tmp_path / f"{row}")}
        run_sample(SampleConfig.model_validate({**given, **quick, **alone}))
        assert np.array_equal(SampleSet(str(tmp_path / f"{row}")).block(0).codes[0], found[row])
    cfg = DecodeConfig(format="png", tokenizer=str(models / "bit"))
    assert run_decode(cfg, str(tmp_path / "out"), local=True) == 3
    (cat,) = (tmp_path / "out" / "images-64").iterdir()
    about: Any = read_metadata(cat.read_bytes())
    assert (
        decode_rgb(cat.read_bytes()).size == (64, 64)
        and {name: about[name] for name in own} == own
        and about["size"] == 64
    )
    assert len(list((tmp_path / "out" / "images-32").iterdir())) == 2
    assert run_decode(cfg, str(tmp_path / "out"), local=True) == 3  # and makes none again


def test_a_size_of_a_prompt_that_cannot_be_decoded_is_told_before_the_first_sample(
    models: Path, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "settings": {"size": 33}}))
    words = [
        f"sample.model={models / 'generator'}",
        f"decode.tokenizer={models / 'bit'}",
        f"sample.output={tmp_path / 'out'}",
    ]
    words += [f"sample.prompts={tmp_path / 'p.jsonl'}", "decode.format=png"]
    assert run_main(lambda: job.main(["--local", *(f"--set={word}" for word in words)])) == 2
    assert "size 33: not a multiple of 8" in caplog.text and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "generator"}, "holds a DiffusionGenerator, expected a BIT"),
        ({"tokenizer": "none"}, "none"),
        ({"size": 33}, "size 33: not a multiple of 8"),
        ({"size": 80_000}, "size 80000: more than 64,000,000 pixels"),
        ({"model": "other"}, "codes of another tokenizer than"),
    ],
)
def test_what_cannot_be_decoded_is_told_before_the_first_sample(
    models: Path, tmp_path: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"model": "generator", "tokenizer": "bit", "size": 32, **changes}
    words = [f"sample.model={models / given['model']}", f"decode.tokenizer={models / given['tokenizer']}"]
    words += [
        f"decode.size={given['size']}",
        f"sample.output={tmp_path / 'out'}",
        "sample.count=2",
        "decode.format=png",
    ]
    assert run_main(lambda: job.main(["--local", *(f"--set={word}" for word in words)])) == 2
    assert message in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_format_without_a_tokenizer_is_told_before_the_first_sample(models: Path) -> None:
    with pytest.raises(UserError, match="expected a format and a tokenizer"):
        check_decode(DecodeConfig(format="png"), str(models / "generator"))


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_is_no_folder_is_refused(models: Path, tmp_path: Path, output: str, caplog: Any) -> None:
    (tmp_path / "file").write_text("mine")
    words = [f"sample.model={models / 'generator'}", f"sample.output={tmp_path / output}", "sample.count=1"]
    assert run_main(lambda: job.main(["--local", *(f"--set={word}" for word in words)])) == 2
    assert (tmp_path / "file").read_text() == "mine" and str(tmp_path / "file") in caplog.text


@pytest.mark.parametrize("name", ["a #1", "50% [x] *?", "[a-z]", "été 猫 {0..2}", "x%20y", "a::b"])
def test_samples_are_made_resumed_and_decoded_in_folders_of_any_name(models: Path, tmp_path: Path, name: str) -> None:
    # What such names would match, were they patterns.
    for other in ("b", "50% x yz"):
        (tmp_path / other / "images-32").mkdir(parents=True)
        (tmp_path / other / "images-32" / "mine.png").write_bytes(b"")
    cfg = sampled(models, tmp_path / name, "a cat\na dog\na red cube\n")
    (first, second) = sorted((tmp_path / name).glob("samples-*.parquet"))
    kept, whole = second.stat().st_mtime_ns, first.read_bytes()
    first.write_bytes(whole[:-5])
    run_sample(cfg.model_copy(update={"mode": "resume"}))
    assert pq.read_table(first).num_rows == 2 and second.stat().st_mtime_ns == kept
    decode = DecodeConfig(format="png", tokenizer=str(models / "bit"))
    for _ in range(2):
        assert run_decode(decode, str(tmp_path / name), local=True) == 3
    made = sorted((tmp_path / name / "images-32").iterdir())
    assert len(made) == 3
    made[0].unlink()
    assert run_decode(decode, str(tmp_path / name), local=True) == 3 and made[0].exists()
    run_sample(cfg.model_copy(update={"mode": "fresh"}))
    assert not made[0].exists() and (tmp_path / "b" / "images-32" / "mine.png").exists()


def test_no_two_samples_have_a_file_name_in_common_not_even_in_another_case() -> None:
    texts = ["Cat", "cat", "CAT!", "cat?", "cat", "猫", "犬", "", "a" * 300, "a" * 301, "../cat", "CON", "nul"]
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    names = [image_name(sample.seed, sample.prompt.text) for sample in plan_samples(prompts, 3, 0)]
    assert len({name.casefold() for name in names}) == len(names) == 3 * len(texts)
    assert all(len(name) <= 80 and name.isascii() and name[:16].isalnum() and "." not in name for name in names)


def test_metadata_of_samples_is_strict_json(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "score": NaN, "box": [Infinity, {"x": NaN}]}\n')
    sampled(models, tmp_path / "out", "", prompts=str(file))
    (meta,) = pq.read_table(tmp_path / "out" / "samples-00000.parquet")["meta"].to_pylist()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(meta, parse_constant=refuse) == {"score": None, "box": [None, {"x": None}]}
    with pytest.raises(ValueError, match="finite number"):
        SampleConfig(model="m", output="o", price_per_hour=float("inf"))


def test_an_actor_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    def start() -> Any:
        raise UserError("text encoder 'none': cannot be loaded")

    actor = StageActor(Stage(start, Pool()))
    with pytest.raises(StageError) as stopped:
        list(actor(wrapped(pa.table({"unit": [0]}))))
    found = task_error(stopped.value)
    assert isinstance(found, UserError) and str(found) == "text encoder 'none': cannot be loaded"
