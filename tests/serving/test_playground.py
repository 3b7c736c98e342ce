"""The playground page in a real Chromium: against the endpoint's contract, and against the endpoint itself."""

from __future__ import annotations

import base64
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.responses import HTMLResponse, JSONResponse, Response

from ..kit.browser import CONTROL, Browser, Page
from ..kit.contract import CARDS, PAGE, Contract, codes_of, drawing, error_body, running
from ..kit.playground import SHOWN, ask, complaint, shown, wait_for_images

NASTY = """it's <img src=x onerror="window.hacked=1"> "$HOME" `id` \\ $(id) & été 猫"""


@pytest.fixture
def server() -> Iterator[Contract]:
    with running(Contract()) as contract:
        yield contract


@pytest.fixture
def page(browser: Browser, server: Contract) -> Iterator[Page]:
    with browser.page() as page:
        page.look()
        page.goto(server.url)
        page.wait("document.querySelector('[name=size] option')")
        yield page
        assert page.complaints == []


def downloaded(folder: Path, pattern: str) -> Path:
    for _ in range(1200):
        if found := list(folder.glob(pattern)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} among {list(folder.iterdir())}")


def test_the_page_is_one_file_that_asks_nobody_else() -> None:
    text = PAGE
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert re.findall(r"""(?:src|href)=["'](?!data:)|\burl\(|@import|\bimport\b""", text) == []
    # Prompts are the users' text: nothing may turn it into markup or code.
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text) == []
    assert re.findall(r"localStorage|document\.cookie", text) == []


@pytest.mark.process
def test_an_image_appears_step_by_step(page: Page, server: Contract) -> None:
    server.stop_at = 4
    ask(page, seed=7)
    page.wait("document.querySelector('#status').textContent.startsWith('Step 4 of 8 · ')")
    assert shown(page) == drawing(codes_of("a red circle", 7), "64x64", 0.5)
    assert page.js("document.querySelector('progress').position") == 0.5
    assert page.text("#live") == "50 % done"
    assert page.js("document.querySelector('#generate').disabled")
    server.go.set()
    wait_for_images(page)
    assert shown(page) == drawing(codes_of("a red circle", 7), "64x64")
    assert page.text("#live").startswith("Done in ")
    facts = page.text(".facts")
    assert facts.startswith("64 × 64 · seed 7 · steps 8 · guidance 2 · temperature 0.5 · simplified · diffusion · ")
    assert page.js("getComputedStyle(document.querySelector('article img')).imageRendering") == "pixelated"
    page.click("article .image")
    page.wait("document.querySelector('#viewer').open && document.querySelector('#viewer img').width > 400")
    page.click("#viewer footer button")
    page.wait("!document.querySelector('#viewer').open")
    settings = {"num_inference_steps": 8, "guidance_scale": 2, "temperature": 0.5, "sampler": "simplified"}
    asked = {"prompt": "a red circle", "model": "diffusion", "size": "64x64", "n": 1, "seed": 7, **settings}
    assert server.bodies() == [{**asked, "stream": True, "partial_images": 6}]


@pytest.mark.process
def test_what_the_form_says_is_what_is_asked_for(page: Page, server: Contract) -> None:
    page.choose("[name=model]", "big")
    assert page.js("document.querySelector('[name=guidance_scale]').value") == "1"
    page.choose("[name=size]", "128x64")
    page.fill("[name=num_inference_steps]", "5")
    page.fill("[name=guidance_scale]", "0")
    page.fill("[name=temperature]", "")
    page.choose("[name=sampler]", "posterior")
    page.click("[name=n][value='3']")
    page.fill("[name=seed]", "11")
    assert page.js("document.querySelector('[name=seed_choice]:checked').value") == "keep"
    page.click("#generate")
    wait_for_images(page, 3)
    (body,) = server.bodies()
    asked = {"model": "big", "size": "128x64", "num_inference_steps": 5, "guidance_scale": 0, "n": 3, "seed": 11}
    assert {**body, **asked, "sampler": "posterior"} == body and "temperature" not in body
    for i in range(3):
        assert f"seed {11 + i} " in page.text(f"article:nth-child({i + 1}) .facts")
        assert shown(page, f"article:nth-child({i + 1})") == drawing(codes_of("", 11 + i), "128x64")


@pytest.mark.process
def test_an_ar_model_has_no_steps_to_choose(page: Page, server: Contract) -> None:
    page.choose("[name=model]", "ar")
    ask(page)
    wait_for_images(page)
    assert server.bodies()[0].keys().isdisjoint({"num_inference_steps", "sampler"})
    page.choose("[name=model]", "diffusion")
    assert page.js("document.querySelector('[name=num_inference_steps]').value") == "8"


@pytest.mark.process
def test_a_seed_is_random_until_it_is_kept(page: Page, server: Contract) -> None:
    for i, choice in enumerate(["random", "random", "keep", "keep"]):
        page.click(f"label:has([value={choice}])")
        ask(page)
        wait_for_images(page, i + 1)
    seeds = [body["seed"] for body in server.bodies()]
    assert len(set(seeds)) == 2 and seeds[1] == seeds[2] == seeds[3]


