"""Samples of an evaluation that are made again, larger and with their steps, on a page: the worst by a metric, or the best.

A sample is a function of its run, its text, its number and its seed, which the results name; so these are the bits that
were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from .. import logs, storage
from ..bulk.decode import SampleDecoder, check_tokenizer, image_metadata, image_name
from ..bulk.plan import Planned, sample_seed
from ..bulk.sample_set import SampleBlock, SampleRun, find_sample_sets, library_versions
from ..bulk.sampler import Sampler, SamplerOptions
from ..config import Config, InputPath, OutputPath
from ..data.formats.images import encode_image
from ..data.formats.parts import open_output
from ..data.model_provenance import model_provenance
from ..data.prompts import Prompt
from ..engine.slots import EngineOptions
from ..errors import UserError
from ..models.checkpoint import weight_hash
from ..models.folders import find_model
from ..models.text_encoder import TextEncoderConfig
from ..rendering import flat, render
from ..runs import recorded
from .metrics.rates import RateMetric
from .metrics.samples import SampleMetric
from .results import RESULTS, Evaluation
from .select import Shown, best_and_worst

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("resample.html.j2")
DEFAULT_COUNT = 20


class ResampleConfig(Config):
    """Which samples of an evaluation to make again, and where."""

    results: InputPath
    """Folder of an evaluation of samples, or its results.json."""
    setting: str | None = None
    """Setting of a sweep; none means the only one."""
    metric: str | None = None
    """Metric to choose by; none means the first that scores single samples."""
    worst: int | None = Field(None, ge=0)
    """Number of worst samples, for rates of incorrect ones; 20 if ``best`` is not given either."""
    best: int | None = Field(None, ge=0)
    """Number of best samples."""
    output: OutputPath | None = None
    """Folder for the images and index.html; none means ``resampled-METRIC`` beside the results."""
    mode: Literal["new", "fresh"] = "new"
    """If the output exists: new fails, fresh starts over."""
    model: InputPath | None = None
    """Model folder of the generator; none means where it was."""
    tokenizer: InputPath | None = None
    """Model folder of the tokenizer; none means where it was."""
    size: int | None = Field(None, ge=1)
    """Edge of the images (px); none means twice the tokenizer's ``image_size``. Steps are shown at that size itself."""
    steps: int = Field(8, ge=1)
    """Largest number of steps to show of each sample, the last one included."""
    batch_size: int = Field(16, ge=1)
    """Samples at once; does not affect them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device; the bits are those that were measured on the kind of device that made them."""


class Chosen(NamedTuple):
    """Sample to make again."""

    place: str
    """``worst 1``, ``best 3``."""
    shown: Shown
    sample: Planned


def run_resample(cfg: ResampleConfig) -> str:
    """Make the chosen samples again, write images and a page, and return the page's path.

    Raises UserError for results without scores of single samples, for models that are not those of the evaluation, for a
    size that the tokenizer cannot decode, and for an output that exists.
    """
    evaluation = Evaluation(storage.absolute(cfg.results.rstrip("/")).removesuffix(f"/{RESULTS}"))
    setting = _setting(evaluation, cfg)
    name, metric = _metric(evaluation, setting, cfg.metric)
    about = evaluation.settings[setting]["about"]
    run = SampleRun.model_validate({field: about[field] for field in SampleRun.model_fields if field in about})
    if run.by_prompt:
        raise UserError(
            f"{cfg.results}: prompts with settings of their own, which an evaluation does not keep; sample anew"
        )
    chosen = _choose(evaluation, setting, metric, run, cfg)
    model = _model("model", cfg.model or run.model, run.model_hash)
    tokenizer = _model("tokenizer", cfg.tokenizer or evaluation.card["tokenizer"], run.tokenizer_hash)
    small = check_tokenizer(tokenizer, None, run.tokenizer_hash, model)
    size = check_tokenizer(tokenizer, cfg.size or 2 * small, run.tokenizer_hash, model)
    beside = storage.join(evaluation.folder, "-".join(filter(None, ("resampled", setting, name))))
    output = storage.absolute(cfg.output or beside)
    open_output(output, cfg.mode, {"run": about["run_id"], "metric": name, "size": size})
    inputs = (model_provenance("generator", model, run.model_hash), model_provenance("tokenizer", tokenizer))
    with recorded(output, "sample", cfg, inputs):
        steps = _sample(cfg, model, run, [each.sample for each in chosen])
        decoders = [SampleDecoder(tokenizer, px, batch_size=cfg.batch_size, device=cfg.device) for px in (size, small)]
        rows = [
            _write(output, number, each, made, run, decoders)
            for number, (each, made) in enumerate(zip(chosen, steps, strict=True), 1)
        ]
        page = render(
            TEMPLATE,
            rows=rows,
            metric=metric.info.name,
            setting=setting,
            run=run,
            size=size,
            bits=_compared(evaluation, setting, chosen, steps),
            flat=flat,
        )
        storage.write_text(storage.join(output, PAGE), page)
    return storage.join(output, PAGE)


