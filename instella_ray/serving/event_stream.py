"""Format of server-sent event streams, shared by the ingress and Serve's proxies; nothing heavy may be imported here."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
SEED_HEADER = "x-seed"
"""Header of a stream with the seed of its request, which may have been drawn: whoever makes it again gets the same events."""


def event(name: str, data: dict[str, Any]) -> bytes:
    """Encode one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