@pytest.mark.process
def test_cancelling_leaves_the_server_and_the_page_free(page: Page, server: Contract) -> None:
    server.stop_at = 2
    page.click("[name=n][value='2']")
    ask(page)
    page.wait("document.querySelector('#status').textContent.startsWith('Step 2')")
    page.click("#cancel")
    page.wait("document.querySelector('#progress').hidden && !document.querySelector('article')")
    assert page.text("#live") == "Cancelled" and not page.js(SHOWN)
    deadline = time.monotonic() + 60
    while not server.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.stop_at = None
    ask(page)
    wait_for_images(page, 2)


REFUSALS: list[tuple[Response, str, str | None]] = [
    (JSONResponse(error_body("size 64x64: too large", param="size"), 400), "size 64x64: too large", "size"),
    (JSONResponse(error_body("too long", param="prompt"), 400), "prompt: too long", "prompt"),
    (HTMLResponse("<h1>Bad gateway</h1>", 502), "The server answered 502.", None),
]


@pytest.mark.process
@pytest.mark.parametrize(("answer", "line", "field"), REFUSALS, ids=["size", "prompt", "gateway"])
def test_a_refusal_is_one_line_that_names_the_field(
    page: Page, server: Contract, answer: Response, line: str, field: str | None
) -> None:
    server.refusals.append(answer)
    ask(page)
    assert complaint(page) == line
    assert page.js("document.querySelector('[aria-invalid=true]')?.name ?? null") == field
    assert page.js("document.querySelector('#error button').hidden") is (field is not None)
    assert not page.js("document.querySelector('article')")
    ask(page)
    wait_for_images(page)
    assert not page.js(SHOWN) and not page.js("document.querySelector('[aria-invalid]')")


@pytest.mark.process
def test_overload_says_when_to_try_again(page: Page, server: Contract) -> None:
    body = error_body("every slot is taken; try again later", kind="rate_limit_error")
    server.refusals.append(JSONResponse(body, 429, {"Retry-After": "4"}))
    ask(page)
    assert complaint(page) == "every slot is taken. Try again in 4 s."
    assert page.js("document.querySelector('#error button').disabled")
    page.wait("!document.querySelector('#error button').disabled")
    page.click("#error button")
    wait_for_images(page)
    first, second = server.bodies()
    assert first == second


@pytest.mark.process
@pytest.mark.parametrize(
    ("trouble", "line"), [("break_at", "The connection was lost."), ("fail_at", "the engine failed")]
)
def test_trouble_on_the_way_can_be_tried_again_with_the_same_seed(
    page: Page, server: Contract, trouble: str, line: str
) -> None:
    setattr(server, trouble, 3)
    ask(page)
    assert line in complaint(page)
    assert not page.js("document.querySelector('article')")
    setattr(server, trouble, None)
    page.click("#error button")
    wait_for_images(page)
    first, second = server.bodies()
    assert first == second


@pytest.mark.process
def test_a_server_that_cannot_be_reached_is_said_so(page: Page, server: Contract) -> None:
    page.call("Network.enable")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.call("Network.emulateNetworkConditions", offline=True, **offline)
    ask(page)
    assert complaint(page) == "The server cannot be reached."
    page.call("Network.emulateNetworkConditions", offline=False, **offline)
    page.click("#error button")
    wait_for_images(page)


@pytest.mark.process
def test_numbers_that_are_none_never_leave_the_page(page: Page, server: Contract) -> None:
    for seed in ("-1", "1.5", "abc", "9007199254740993"):
        ask(page, seed=seed)
        assert complaint(page).startswith("seed: expected a whole number")
    assert server.bodies() == []


@pytest.mark.process
def test_the_key_is_asked_for_and_kept_in_this_tab_alone(page: Page, server: Contract) -> None:
    assert page.js("document.querySelector('#settings').hidden")
    server.keys.add("open-sesame-open")
    ask(page)
    assert complaint(page) == "This server needs an API key."
    assert page.js("document.activeElement === document.querySelector('#key')")
    page.fill("#key", "wrong")
    page.press("Enter")
    page.wait("document.querySelector('#error p').textContent === 'The server does not accept this API key.'")
    # The list of models is asked for with the key too: its refusal may be shown before that of the image.
    page.wait("!document.querySelector('#generate').disabled")
    page.fill("#key", "open-sesame-open")
    page.press("Enter")
    wait_for_images(page)
    assert page.js("sessionStorage.getItem('key')") == "open-sesame-open"
    assert page.js("localStorage.length + document.cookie.length") == 0
    page.click("[data-do=curl]")
    command = page.js("document.querySelector('#command textarea').value")
    assert '"Authorization: Bearer $INSTELLA_API_KEY"' in command and "sesame" not in command
    page.call("Page.reload")
    page.wait("document.querySelector('[name=size] option')")
    page.click("#toggle-settings")
    assert page.js("document.querySelector('#key').value") == "open-sesame-open"


