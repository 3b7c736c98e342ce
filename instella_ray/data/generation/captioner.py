"""Captioning of images by a vision-language model with greedy search, in batches. No Ray.

An answer depends on the image, the question and the weights, not on the other images of the batch; in bfloat16 except
for tokens whose scores differ by less than the rounding error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from pydantic import Field

from ...accelerator import Precision, compute_dtype
from ...config import Config
from ...errors import UserError
from ..formats.images import decode_rgb, open_image
from ..formats.texts import one_line
from .pretrained import loading, weights_identity

_SENTENCE = re.compile(r".*(?:[.!?…][\"'”’)\]]*(?=\s|$)|[。！？][”’」』）]*)")


class Question(Config):
    """Question to the model about an image, with a limit on the length of the answer."""

    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(ge=1)
    """Maximum number of tokens; a longer answer is truncated to its last full sentence."""


class Answer(NamedTuple):
    """Answer of the model to a question about an image."""

    text: str
    """Answer as one line; empty if nothing usable was generated."""
    finished: bool
    """Whether the model ended the answer within ``max_new_tokens``."""


class Captioner:
    """Image-text-to-text model of Transformers with its processor, by hub name or local folder."""

    def __init__(self, name: str, device: torch.device, precision: Precision) -> None:
        """Load the model; UserError if ``name`` is not such a model. Code from the hub is never run."""
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        with loading("model", name):
            self.processor = AutoProcessor.from_pretrained(name)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=compute_dtype(device, precision), use_safetensors=True
            )
        self.device = device
        self.model = model.to(device).eval().requires_grad_(False)
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = set(ends if isinstance(ends, list) else [ends])
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Replaces the generation settings of the model: Qwen's sample and penalise repetition, whose implementation
        # has changed between versions of Transformers. Greedy search gives the same result in all.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.ends), pad_token_id=pad
        )

    @torch.inference_mode()
    def answers(self, images: Sequence[Image.Image], questions: Sequence[Question]) -> list[list[Answer]]:
        """Answer all ``questions`` about each image: one list per image, in the order of ``questions``.

        All answers are generated in one batch: decoding reads the weights once per step for the whole batch, and short
        answers need no steps in addition to those of long ones.
        """
        conversations = [_conversation(image, question.prompt) for image in images for question in questions]
        padding = {"text_kwargs": {"padding": True, "padding_side": "left"}}
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
        ).to(self.device, self.model.dtype)
        steps = max(question.max_new_tokens for question in questions)
        tokens = self.model.generate(**inputs, max_new_tokens=steps)[:, inputs["input_ids"].shape[1] :].tolist()
        limits = [question.max_new_tokens for _ in images for question in questions]
        found = [self._answer(ids[:limit]) for ids, limit in zip(tokens, limits, strict=True)]
        return [found[start : start + len(questions)] for start in range(0, len(found), len(questions))]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        text = one_line(self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True))
        return Answer(text, True) if end is not None else Answer(full_sentences(text), False)


def check_captioner(name: str) -> str:
    """Return the hash of a captioner's weights without loading them; UserError if ``name`` is not a captioner."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    with loading("model", name):
        config = AutoConfig.from_pretrained(name)
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"model '{name}': a {config.model_type}, expected a model that answers questions on images")
    with loading("model", name):
        processor = AutoProcessor.from_pretrained(name)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"model '{name}': its processor has no chat template, expected an instruction-tuned model")
    return weights_identity("model", name, "config.json")


def decode_for_captioner(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an upright RGB image of at most ``max_pixels``; UndecodableError as :func:`..formats.images.open_image`."""
    size = open_image(data).size
    scale = min(1.0, (max_pixels / (size[0] * size[1])) ** 0.5)
    # JPEGs are decoded at a reduced size, because one thread must decode faster than a GPU captions.
    image = decode_rgb(data, at_least=math.ceil(scale * min(size)))
    scale = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5)
    if scale == 1:
        return image
    width, height = (max(1, int(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def full_sentences(text: str) -> str:
    """Truncate one line of text after its last full sentence; empty if there is none."""
    match = _SENTENCE.match(text)
    return match[0] if match else ""


def _conversation(image: Image.Image, prompt: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]
