"""Baseline of the serving graph: one FastAPI process around the same stages, without Ray, checks or limits.

``python -m instella_ray.bench.plain SETTINGS.json PORT`` serves until SIGTERM.
"""

# No ``from __future__ import annotations``: FastAPI reads the annotations of routes that are local to a function.

import base64
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from ..serving.config import ServeArgs
from ..serving.deployments import DecoderStage, GeneratorStage, TextEncoderStage
from ..serving.prompts import PromptFeatures
from ..serving.setup import Setup
from .baselines import FIELDS
from .load import PATH


def main(settings: str, port: int) -> None:
    """Serve the first model of the endpoint in the file ``settings``, the JSON of a ServeArgs, on loopback."""
    args, api = ServeArgs.model_validate_json(Path(settings).read_text()), FastAPI()
    setup = Setup.of(args)
    text, decoder = TextEncoderStage(**setup.text()), DecoderStage(**setup.decoder())
    features, generator = PromptFeatures(text.encode), GeneratorStage(**setup.generator(next(iter(args.models))))

    @api.post(PATH)
    async def generations(request: Request) -> dict[str, Any]:
        body = await request.json()
        codes, _ = await generator.generate(await features(body["prompt"]), {name: body[name] for name in FIELDS})
        width, height = map(int, body["size"].split("x"))
        file = await decoder.decode(codes, height, width)
        return {"data": [{"b64_json": base64.b64encode(file).decode()}]}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