def _setting(evaluation: Evaluation, cfg: ResampleConfig) -> str:
    if evaluation.card["measured_inputs"] != "samples":
        raise UserError(
            f"{cfg.results}: an evaluation of {evaluation.card['measured_inputs']}, expected one of samples"
        )
    names = list(evaluation.settings)
    if cfg.setting is None and len(names) == 1:
        return names[0]
    if cfg.setting not in names:
        given = f"no setting '{cfg.setting}'" if cfg.setting is not None else "several settings"
        raise UserError(f"{cfg.results}: {given}; expected setting to be one of {', '.join(names)}")
    return cfg.setting


def _metric(evaluation: Evaluation, setting: str, wanted: str | None) -> tuple[str, RateMetric | SampleMetric]:
    """Return the metric to choose by, and its name in the results; UserError if there is none."""
    measured = evaluation.settings[setting]["metrics"]
    scored = [name for name in measured if name in evaluation.settings[setting]["shown"]["worst"]]
    found = next((name for name in scored if wanted in (None, name, measured[name]["name"])), None)
    if found is None and scored:
        raise UserError(f"metric {wanted}: does not score single samples, expected one of {', '.join(scored)}")
    if found is None:
        expected = "scene_score, geneval, clip_score or image_reward"
        raise UserError(f"{evaluation.folder}: no metric scores single samples; expected an evaluation with {expected}")
    metric = evaluation.metric(setting, found)
    assert isinstance(metric, RateMetric | SampleMetric)
    return found, metric


def _choose(
    evaluation: Evaluation, setting: str, metric: RateMetric | SampleMetric, run: SampleRun, cfg: ResampleConfig
) -> list[Chosen]:
    worst = DEFAULT_COUNT if cfg.worst is cfg.best is None else cfg.worst or 0
    ends = best_and_worst(metric, max(worst, cfg.best or 0))
    asked, found = evaluation.asked(setting), list[Chosen]()
    for end, shown in (("worst", ends[1][:worst]), ("best", ends[0][: cfg.best or 0])):
        for place, each in enumerate(shown, 1):
            prompt_id, _, index = each.id.rpartition("/")
            text = asked[each.id][0]
            sample = Planned(Prompt(prompt_id, text), int(index), sample_seed(run.seed, text, int(index)))
            found.append(Chosen(f"{end} {place}", each, sample))
    if not found:
        none = "" if worst + (cfg.best or 0) == 0 else f", as {metric.info.name} found none that is incorrect"
        raise UserError(f"{evaluation.folder}: no sample to make again{none}")
    return found


def _model(key: str, path: str | None, expected: str | None) -> str:
    """Return the folder of a model; UserError if it is not there, or has other weights than the evaluation's."""
    if path is None:
        raise UserError(f"{key}: missing, as the samples were evaluated as codes; expected --set {key}=FOLDER")
    folder = find_model(path)
    if not storage.exists(folder):
        raise UserError(f"{key} {path}: no such folder; expected --set {key}=FOLDER, where it is now")
    if (found := weight_hash(folder)) != expected:
        raise UserError(f"{key} {path}: weights {found[:12]}, expected {str(expected)[:12]}, those of the evaluation")
    return folder


