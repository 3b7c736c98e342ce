"""A browser for the tests of the playground page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..kit.browser import Browser, chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
