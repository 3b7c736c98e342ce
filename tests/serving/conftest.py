"""A browser for the tests of the playground page, and the one Serve and the one endpoint that all tests here share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from ..kit.browser import Browser, chromium
from ..kit.endpoint import APP, HEADERS, Endpoint, deployed, make_folders, serve_rows, serve_started, small_args


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="package")
def serve_url(ray_session: None) -> Iterator[str]:
    """The address of a real Serve; who deploys something on it deletes it again."""
    with serve_started() as url:
        yield url


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random tokenizer and one random generator of each kind."""
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="package")
def real(serve_url: str, folders: dict[str, str]) -> Iterator[Endpoint]:
    """The endpoint on a real Serve, with keys and little room."""
    with deployed(small_args(folders), APP):
        yield Endpoint(serve_url, partial(serve_rows, APP), HEADERS)
