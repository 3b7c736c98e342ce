"""What an evaluation has come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def numbers(output: Path | str) -> dict[str, Any]:
    """Every metric of every setting."""
    results = json.loads((Path(output) / "results.json").read_text())
    return {setting["name"]: setting["metrics"] for setting in results["settings"]}