@pytest.mark.process
@pytest.mark.parametrize("codes_in_answer", [True, False])
def test_an_image_is_drawn_again_at_another_size(page: Page, server: Contract, codes_in_answer: bool) -> None:
    server.codes_in_answer = codes_in_answer
    ask(page, seed=3)
    wait_for_images(page)
    for size in ("128x64", "128x128", "64x64", "128x64"):
        page.choose("article select", size)
        width, height = size.split("x")
        page.wait(f"document.querySelector('.facts').textContent.startsWith('{width} × {height}')")
        assert shown(page) == drawing(codes_of("a red circle", 3), size)
    assert [body["size"] for body in server.bodies("/v1/codes/decode")] == ["128x64", "128x128"]
    assert len(server.bodies()) == (1 if codes_in_answer else 2)
    server.refusals.append(JSONResponse(error_body("no such size", param="size"), 400))
    page.choose("article select", "64x128")
    assert complaint(page) == "no such size"
    assert page.js("document.querySelector('article select').value") == "128x64"


@pytest.mark.process
def test_images_and_codes_are_kept_as_files(page: Page, server: Contract, tmp_path: Path) -> None:
    page.downloads_to(tmp_path)
    ask(page, "A red circle!", seed=3)
    wait_for_images(page)
    page.click("[data-do=download]")
    assert downloaded(tmp_path, "a-red-circle-3-64x64.png").read_bytes() == shown(page)
    page.click("[data-do=code]")
    code = downloaded(tmp_path, "a-red-circle-3.bits")
    assert code.read_bytes() == codes_of("A red circle!", 3)
    page.choose("[name=size]", "128x128")
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(code)])
    page.wait("document.querySelectorAll('article').length === 2")
    assert page.text("article .prompt") == "a-red-circle-3.bits"
    assert shown(page) == drawing(codes_of("A red circle!", 3), "128x128")
    assert page.js("[...document.querySelectorAll('article:first-child [data-made]')].every((b) => b.hidden)")
    page.click("article [data-do=remove]")
    page.click("article [data-do=remove]")
    assert page.js("!document.querySelector('#empty').hidden")


@pytest.mark.process
def test_a_prompt_is_text_in_the_page_and_in_the_shell(page: Page, server: Contract) -> None:
    ask(page, NASTY, seed=3)
    wait_for_images(page)
    assert page.text(".prompt") == NASTY
    assert page.js("typeof window.hacked") == "undefined"
    page.click("[data-do=curl]")
    command = page.js("document.querySelector('#command textarea').value")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert server.bodies()[1] == {k: v for k, v in server.bodies()[0].items() if k not in ("stream", "partial_images")}
    assert base64.b64decode(httpx.Response(200, text=done.stdout).json()["data"][0]["b64_json"]) == shown(page)


@pytest.mark.process
def test_an_image_can_be_gone_on_from(page: Page, server: Contract) -> None:
    page.fill("[name=num_inference_steps]", "5")
    ask(page, "one", seed=21)
    wait_for_images(page)
    page.click("label:has([value=random])")
    page.fill("[name=prompt]", "two")
    page.fill("[name=num_inference_steps]", "6")
    page.click("[data-do=again]")
    wait_for_images(page, 2)
    expected = {"prompt": "two", "seed": 21, "num_inference_steps": 6}
    assert {**server.bodies()[1], **expected} == server.bodies()[1]
    page.click("article:nth-child(2) [data-do=reuse]")
    page.press("Enter", CONTROL)
    wait_for_images(page, 3)
    assert server.bodies()[2] == server.bodies()[0]


@pytest.mark.process
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_the_window_and_everything_has_a_name(page: Page, server: Contract, width: int) -> None:
    page.look(width, 800, "dark" if width == 390 else "light")
    ask(page, "w" * 300)
    wait_for_images(page)
    page.click("#toggle-settings")
    assert page.js("document.documentElement.scrollWidth") <= width
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "radio", "image", "progressbar")
    controls = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
    assert len(controls) > 20
    assert [n["role"]["value"] for n in controls if not n.get("name", {}).get("value")] == []
    background = page.js("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 20, 22)") is (width == 390)


@pytest.mark.process
def test_the_model_tells_what_it_knows_and_its_examples_can_be_taken(page: Page, server: Contract) -> None:
    card = CARDS["diffusion"]
    assert page.text("#about") == card["about"]
    buttons = "[...document.querySelectorAll('#examples button')].map((one) => one.textContent)"
    assert page.js(buttons) == card["prompts"][:6] and len(card["prompts"]) > 6
    page.click("#examples button")
    assert page.js("document.querySelector('[name=prompt]').value") == card["prompts"][0]
    assert page.js("document.activeElement.name") == "prompt" and server.bodies() == []
    page.js("(one => { one.value = 'ar'; one.onchange(); })(document.querySelector('[name=model]'))")
    assert page.js("document.querySelector('#about').hidden && document.querySelector('#examples').hidden")
