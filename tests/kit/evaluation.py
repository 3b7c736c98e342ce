"""What an evaluation has come to, and a result by the paper's protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from instella_ray.evaluation.metrics.names import INCEPTION
from instella_ray.evaluation.statistics import JACKKNIFE
from instella_ray.models.sampling import SamplingConfig

FID: dict[str, Any] = {
    **{"name": "fid", "value": 12.0, "low": 11.0, "high": 13.0, "count": 30_000, "parts": [], "implementation": "x"},
    **{"weights": "inception.pth", "weights_hash": f"{INCEPTION[0]}00"},
    "settings": {
        "images": {"size": 256, "filter": "lanczos", "format": "pixels"},
        **{"network_input": "299 px, clean-fid", "interval": JACKKNIFE, "confidence": 0.95, "groups": 10},
        "reference": {"source": "coco-val2014", "sha256": "cd" * 32, "count": 40_504},
    },
}
ABOUT: dict[str, Any] = {
    **{"kind": "diffusion", "quantization": "none", "images_per_prompt": 1, "precision": "bf16", "seed": 0},
    **{"model": "gen", "model_hash": "ef" * 32, "prompts": "val2014.json", "prompts_hash": "01" * 32},
    "text_encoder": {"name": "OLMo"},
    "sampling": SamplingConfig(guidance_scale=4, temperature=0.6, num_inference_steps=20).model_dump(),
}
CARD: dict[str, Any] = {
    **{"measured_inputs": "samples", "size": 1024, "tokenizer": "bit", "tokenizer_hash": "23" * 32, "source": "s"},
    "versions": {"instella-ray": "1.2", "torch": "2.9"},
}


def numbers(output: Path | str) -> dict[str, Any]:
    """Every metric of every setting."""
    results = json.loads((Path(output) / "results.json").read_text())
    return {setting["name"]: setting["metrics"] for setting in results["settings"]}


def random_inception(path: Path) -> str:
    """Write random weights of FID's InceptionV3 to ``path``, which is returned."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return str(path)
