"""The endpoint's contract on a real port, without models: images come from a hash, and a test decides how it behaves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from PIL import Image, ImageDraw

import instella_ray.serving
from instella_ray.rendering import render

from .asgi import listening

PAGE = render(Path(instella_ray.serving.__file__).with_name("playground.html"))
POLICY = "default-src 'self' 'unsafe-inline' data:"
STEPS = 8
CARDS = {
    "diffusion": {
        "about": "Shapes in one colour, on white.",
        "prompts": [f"a {color} circle" for color in ("red", "green", "blue", "black", "grey", "pink", "brown")],
    }
}


def error_body(message: str, *, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's error form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def codes_of(prompt: str, seed: int) -> bytes:
    return hashlib.shake_128(f"{seed} {prompt}".encode()).digest(1024)


def drawing(codes: bytes, size: str, fog: float = 0.0) -> bytes:
    """A PNG that a code and a size determine; ``fog`` hides it, as early previews are."""
    width, height = (int(side) for side in size.split("x"))
    image = Image.new("RGB", (width, height), tuple(200 + b // 5 for b in codes[:3]))
    r = min(width, height) * (0.22 + codes[6] / 1500)
    box = (width / 2 - r, height / 2 - r, width / 2 + r, height / 2 + r)
    draw, colour = ImageDraw.Draw(image), tuple(codes[3:6])
    (draw.ellipse if codes[7] % 2 else draw.rectangle)(box, fill=colour)
    noise = Image.frombytes("RGB", (18, 18), codes[:972]).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    Image.blend(image, noise, fog).save(buffer, "PNG")
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Contract:
    """What the server shall do, and what has happened to it."""

    keys: set[str] = field(default_factory=set)
    refusals: list[Response] = field(default_factory=list)
    """Answers to the next calls in place of images."""
    stop_at: int | None = None
    """The step at which a stream waits for ``go``."""
    go: threading.Event = field(default_factory=threading.Event)
    break_at: int | None = None
    """The step at which a stream's connection is lost."""
    fail_at: int | None = None
    """The step at which a stream says that it has failed."""
    codes_in_answer: bool = False
    pace_s: float = 0.0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of each call."""
    cancelled: int = 0
    """Streams that a client has left."""
    url: str = ""

    def bodies(self, path: str = "/v1/images/generations") -> list[dict[str, Any]]:
        return [body for called, body in self.calls if called == path]

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        images = [(i, codes_of(body["prompt"], body["seed"] + i)) for i in range(body["n"])]
        ended = False
        try:
            for step in range(1, STEPS + 1):
                for index, codes in images:
                    about = {"index": index, "step": step, "steps": STEPS}
                    if step % 2:
                        yield event("progress", **about)
                        continue
                    yield ": still there\n\n"
                    file = text(drawing(codes, body["size"], 1 - step / STEPS))
                    yield event("partial_image", **about, b64_json=file, partial_image_index=step // 2 - 1)
                if step == self.fail_at:
                    yield f"event: error\ndata: {json.dumps(error_body('the engine failed', kind='server_error'))}\n\n"
                    yield "data: [DONE]\n\n"
                    ended = True
                    return
                if step == self.break_at:
                    ended = True
                    raise ConnectionError
                while step == self.stop_at and not self.go.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self.pace_s)
            for index, codes in images:
                extra = {"codes": text(codes)} if self.codes_in_answer else {}
                about = {"seed": body["seed"] + index, "prompt": body["prompt"], "model": body["model"], **extra}
                yield event("completed", index=index, b64_json=text(drawing(codes, body["size"])), **about)
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.cancelled += not ended


def event(kind: str, **data: Any) -> str:
    kind = f"image_generation.{kind}"
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def application(contract: Contract) -> FastAPI:
    api = FastAPI()

    @api.get("/")
    def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def refused(request: Request) -> Response | None:
        body = json.loads(await request.body() or b"{}")
        contract.calls.append((request.url.path, body))
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if contract.keys and key not in contract.keys:
            return JSONResponse(error_body("expected the header", kind="authentication_error"), 401)
        return contract.refusals.pop(0) if contract.refusals and body else None

    @api.get("/v1/models")
    async def models(request: Request) -> Response:
        defaults = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "temperature": 0.5, "sampler": "simplified"}
        given = {"diffusion": defaults, "big": {**defaults, "guidance_scale": 1.0}, "ar": defaults}
        about = {
            name: {
                "kind": "ar" if name == "ar" else "diffusion",
                "defaults": defaults,
                "sizes": [64, 128],
                **CARDS.get(name, {}),
            }
            for name, defaults in given.items()
        }
        data = [{"id": name, "object": "model", "instella_ray": about[name]} for name in about]
        return await refused(request) or JSONResponse({"object": "list", "data": data})

    @api.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        if answer := await refused(request):
            return answer
        body = contract.calls[-1][1]
        if body.get("stream"):
            return StreamingResponse(contract.stream(body), media_type="text/event-stream")
        codes = codes_of(body["prompt"], body["seed"])
        as_codes = body.get("response_format") == "codes"
        one = {"codes": text(codes)} if as_codes else {"b64_json": text(drawing(codes, body["size"]))}
        return JSONResponse({"created": 0, "model": body["model"], "data": [one]})

    @api.post("/v1/codes/decode")
    async def decode(request: Request) -> Response:
        if answer := await refused(request):
            return answer
        body = contract.calls[-1][1]
        file = drawing(base64.b64decode(body["codes"]), body["size"])
        return JSONResponse({"created": 0, "model": "diffusion", "data": [{"b64_json": text(file)}]})

    return api


@contextmanager
def running(contract: Contract) -> Iterator[Contract]:
    """The contract's server on a free port of loopback."""
    with listening(application(contract)) as url:
        contract.url = f"{url}/"
        try:
            yield contract
        finally:
            contract.go.set()
