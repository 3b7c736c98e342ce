"""Request and response bodies of the HTTP API: OpenAI's format with additional sampling parameters."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from ..models.sampling import Sampler, SamplingConfig

ImageFormat = Literal["png", "jpeg", "webp"]
ResponseFormat = Literal["b64_json", "codes"]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text, got half of a surrogate pair") from None
    return text


def _size(text: str | None) -> str | None:
    if text in (None, "auto"):
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise ValueError("expected WIDTHxHEIGHT, for example 1024x1024")
    return text


Prompt = Annotated[str, AfterValidator(_encodable)]
Size = Annotated[str | None, AfterValidator(_size)]


class RequestBody(BaseModel):
    """Base of request bodies: rejects unknown keys and wrong types (``"20"`` for a number).

    Omitted fields take the server's defaults.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageRequest(RequestBody):
    """Body of ``POST /v1/images/generations``."""

    prompt: Prompt | list[Prompt] = Field(description="One prompt, or several; the empty prompt is allowed")
    model: str | None = Field(None, description="A model of GET /v1/models; the first one by default")
    n: int = Field(1, ge=1, description="Images per prompt")
    size: Size = Field(None, description="WIDTHxHEIGHT in pixels, for example 1024x1024, or auto")
    response_format: ResponseFormat = Field("b64_json", description="codes: the image's bits, for decoding later")
    output_format: ImageFormat = "png"
    stream: bool = Field(False, description="Answer with server-sent events")
    partial_images: int = Field(0, ge=0, le=8, description="Previews per image; requires stream")
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False, description="Deadline of the whole request (s)")
    seed: int | None = Field(
        None, ge=0, lt=2**63, validate_default=True, description="Image i uses seed + i; random by default"
    )
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="The paper's alpha; 0 disables guidance"
    )
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False, description="0 is greedy")
    rho: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    sampler: Sampler | None = None
    redraw: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Share of bits that each step draws anew"
    )
    final_draw: bool | None = Field(None, description="Sample the bits of the last step; false thresholds them at 0.5")
    user: str | None = Field(None, description="Accepted for compatibility; not used")

    @field_validator("prompt", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """Check the type here for one error message; pydantic would give one per member of the union."""
        prompts = value if isinstance(value, list) else [value]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("expected a string or a non-empty list of strings")
        for prompt in prompts:
            _encodable(prompt)
        return value

    @field_validator("seed")
    @classmethod
    def _drawn(cls, value: int | None) -> int:
        return secrets.randbelow(2**62) if value is None else value

    @field_validator("partial_images")
    @classmethod
    def _only_in_streams(cls, value: int, info: Any) -> int:
        if value and not info.data.get("stream"):
            raise ValueError("expected stream: true for previews")
        return value

    @property
    def prompts(self) -> list[str]:
        """Prompts of all images, each repeated ``n`` times."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [prompt for prompt in given for _ in range(self.n)]

    def sampling(self) -> dict[str, Any]:
        """Return the sampling parameters that the request sets."""
        return {name: value for name in SamplingConfig.model_fields if (value := getattr(self, name)) is not None}


class DecodeRequest(RequestBody):
    """Body of ``POST /v1/codes/decode``."""

    codes: str | list[str] = Field(description="One or several codes, as returned with response_format codes")
    size: Size = Field(None, description="WIDTHxHEIGHT in pixels; independent of the size at generation")
    output_format: ImageFormat = "png"
    model: str | None = Field(None, description="Must be served, but has no effect: all models share a tokenizer")
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False, description="Deadline of the whole request (s)")

    @field_validator("codes", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [value]
        if not given or not all(isinstance(item, str) for item in given):
            raise ValueError("expected a base64 string or a non-empty list of base64 strings")
        return value

    @property
    def all_codes(self) -> list[str]:
        return [self.codes] if isinstance(self.codes, str) else self.codes


class ImageResult(BaseModel):
    """One image of a response."""

    b64_json: str | None = None
    codes: str | None = None
    """Bits of the image, packed as by ``numpy.packbits``, in base64."""
    seed: int | None = None
    prompt: str | None = None
    weights: dict[str, str] | None = None
    """Weight hashes of ``generator`` and ``tokenizer``, as used by ``instella-ray lineage``."""


class ImageResponse(BaseModel):
    """Response of ``POST /v1/images/generations`` and ``POST /v1/codes/decode``."""

    created: int
    model: str
    data: list[ImageResult]
