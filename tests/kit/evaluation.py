"""What an evaluation has come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch


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