def _sample(
    cfg: ResampleConfig, model: str, run: SampleRun, samples: Sequence[Planned]
) -> list[list[tuple[int, np.ndarray]]]:
    """Return the shown steps of each sample: number of completed steps, and bits."""
    encoder = TextEncoderConfig(**{**(run.text_encoder or {}), "max_length": run.text_length})
    engine = EngineOptions(cfg.batch_size, run.text_length, quantization=run.quantization)
    sampler = Sampler(SamplerOptions(model, encoder, engine, run.precision, device=cfg.device))  # type: ignore[arg-type]
    total = run.num_tokens if run.kind == "ar" else run.sampling.num_inference_steps
    every = math.ceil(total / cfg.steps)
    made: list[list[tuple[int, np.ndarray]]] = [[] for _ in samples]
    with logs.progress_bar(total=len(samples), desc="sample again", unit="image") as bar:
        for number, step, codes in sampler.run_with_steps(samples, run.sampling, every):
            made[number].append((step, codes))
            bar.update(step == total)
    return made


def _write(
    output: str,
    number: int,
    chosen: Chosen,
    steps: Sequence[tuple[int, np.ndarray]],
    run: SampleRun,
    decoders: Sequence[SampleDecoder],
) -> dict[str, Any]:
    """Write the images of a sample; returns its row of the page, with their paths relative to it."""
    prompt, index, seed = chosen.sample.prompt, chosen.sample.index, chosen.sample.seed
    block = SampleBlock(
        [chosen.shown.id], [prompt.id], [index], [prompt.text], [None], [{}], [seed], steps[-1][1][None]
    )
    about = {**image_metadata(run, block, 0), "format": "png", "versions": {"sampling": library_versions()}}
    name = f"{number:03d}-{image_name(seed, prompt.text)}"
    large, small = decoders
    (final,) = large.images(block.codes)
    files = [f"{name}.png"]
    storage.write_bytes(storage.join(output, files[0]), encode_image(final, "png", {**about, "size": large.size}))
    images = small.images(np.stack([codes for _, codes in steps]))
    for (step, _), image in zip(steps, images, strict=True):
        files.append(f"steps/{name}-{step:04d}.png")
        facts = {**about, "size": small.size, "step": step, "steps": steps[-1][0]}
        storage.write_bytes(storage.join(output, files[-1]), encode_image(image, "png", facts))
    return {
        "place": chosen.place,
        "id": chosen.shown.id,
        "score": chosen.shown.score,
        "reason": chosen.shown.reason,
        "prompt": prompt.text,
        "seed": seed,
        "image": files[0],
        "steps": [(step, file) for (step, _), file in zip(steps, files[1:], strict=True)],
    }


def _compared(
    evaluation: Evaluation,
    setting: str,
    chosen: Sequence[Chosen],
    steps: Sequence[Sequence[tuple[int, np.ndarray]]],
) -> str:
    """Return a sentence on whether the bits are those of the samples that were evaluated, if these are still there."""
    folder, names = evaluation.card["source"], {each.shown.id for each in chosen}
    measured: dict[str, np.ndarray] = {}
    try:
        samples = find_sample_sets(folder)[setting]
        if samples.manifest.run_id == evaluation.settings[setting]["about"]["run_id"]:
            for block in samples.blocks():
                measured.update((i, codes) for i, codes in zip(block.ids, block.codes, strict=True) if i in names)
    except (UserError, KeyError):
        measured = {}
    if measured.keys() != names:
        return f"The evaluated samples are no longer in {folder}, so the bits could not be compared with theirs."
    pairs = [(measured[each.shown.id], made[-1][1]) for each, made in zip(chosen, steps, strict=True)]
    different = sum(not np.array_equal(*pair) for pair in pairs)
    if not different:
        return "All bits are those of the evaluated samples."
    return f"The bits of {different} of {len(pairs)} differ from the evaluated samples: other hardware, threads or versions."
