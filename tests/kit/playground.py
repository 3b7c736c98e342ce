"""What a user does on the playground page, and what the page shows."""

from __future__ import annotations

import base64

from .browser import CONTROL, Page

SHOWN = "!document.querySelector('#error').hidden"


def ask(page: Page, prompt: str = "a red circle", seed: int | str | None = None) -> None:
    page.fill("[name=prompt]", prompt)
    if seed is not None:
        page.fill("[name=seed]", str(seed))
    page.press("Enter", CONTROL)


def wait_for_images(page: Page, count: int = 1) -> None:
    done = f"document.querySelectorAll('article:not(.waiting)').length === {count}"
    page.wait(f"{done} && document.querySelector('#progress').hidden")


def shown(page: Page, card: str = "article") -> bytes:
    """The file that a card shows."""
    source = page.js(f"document.querySelector('{card} img').src")
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def complaint(page: Page) -> str:
    page.wait(SHOWN)
    return page.text("#error p")
