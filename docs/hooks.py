"""Build hooks of the documentation site."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:mod|class|func|data|meth|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Remove the names of Sphinx roles, which docstrings use and Markdown doesn't know, before the code they mark."""
    return ROLE.sub("", html)
