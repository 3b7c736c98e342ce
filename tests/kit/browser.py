"""Headless Chromium, driven through its DevTools protocol: just what the tests of a page need."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

KEYS = {
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"code": "Escape", "windowsVirtualKeyCode": 27},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
}
CONTROL = 2


class Page:
    """One tab, and what went wrong in it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.calls = socket, 0
        self.complaints: list[str] = []
        """Uncaught errors, and what the security policy refused."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            self._note(message)
            if message.get("id") == self.calls:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"]["exception"]["description"])
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] == "security":
            self.complaints.append(message["params"]["entry"]["text"])

    def goto(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until the condition holds."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}\n{self.js('document.body.innerText')}"
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        text: str = self.js(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")
        return text

    def click(self, selector: str) -> None:
        """A real click in the middle of what is visible of the element."""
        where = self.js(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            const hit = document.elementFromPoint(x, y);
            return {{x, y, hit: element.contains(hit) || !!hit?.contains(element)}};
        }})()""")
        assert where.pop("hit"), f"{selector} is covered by something else"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def fill(self, selector: str, text: str) -> None:
        """Replaces the text of a field as a typist does."""
        self.js(f"{{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }}")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.js("document.execCommand('delete')")

    def choose(self, selector: str, value: str) -> None:
        """An entry of a list."""
        self.js(f"""{{
            const list = document.querySelector({json.dumps(selector)});
            list.value = {json.dumps(value)};
            list.dispatchEvent(new Event('change', {{bubbles: true}}));
        }}""")

    def press(self, key: str, modifiers: int = 0) -> None:
        about = {"key": key, **KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in about.items() if k != "text"})

    def look(self, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """The size of the window, and the colour scheme that the user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def downloads_to(self, folder: Path) -> None:
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


class Browser:
    """A running Chromium."""

    def __init__(self, address: str) -> None:
        self.address = address

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A new tab with a session of its own."""
        tab = httpx.put(f"{self.address}/json/new?about:blank").raise_for_status().json()
        try:
            with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket)
        finally:
            httpx.get(f"{self.address}/json/close/{tab['id']}")


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Debian's Chromium with a fresh profile in ``folder``; skips where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if not binary:
        pytest.skip("no Chromium here: apt-get install chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [binary, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + 120
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < end, (folder / "chromium.log").read_text()[-2000:]
            time.sleep(0.05)
        yield Browser(f"http://127.0.0.1:{port.read_text().splitlines()[0]}")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
