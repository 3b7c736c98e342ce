"""Text to image in Python: prompts to images, images to codes and back, with one model folder."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import storage
from .accelerator import Precision, pick_device
from .config import validate
from .data.formats.images import fit_square, to_pixels, to_tensor
from .engine.compilation import Compilation
from .engine.engine import Request, StepEngine
from .engine.events import Event, Finished, Progress
from .engine.kinds import build_engine
from .engine.slots import EngineOptions
from .engine.weights import serving_dtype
from .errors import UserError
from .models.bit import BIT
from .models.bundled import TOKENIZER
from .models.card import GeneratorCard
from .models.checkpoint import CONFIG, load_expected, load_model, read_checkpoint_config, weight_hash
from .models.folders import find_model
from .models.generator import ARGenerator, DiffusionGenerator
from .models.sampling import SamplingConfig, SamplingParams
from .models.text_encoder import TextEncoder, TextEncoderConfig

OutputType = Literal["pil", "np", "pt", "codes"]
TEXT_ENCODER = "text_encoder"
"""Folder within a saved pipeline, as is :data:`.models.bundled.TOKENIZER`."""


@dataclass(frozen=True)
class PipelineOutput:
    """Generated images, in the order of the prompts, each prompt's images one after another."""

    images: Any
    """PIL images; uint8 ``[B, height, width, 3]`` for ``np``; float32 ``[B, 3, height, width]`` in [-1, 1] for ``pt``;
    None for ``codes``."""
    codes: np.ndarray
    """Bits, uint8 0/1 ``[B, L, K]``."""
    seeds: list[int]
    """Seed of each image: with the same settings it gives the same bits again, here, from the endpoint and in bulk."""


@dataclass(frozen=True)
class Preview:
    """Estimate of an image while it is generated."""

    image: Image.Image
    step: int
    """Completed steps; equal to ``steps`` for the finished image."""
    steps: int
    codes: np.ndarray
    """Most likely final bits, uint8 0/1 ``[L, K]``."""


