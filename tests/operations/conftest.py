"""One head for all tests of this folder: the session's Ray has neither a dashboard to submit to nor a token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..kit.head import Head, token_head


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    with token_head() as started:
        yield started
