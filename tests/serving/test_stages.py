"""The stages as plain classes, without Serve: what they promise each other, and a swap of weights."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from instella_ray.data.formats.images import read_metadata
from instella_ray.engine.weights import serving_dtype
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import weight_hash
from instella_ray.models.text_encoder import TextEncoderConfig
from instella_ray.serving import deployments
from instella_ray.serving.deployments import DecoderStage, GeneratorStage, TextEncoderStage
from instella_ray.serving.runner import DeadlineExceeded, EngineFailed

from ..kit.models import TEXT, make_generator, make_tokenizer
from ..kit.stages import EMPTY, OPTIONS, codes_alone, features, sampling

FOREVER = {"num_inference_steps": 100_000_000}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("stages")
    tokenizer = make_tokenizer(root / "bit")
    make = {
        "old": {},
        "new": {"seed": 2},
        "ar": {"kind": "ar"},
        "longer": {"num_tokens": 5},
        "reader": {"text_encoder": {**TEXT, "max_length": 7}},
    }
    found = {name: make_generator(root / name, tokenizer, **changes) for name, changes in make.items()}  # type: ignore[arg-type]
    return {**found, "stranger": make_generator(root / "stranger", "another"), "bit": str(root / "bit")}


def stage(folders: dict[str, str], **options: Any) -> GeneratorStage:
    return GeneratorStage(folders["old"], EMPTY, OPTIONS, 1, "cpu", **options)


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited 10 s in vain")


def test_generate_and_follow_end_in_the_same_codes(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator = stage(folders)
        wanted = codes_alone(folders["old"], 7, num_inference_steps=9)
        request = features(7), sampling(7, num_inference_steps=9)
        assert np.array_equal((await generator.generate(*request, 60.0)).codes, wanted)
        events = [event async for event in generator.follow(*request, 60.0, preview_every=4)]
        assert [(e["step"], e["steps"]) for e in events[:-1]] == [(4, 9), (8, 9)]
        assert all(e["codes"].dtype == np.uint8 and e["codes"].shape == (4, 6) for e in events)
        assert events[-1]["done"] and np.array_equal(events[-1]["codes"], wanted)
        with pytest.raises(UserError, match="unexpected keyword argument 'stepps'"):
            await generator.generate(features(7), {"stepps": 3})
        with pytest.raises(UserError, match=r"expected \[2, tokens, 384\]"):
            await generator.generate(features(7)[:1], sampling(7))
        with pytest.raises(DeadlineExceeded):
            await generator.generate(features(7), sampling(7, **FOREVER), 0.1)
        # None of these broke the engine for the others.
        assert np.array_equal((await generator.generate(*request, 60.0)).codes, wanted)

    asyncio.run(run())


def test_leaving_a_followed_image_frees_its_slot_at_once(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator = stage(folders)
        events = generator.follow(features(1), sampling(1, **FOREVER), preview_every=1)
        await anext(events)
        assert (await generator.status())["active"] == 1
        gc.disable()  # it must not be the collector that notices
        try:
            await events.aclose()  # type: ignore[attr-defined]
            await until(lambda: generator.runner.stats.active == 0)
        finally:
            gc.enable()

    asyncio.run(run())


def test_weights_are_swapped_and_the_old_ones_are_freed(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator = stage(folders)
        await generator.check_health()
        old = weakref.ref(generator.runner.engine)
        long = sampling(3, num_inference_steps=1000)
        running = [asyncio.create_task(generator.generate(features(3), long, 120.0)) for _ in range(8)]
        await until(lambda: generator.runner.stats.active == OPTIONS.slots)
        await generator.reconfigure({"path": folders["new"]})
        status = await generator.status()
        assert (status["path"], status["engines"], status["refused"]) == (folders["new"], 2, None)
        assert status["active"] + status["waiting"] == 8  # those with the old weights count as load
        assert (await generator.record_autoscaling_stats())["slots"] == OPTIONS.slots
        made = await generator.generate(features(5), sampling(5), 60.0)
        new = made.codes
        assert made.weights == weight_hash(folders["new"])
        assert np.array_equal(new, codes_alone(folders["new"], 5))
        assert not np.array_equal(new, codes_alone(folders["old"], 5))
        wanted = codes_alone(folders["old"], 3, num_inference_steps=1000)
        for old_one in await asyncio.gather(*running):
            assert np.array_equal(old_one.codes, wanted) and old_one.weights == weight_hash(folders["old"])
        await until(lambda: len(generator._runners) == 1)
        running.clear()
        gc.collect()
        assert old() is None
        await generator.check_health()

    asyncio.run(run())


def test_a_cached_prompt_is_projected_again_by_new_weights(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator = stage(folders)
        for version, name in enumerate(("old", "new", "old")):
            await generator.reconfigure({"path": folders[name], "version": str(version)})
            for _ in range(2):
                codes = (await generator.generate(features(5), sampling(5), 60.0, "a prompt")).codes
                assert np.array_equal(codes, codes_alone(folders[name], 5))
            *_, last = [event async for event in generator.follow(features(5), sampling(5), 60.0, 1, "a prompt")]
            assert np.array_equal(last["codes"], codes_alone(folders[name], 5))
            assert list(generator.runner.engine.slots.project.cache.items) == ["a prompt"]

    asyncio.run(run())


def test_a_generator_of_the_other_kind_can_take_over(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator = stage(folders)
        await generator.reconfigure({"path": folders["ar"]})
        codes = (await generator.generate(features(5), sampling(5), 60.0)).codes
        assert np.array_equal(codes, codes_alone(folders["ar"], 5))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "stranger"}, "codes of another tokenizer"),
        ({"path": "reader"}, "another text encoder"),
        ({"path": "longer"}, "generates 5 tokens of 6 bits, expected 4 tokens of 6 bits as the served weights"),
        ({"path": "bit"}, "holds a tokenizer, expected a generator"),
        ({"path": "nowhere"}, "not a model folder"),
        ({"folder": "new"}, "path: Field required"),
        ({"path": "new", "stepps": 3}, "stepps: Extra inputs are not permitted"),
    ],
)
def test_a_swap_that_does_not_fit_is_refused(folders: dict[str, str], config: dict[str, Any], message: str) -> None:
    """A replica that starts says so and stops; one in service says so and goes on with what it has."""
    config = {**config, **({"path": folders.get(config["path"], config["path"])} if "path" in config else {})}

    async def run() -> None:
        generator = stage(folders)
        with pytest.raises(UserError, match=message):
            await generator.reconfigure(config)
        await generator.check_health()
        await generator.reconfigure(config)
        status = await generator.status()
        assert message in status["refused"] and status["path"] == folders["old"]
        codes = (await generator.generate(features(5), sampling(5), 60.0)).codes
        assert np.array_equal(codes, codes_alone(folders["old"], 5))
        await generator.reconfigure({"path": folders["new"]})
        assert (await generator.status())["refused"] is None

    asyncio.run(run())


def test_the_same_weights_are_not_loaded_again_unless_their_version_differs(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = deployments.load_engine
    monkeypatch.setattr(deployments, "load_engine", lambda path, *rest: (loads.append(path), real(path, *rest))[1])

    async def run() -> None:
        generator = stage(folders)
        await generator.reconfigure({"path": folders["old"]})
        assert loads == [folders["old"]]
        await generator.reconfigure({"path": folders["old"], "version": "2"})
        assert loads == [folders["old"]] * 2

    asyncio.run(run())


def test_health_follows_the_engine_and_not_the_port(folders: dict[str, str]) -> None:
    async def run() -> None:
        generator, release = stage(folders, longest_step_s=0.05), threading.Event()
        real = generator.runner.engine.step
        generator.runner.engine.step = lambda: (release.wait(), real())[1]  # type: ignore[method-assign]
        await generator.check_health()
        task = asyncio.create_task(generator.generate(features(1), sampling(1), 60.0))
        await until(lambda: generator.runner.stats.silence_s > 0.05)
        with pytest.raises(EngineFailed, match="not completed a step"):
            await generator.check_health()
        release.set()
        await task
        await generator.check_health()

    asyncio.run(run())


def test_half_precision_is_for_gpus_unless_asked_for(folders: dict[str, str]) -> None:
    assert serving_dtype(torch.device("cpu"), "auto") == torch.float32
    assert serving_dtype(torch.device("cuda"), "auto") == torch.bfloat16

    async def run() -> None:
        generator = stage(folders, precision="bf16")
        assert generator.runner.engine.slots.model.x_embedder.weight.dtype == torch.bfloat16
        alone = (await generator.generate(features(5), sampling(5), 60.0)).codes
        jobs = [generator.generate(features(n), sampling(n), 60.0) for n in range(12)]
        assert np.array_equal((await asyncio.gather(*jobs))[5].codes, alone)
        exact, half = (DecoderStage(folders["bit"], device="cpu", precision=p) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
        files = [await decoder.decode(alone, 32, 32) for decoder in (exact, half)]
        pixels = [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in files]
        assert 0 < abs(pixels[0] - pixels[1]).max() < 32

    asyncio.run(run())


def test_a_prompt_has_the_same_features_in_any_company() -> None:
    prompts = [f"a photo of {n} red circles" + " and more" * (n % 5) for n in range(12)]

    async def run() -> None:
        def encoder(**options: Any) -> TextEncoderStage:
            return TextEncoderStage(TextEncoderConfig(**TEXT), 1, "cpu", **options)

        alone = [await encoder_alone.encode(p) for p in prompts] if (encoder_alone := encoder()) else []
        together = await asyncio.gather(*map(encoder().encode, prompts))
        assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))
        batched = await asyncio.gather(*map(encoder(batch_invariant=False).encode, prompts))
        assert all(np.allclose(*pair, atol=1e-4) for pair in zip(alone, batched, strict=True))
        half = await encoder(precision="bf16").encode(prompts[0])
        assert half.dtype == np.float32 and np.allclose(half, alone[0], atol=0.2)

    asyncio.run(run())


def test_images_are_decoded_by_size_and_carry_their_metadata(folders: dict[str, str]) -> None:
    async def run() -> list[int]:
        decoder, batches = DecoderStage(folders["bit"], device="cpu"), []
        real = decoder._decode

        def decode(batch: Sequence[np.ndarray], height: int, width: int) -> list[np.ndarray]:
            batches.append(len(batch))
            return real(batch, height, width)

        decoder._decode = decode  # type: ignore[method-assign]
        codes = np.zeros((4, 6), np.uint8)
        jobs = [decoder.decode(codes, 32, 32 + 32 * (i % 2), "webp", {"seed": i}) for i in range(8)]
        wrong = [decoder.decode(codes[:3], 32, 32), decoder.decode(codes + 2, 32, 32)]
        files = await asyncio.gather(*jobs, *wrong, return_exceptions=True)
        assert [read_metadata(file) for file in files[:8]] == [{"seed": i} for i in range(8)]  # type: ignore[arg-type]
        assert all(isinstance(file, UserError) for file in files[8:])
        with pytest.raises(UserError, match="multiples of 8"):
            await decoder.decode(codes, 33, 32)
        with pytest.raises(UserError, match="expected one of png"):
            await decoder.decode(codes, 32, 32, "gif")
        return batches

    assert sorted(asyncio.run(run()))[-2:] == [4, 4]


def test_the_next_batch_decodes_while_files_are_encoded(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is not done before a second image is decoded, and the event loop answers all the while."""
    decoded, second = [], threading.Event()
    real = deployments.encode_image

    def encode(*args: Any) -> bytes:
        assert second.wait(20)
        return real(*args)

    monkeypatch.setattr(deployments, "encode_image", encode)

    async def run() -> None:
        decoder = DecoderStage(folders["bit"], device="cpu", batch=1, file_threads=1)
        decode = decoder._decode

        def count(*args: Any) -> list[np.ndarray]:
            images = decode(*args)
            decoded.append(len(images))
            if len(decoded) == 2:
                second.set()
            return images

        decoder._decode = count  # type: ignore[method-assign]
        files = await asyncio.gather(*[decoder.decode(np.zeros((4, 6), np.uint8), 32, 32) for _ in range(2)])
        assert len(files) == 2

    asyncio.run(run())