class InstellaPipeline:
    """Generator, tokenizer and text encoder in one object; for diffusion and autoregressive generators.

    Images depend on their seed and settings only, not on other images of a call: each prompt is encoded separately, and
    the step engine's rows are independent, as in the endpoint and in bulk sampling.
    """

    def __init__(
        self,
        transformer: DiffusionGenerator | ARGenerator,
        tokenizer: BIT,
        text_encoder: TextEncoder,
        *,
        batch_size: int = 8,
        compilation: Compilation = "none",
        source: Path | None = None,
        card: GeneratorCard | None = None,
    ) -> None:
        """``transformer`` generates codes, ``batch_size`` images at once; ``source`` is its model folder.

        ``card`` has the sampling settings that stand for those that a call leaves out.

        The engine caches what it computes from the weights of ``transformer``, which must not change afterwards.
        Raises UserError if its codes do not have the size that ``tokenizer`` decodes.
        """
        sizes = [(m.cfg.num_tokens, m.cfg.bits_per_token) for m in (transformer, tokenizer)]
        if sizes[0] != sizes[1]:
            made, read = (f"{tokens} tokens of {bits} bits" for tokens, bits in sizes)
            raise UserError(f"transformer: generates codes of {made}, the tokenizer decodes {read}")
        self.transformer, self.tokenizer, self.text_encoder, self.source = transformer, tokenizer, text_encoder, source
        self.card = card or GeneratorCard()
        options = EngineOptions(batch_size, text_encoder.cfg.max_length, compilation)
        self.engine: StepEngine = build_engine(transformer, text_encoder.encode_prompt(""), options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_encoder: str | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        batch_size: int = 8,
        compilation: Compilation = "none",
    ) -> InstellaPipeline:
        """Load a pipeline from a generator's model folder (``RUN_DIR/latest``), a saved pipeline, or a repository of the hub.

        ``icons`` and ``icons/ar`` are generators that come with the package.

        ``tokenizer`` and ``text_encoder`` replace those that the folder names. Raises UserError if a part is missing,
        naming what to pass, and for a tokenizer other than the one that the generator was trained with.
        """
        folder = _local_folder(name)
        config = read_checkpoint_config(folder)
        place = pick_device(device)
        dtype = serving_dtype(place, precision)
        transformer = load_model(folder, device=place)
        if isinstance(transformer, BIT):
            raise UserError(f"{folder}: holds a tokenizer, expected a generator")
        bit_folder = Path(find_model(str(tokenizer))) if tokenizer is not None else _tokenizer_folder(folder, config)
        expected = config.get("tokenizer_hash")
        if expected is not None and weight_hash(bit_folder) != expected:
            raise UserError(f"{bit_folder}: not the tokenizer that {folder} was trained with; pass tokenizer=FOLDER")
        return cls(
            transformer.to(dtype),
            load_expected(bit_folder, BIT, device=place),
            TextEncoder.from_config(_text_config(folder, config, text_encoder), device=place, dtype=dtype),
            batch_size=batch_size,
            compilation=compilation,
            source=folder,
            card=GeneratorCard.of(config, str(folder / CONFIG)),
        )

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return next(self.transformer.parameters()).device

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[InstellaPipeline, int, int, dict[str, Any]], Any] | None = None,
        **sampling: Any,
    ) -> PipelineOutput:
        """Generate images of one or more prompts.

        ``height`` and ``width`` are in pixels (default: the tokenizer's image size). ``seed`` is one per image, or the
        first of consecutive ones; without it they are drawn, from ``generator`` if given. ``callback_on_step_end(pipe,
        image, step, {"codes": ...})`` is called after every step of an image. ``sampling`` are the fields of
        :class:`.models.sampling.SamplingConfig`: ``num_inference_steps``, ``guidance_scale``, ``temperature``, ``rho``,
        ``sampler``, ``redraw``, ``final_draw``; the others are those of ``self.card``. Raises UserError for values out of
        range and sizes that the tokenizer cannot decode.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        if not prompts:
            raise UserError("prompt: the list is empty, expected at least one prompt with at least one image")
        if output_type not in ("pil", "np", "pt", "codes"):
            raise UserError(f"output_type '{output_type}': expected one of pil, np, pt, codes")
        seeds = _seeds(seed, generator, len(prompts))
        size = self._size(height, width)
        codes = np.zeros((len(prompts), self.tokenizer.cfg.num_tokens, self.tokenizer.cfg.bits_per_token), np.uint8)
        for number, event in self._events(prompts, seeds, sampling, every=int(callback_on_step_end is not None)):
            if isinstance(event, Finished):
                codes[number] = event.codes.numpy()
            elif isinstance(event, Progress) and callback_on_step_end is not None:
                callback_on_step_end(self, number, event.step, {"codes": event.estimate.numpy()})
        images = None if output_type == "codes" else self._decoded(codes, *size, output_type)
        return PipelineOutput(images, codes, seeds)

    def stream(
        self,
        prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        preview_every: int = 1,
        **sampling: Any,
    ) -> Iterator[Preview]:
        """Generate one image, yielding its estimate every ``preview_every`` steps, at last the finished image.

        Other arguments as in :meth:`__call__`.
        """
        size = self._size(height, width)
        steps = self.sampling(sampling).num_inference_steps
        for _, event in self._events([prompt], _seeds(seed, None, 1), sampling, every=preview_every):
            if isinstance(event, Progress):
                steps, step, codes = event.steps, event.step, event.estimate.numpy()
            elif isinstance(event, Finished):
                step, codes = steps, event.codes.numpy()
            else:
                continue
            (image,) = self._decoded(codes[None], *size, "pil")
            yield Preview(image, step, steps, codes)

    @torch.inference_mode()
    def encode(self, image: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Encode one image (PIL, or uint8 ``[H, W, 3]``) to bits, uint8 0/1 ``[L, K]``; a list to ``[B, L, K]``.

        Images are resized to the tokenizer's image size by their shorter edge, and cropped to the centre square.
        """
        single = isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.ndim == 3)
        images: Sequence[Any] = [image] if single else list(image)  # type: ignore[arg-type]
        pixels = np.stack([fit_square(_rgb(each), self.tokenizer.cfg.image_size) for each in images])
        codes: np.ndarray = self.tokenizer.encode(to_tensor(pixels).to(self.device)).cpu().numpy()
        return codes[0] if single else codes

    def decode(
        self,
        codes: np.ndarray | Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
    ) -> Any:
        """Decode bits, 0/1 ``[L, K]`` or ``[B, L, K]``, to one image or a list of any size the tokenizer can decode."""
        bits = np.asarray(codes, np.uint8)
        expected = (self.tokenizer.cfg.num_tokens, self.tokenizer.cfg.bits_per_token)
        if bits.ndim not in (2, 3) or bits.shape[-2:] != expected or bits.max(initial=0) > 1:
            raise UserError(f"codes: expected 0/1 of shape {expected} or [B, *{expected}], got shape {bits.shape}")
        images = self._decoded(bits if bits.ndim == 3 else bits[None], *self._size(height, width), output_type)
        return images if bits.ndim == 3 else images[0]

    def sampling(self, given: Mapping[str, Any]) -> SamplingConfig:
        """Return the sampling settings of a call with the arguments ``given``; UserError for an unknown or wrong one."""
        if unknown := set(given) - set(SamplingConfig.model_fields):
            expected = ", ".join(SamplingConfig.model_fields)
            raise UserError(f"{min(unknown)}: unknown argument, expected one of {expected}")
        return self.card.defaults(validate(SamplingConfig, given))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save generator, tokenizer and text encoder into one new folder that :meth:`from_pretrained` loads anywhere.

        Raises UserError if the folder is not empty, or if the pipeline was not loaded from a model folder.
        """
        if self.source is None:
            raise UserError("save_pretrained: the generator was not loaded from a folder; save it with save_model")
        if not storage.is_empty(str(folder)):
            raise UserError(f"{folder}: already exists, expected a new folder")
        bit_folder = _tokenizer_folder(self.source, read_checkpoint_config(self.source))
        with storage.atomic_dir(folder) as made:
            for source, target in ((self.source, made), (bit_folder, made / TOKENIZER)):
                target.mkdir(exist_ok=True)
                for name in (CONFIG, "model.safetensors", "ema.safetensors"):
                    if (source / name).is_file():
                        shutil.copyfile(source / name, target / name)
            self.text_encoder.model.save_pretrained(made / TEXT_ENCODER)
            self.text_encoder.tokenizer.save_pretrained(made / TEXT_ENCODER)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save the pipeline and upload it; returns the commit's URL. ``options`` are those of ``upload_folder``."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary, "pipeline"))
            return str(api.upload_folder(repo_id=repo_id, folder_path=str(Path(temporary, "pipeline")), **options))

    def _events(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Mapping[str, Any], *, every: int
    ) -> Iterator[tuple[int, Event]]:
        """Run the engine over all prompts; yields the number of an image and its event."""
        settings = self.sampling(sampling).model_dump()
        with closing(self.engine.run(self._requests(prompts, seeds, settings, every))) as events:
            yield from ((int(event.id), event) for event in events)

    def _requests(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any], every: int
    ) -> Iterator[Request]:
        text, features = None, torch.empty(0)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if prompt != text:
                text, features = prompt, self.text_encoder.encode_prompt(prompt)
            params = SamplingParams.of(1, seed=seed, **settings)
            yield Request(str(number), features, params, preview_every=every)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        side, multiple = self.tokenizer.cfg.image_size, self.tokenizer.cfg.decode_multiple
        size = (height or side, width or side)
        if any(length <= 0 or length % multiple for length in size):
            raise UserError(f"height {size[0]}, width {size[1]}: expected multiples of {multiple}")
        return size

    @torch.inference_mode()
    def _decoded(self, codes: np.ndarray, height: int, width: int, output_type: OutputType) -> Any:
        half = torch.autocast(
            self.device.type, torch.bfloat16, enabled=next(self.transformer.parameters()).dtype == torch.bfloat16
        )
        batch = self.engine.options.slots
        parts: list[Tensor] = []
        with half:
            for start in range(0, len(codes), batch):
                bits = torch.from_numpy(codes[start : start + batch]).to(self.device)
                parts.append(self.tokenizer.decode(bits, height, width).float())
        images = torch.cat(parts)
        if output_type == "pt":
            return images.clamp(-1, 1)
        pixels = to_pixels(images)
        return pixels if output_type == "np" else [Image.fromarray(each) for each in pixels]


def _seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int) -> list[int]:
    if seed is None and generator is None:
        seed = secrets.randbelow(2**62)
    if seed is None:
        return [int(n) for n in torch.randint(2**62, (count,), generator=generator, device=generator.device)]  # type: ignore[union-attr]
    if isinstance(seed, int):
        return [(seed + i) % 2**63 for i in range(count)]
    if len(seed) != count:
        raise UserError(f"seed: expected one or {count}, got {len(seed)}")
    return list(map(int, seed))


def _rgb(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(image)


def _local_folder(name: str | Path) -> Path:
    found = Path(find_model(str(name)))
    if found.is_dir():
        return found
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(f"{name}: no such model folder; expected a folder with {CONFIG}, or a hub name OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: neither a model folder nor a repository of the hub ({reason})") from None


def _tokenizer_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Find the tokenizer of a generator: within its folder or beside it, or where it was when the generator was trained."""
    for place in (folder / TOKENIZER, folder.parent / TOKENIZER):
        if (place / CONFIG).is_file():
            return place
    inputs = (config.get("lineage") or {}).get("inputs") or ()
    paths = [each["path"] for each in inputs if each.get("role") == "tokenizer"]
    if paths and Path(paths[0], CONFIG).is_file():
        return Path(paths[0])
    found = f"it was at {paths[0]}, which is not there" if paths else "the folder names none"
    raise UserError(f"{folder}: its tokenizer is missing ({found}); pass tokenizer=FOLDER")


def _text_config(folder: Path, config: Mapping[str, Any], name: str | None) -> TextEncoderConfig:
    if config.get("text_encoder") is None:
        raise UserError(f"{folder}: names no text encoder in its {CONFIG}; expected a generator's checkpoint")
    cfg = TextEncoderConfig.model_validate(config["text_encoder"])
    saved = folder / TEXT_ENCODER
    if name is None and not (saved / CONFIG.replace("yaml", "json")).is_file():
        return cfg
    return cfg.model_copy(update={"name": name or str(saved), "gguf_file": None})
