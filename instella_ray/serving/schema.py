"""The HTTP API's requests and answers, in OpenAI's shape with a diffusion user's extras."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..sampling_config import Sampler, SamplingConfig

ImageFormat = Literal["png", "jpeg", "webp"]


class ImageRequest(BaseModel):
    """Body of ``POST /v1/images/generations``. What is left out takes the server's default."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str] = Field(description="One prompt, or several; the empty prompt is allowed")
    model: str | None = Field(None, description="A model of GET /v1/models; the first one by default")
    n: int = Field(1, ge=1, le=16, description="Pictures a prompt")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, for example 1024x1024")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"
    seed: int | None = Field(None, ge=0, lt=2**63, description="Picture i uses seed + i; drawn at random by default")
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100, description="The paper's alpha; 0 is without guidance")
    temperature: float | None = Field(None, ge=0, le=10, description="0 is greedy")
    rho: float | None = Field(None, gt=0, le=10)
    sampler: Sampler | None = None
    final_draw: bool | None = Field(None, description="Draw the last step's bits; false is a threshold at 0.5")
    user: str | None = Field(None, description="Accepted for compatibility; not used")

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | list[str]) -> str | list[str]:
        prompts = [value] if isinstance(value, str) else value
        if not prompts:
            raise ValueError("expected at least one prompt, got an empty list")
        if any(len(prompt) > 4000 for prompt in prompts):
            raise ValueError("expected at most 4000 characters a prompt")
        return value

    @field_validator("size")
    @classmethod
    def _size_is_two_numbers(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value):
            raise ValueError("expected WIDTHxHEIGHT, for example 1024x1024")
        return value

    @property
    def prompts(self) -> list[str]:
        """One entry a picture."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [prompt for prompt in given for _ in range(self.n)]

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the request sets."""
        return {name: value for name in SamplingConfig.model_fields if (value := getattr(self, name)) is not None}


class ImageData(BaseModel):
    """One picture of an answer."""

    b64_json: str
    seed: int
    prompt: str


class ImageResponse(BaseModel):
    """Answer of ``POST /v1/images/generations``."""

    created: int
    model: str
    data: list[ImageData]


def error_body(message: str, *, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's error form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
