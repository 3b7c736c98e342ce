"""All pages: one base and one look, nothing from outside, fit for a phone, dark, with a larger view; goals in words."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import storage
from instella_ray.config import dump_yaml
from instella_ray.data.curation.filters.config import FilterConfig
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompts import Prompt
from instella_ray.data.scenes import CATEGORIES, scene_rows
from instella_ray.demo.recipe import KINDS, DemoConfig
from instella_ray.demo.report import goals
from instella_ray.demo.report import write_report as write_demo_report
from instella_ray.evaluation.compare import compare
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.models.sampling import SamplingConfig
from instella_ray.rendering import TEMPLATES, encode_png
from instella_ray.training.previews import TrainingPreview
from instella_ray.training.report import RunReport
from instella_ray.training.run_dir import Attempt
from instella_ray.training.validation import Numbers, ValidationSchedule, Validator
from instella_ray.training.validation_report import IMAGE

from .kit.browser import Browser, Page, chromium
from .kit.curation import COPY_FILTERS, shards_with_copies
from .kit.models import write_tokenizer
from .kit.project import PACKAGE
from .kit.sample_sets import noise, write_samples, write_sweep
from .kit.shards import image_bytes
from .kit.training import CPU, tokenizer_config

HACK = '<img src=x onerror="window.hacked=1">'
HACK_NAME = HACK.replace(".", "")
"""The same as a key: dots end keys."""
PAGES = ("demo", "curation", "evaluation", "sweep", "comparison", "validation", "training")
START = {"attempt": 1, "time": "2026-01-01 00:00:00 UTC", "host": HACK, "process": 1, "workers": 1, "device": "CPU"}
WITHOUT_END = {"meta", "img", "br", "link", "input", "hr"}


class NothingMeasured(Validator):
    """Rows of validation are added by the test."""

    def measure(self, model: str, folder: Path) -> Numbers:
        raise AssertionError("the rows are added by the test")


def score(value: float) -> dict[str, float]:
    return dict.fromkeys([*CATEGORIES, "overall"], value)


def stage_results(psnr: float = 26.78, diffusion: float = 0.842, ar: float = 0.683) -> dict[str, dict[str, Any]]:
    """Results of the demo's stages, as in its ``state.json``."""
    quality = {"images": 600, "psnr_before": 6.18, "psnr_after": psnr, "dead_bits": 0.0}
    return {
        "curate": {"ledger": {"in": 16000, "kept": 15999}, "seconds": 8.0},
        "tokenizer quality": {**quality, "score_true": score(1), "score_restored": score(0.999), "seconds": 3.2},
        "encode": {"code_bytes": 16, "seconds": 1218.25},
        "endpoint": {kind: {"images_per_second": 17.92} for kind in KINDS} | {"seconds": 60.0},
        "score": {"diffusion": score(diffusion), "ar": score(ar), "seconds": 0.1},
    }


def demo_page(folder: Path) -> Path:
    demo, pixels = DemoConfig(folder=str(folder), size=32), np.zeros((32, 32, 3), np.uint8)
    prompts = [(f"a photo of a {shape}", "single_object") for shape in ("circle", "square")]
    for kind in KINDS:
        for number in range(2):
            storage.write_bytes(demo.path("samples", kind, f"{number:04d}.png"), encode_png(pixels + 200))
    for run in ("tokenizer", *KINDS):
        row = '{{"step": {0}, "loss": 0.5, "psnr": 9.1, "bit_accuracy": 0.7, "images_per_second": 1234.5}}\n'
        storage.write_text(demo.path("runs", run, "metrics.jsonl"), row.format(10) + row.format(20))
    storage.write_bytes(demo.path("reconstructions.png"), encode_png(np.tile(pixels, (2, 4, 1))))
    return write_demo_report(demo, prompts, stage_results())


def curation_page(folder: Path) -> Path:
    shards = shards_with_copies(folder / "in")
    samples = [(key, data, HACK, {}) for key, data, *_ in scene_rows(2, 1, 96)]
    # Of two quarantined ones, one can be shown.
    undecodable, no_caption = (f"{number}{HACK_NAME}" for number in range(2))
    write_tar(
        str(shards / "h.tar"), [*samples, (undecodable, b"junk", HACK, {}), (no_caption, image_bytes(70), "", {})]
    )
    filters = FilterConfig.model_validate(COPY_FILTERS)
    run_curate(CurateConfig(input=str(shards), output=str(folder / "out"), filters=filters, local=True))
    return folder / "out" / "curation.html"


def validation_page(folder: Path) -> Path:
    validator = NothingMeasured(ValidationSchedule(best_by="psnr"), str(folder / "bit"))
    for step, value in ((1000, 20.123456), (2000, 24.5)):
        storage.write_bytes(
            str(validator.folder / f"step-{step:07d}" / IMAGE), encode_png(np.zeros((32, 128, 3), np.uint8))
        )
        result = {"name": "psnr", "value": value, "low": value - 1, "high": value + 1}
        validator.add({"step": step, "metrics": {"psnr": result, "psnr_32": {**result, "low": None, "high": None}}})
    return validator.folder / "report.html"


def open_report(folder: Path) -> RunReport:
    cfg = tokenizer_config(HACK, folder, 400, keep_best={"metric": "loss", "order": "lower"})
    storage.write_text(str(folder / "config.yaml"), dump_yaml(cfg))
    return RunReport(cfg.train, Attempt.begin(str(folder), resume=True), CPU)


def training_page(folder: Path) -> Path:
    storage.write_json(str(folder / "starts.json"), [{**START, "step": 0}])
    with suppress(RuntimeError), open_report(folder) as report:
        report.begin(100, [])
        for step in range(120, 320, 2):
            report.add({"step": step, "loss": 40 / step, "held_out_loss": 41 / step, "code_loss": 0.1, "psnr": 20.0})
            if step % 100 == 0:
                images = np.full((2, 32, 32, 3), step % 256, np.uint8)
                report.add_preview(
                    step, TrainingPreview({"originals": images, "EMA": images, "raw weights": images}, (HACK, ""))
                )
        raise RuntimeError(HACK)
    return folder / "report.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind, written by the code that writes it in a real run."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = write_tokenizer(folder / "bit")
    write_tar(str(folder / "images" / "0.tar"), [(key, data, HACK, {}) for key, data, *_ in scene_rows(12, 1, 48)])
    reconstructed = {"images": str(folder / "images"), "tokenizer": tokenizer, "preset": "paper-table2-coco"}
    prompts = [Prompt(f"{i}", HACK, category="colors") for i in range(4)]
    settings = {f"guidance_scale={g}+sampler=simplified": SamplingConfig(guidance_scale=g) for g in (1.5, 3.0)}
    sweep = write_sweep(folder / "samples", settings, prompts, tokenizer=tokenizer, codes=lambda n: noise(4, 2, n))
    other = write_samples(folder / "other", prompts, noise(4, 2, 7), tokenizer)
    for name, inputs in (("evaluation", reconstructed), ("sweep", {"samples": sweep}), ("plain", {"samples": other})):
        config = {"tokenizer": tokenizer, **inputs, "output": f"{folder}/{name}", "local": True}
        run_evaluate(EvaluateConfig.model_validate(config))
    compare(f"{folder}/sweep#{next(iter(settings))}", f"{folder}/plain", output=str(folder / "compare.html"))
    return {
        "demo": demo_page(folder / "demo"),
        "curation": curation_page(folder / "curation"),
        "evaluation": folder / "evaluation" / "report.html",
        "sweep": folder / "sweep" / "report.html",
        "comparison": folder / "compare.html",
        "validation": validation_page(folder / "runs"),
        "training": training_page(folder / "run"),
    }


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parents: list[Element]
    text: str = ""


@dataclass
class Parsed(HTMLParser):
    """Elements of a page in order, each with its parents and the text in it."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes}, [*self.open])
        self.elements.append(element)
        if tag not in WITHOUT_END:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in WITHOUT_END:
            assert self.open.pop().tag == tag

    def handle_data(self, text: str) -> None:
        for element in self.open:
            element.text += text

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


def parsed(path: Path) -> Parsed:
    page = Parsed()
    page.feed(path.read_text())
    assert page.open == []
    return page


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_what_the_base_gives(pages: dict[str, Path], name: str) -> None:
    page = parsed(pages[name])
    meta = {
        element.attributes.get("name"): element.attributes["content"]
        for element in page.all("meta")
        if "content" in element.attributes
    }
    assert "width=device-width" in meta["viewport"] and meta["color-scheme"] == "light dark"
    (style,), (script,) = page.all("style"), page.all("script")
    assert (TEMPLATES / "report.css").read_text().strip() in style.text
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in meta[None] and "default-src 'none'" in meta[None]
    # Every section is linked from the header, and every link leads somewhere.
    anchors = {f"#{element.attributes['id']}" for element in page.elements if "id" in element.attributes}
    links = [element.attributes["href"] for element in page.all("a")]
    assert {link for link in links if link.startswith("#")} <= anchors
    assert (
        {f"#{element.attributes['id']}" for element in page.all("h2")}
        == {link for link in links if link.startswith("#section")}
        != set()
    )
    assert all(
        any("table" in parent.attributes.get("class", "").split() for parent in table.parents)
        for table in page.all("table")
    )
    assert page.all("table") and page.all("main") and page.all("dialog") and len(page.all("h1")) == 1
    for image in page.all("img"):
        assert (
            image.attributes["alt"]
            and image.attributes["src"]
            and any("zoom" in parent.attributes.get("class", "") for parent in image.parents)
        )


@pytest.mark.parametrize("name", PAGES)
def test_nothing_comes_from_elsewhere_and_text_stays_text(pages: dict[str, Path], name: str) -> None:
    page = parsed(pages[name])
    for element in page.elements:
        assert not any(attribute.startswith("on") for attribute in element.attributes)
        for attribute in ("src", "href"):
            link = element.attributes.get(attribute, "#")
            assert (
                link.startswith(("#", "data:image/"))
                or (pages[name].parent / link).exists()
                or link == "curated/curation.html"
            )
    assert not page.all("link") and not re.search(r"@import|url\(", page.all("style")[0].text)
    if name not in ("demo", "validation"):
        assert HACK in page.all("main")[0].text or HACK in {image.attributes["alt"] for image in page.all("img")}


def test_pages_beside_each_other_are_linked(pages: dict[str, Path]) -> None:
    def linked(name: str) -> set[str]:
        return {
            element.attributes["href"]
            for element in parsed(pages[name]).all("a")
            if element.attributes["href"][0] != "#"
        }

    assert linked("demo") == {"curated/curation.html"}
    assert linked("comparison") == {"sweep/report.html", "plain/report.html"}
    assert linked("validation") == set()  # of a tokenizer, whose checkpoints have no report of their own
    evaluated = pages["validation"].parent / "step-0001000" / "evaluation" / "report.html"
    storage.write_text(str(evaluated), "<p>")
    validator = NothingMeasured(ValidationSchedule(best_by="psnr"), str(pages["validation"].parents[1]))
    validator.add(validator.rows()[0])
    assert linked("validation") == {"step-0001000/evaluation/report.html"}
    assert linked("training") == {"config.yaml"}
    # The pages of a run and of its validation lead to each other.
    run = pages["validation"].parents[1]
    shutil.copytree(pages["training"].parent, run, dirs_exist_ok=True)
    validator.add(validator.rows()[0])
    assert "../report.html" in linked("validation")
    with open_report(run) as report:
        report.begin(0, [])
    assert '<a href="validation/report.html">' in (run / "report.html").read_text()


def test_templates_share_base_style_and_script() -> None:
    reports = {path for path in PACKAGE.rglob("*.html.j2") if path.parent != TEMPLATES}
    assert len(reports) == 7
    for path in reports:
        text = path.read_text()
        assert text.startswith('{% extends "base.html.j2" %}') and '{% import "macros.html.j2" as ui %}' in text
        assert not re.search(r"<(style|script|table|img|figure)\b|\|safe|\|format|autoescape|round\(", text), path
    playground = (PACKAGE / "serving" / "playground.html").read_text()
    assert '{% include "style.css" %}' in playground and ":root" not in playground
    assert {path.suffix for path in PACKAGE.rglob("*.css")} and all(
        p.parent == TEMPLATES for p in PACKAGE.rglob("*.css")
    )


def test_quarantined_samples_are_shown_with_their_names_as_text(pages: dict[str, Path]) -> None:
    page = parsed(pages["curation"])
    captions = [element.text for element in page.all("figcaption")]
    undecodable, no_caption = (
        next(text for text in captions if text.startswith(f"{n}{HACK_NAME}: ")) for n in range(2)
    )
    assert undecodable.endswith(": image 4 bytes") and no_caption.endswith(" bytes")
    shown = {image.attributes["alt"]: image for image in page.all("img")}
    assert f"1{HACK_NAME}" in shown and f"0{HACK_NAME}" not in shown
    titles = {element.attributes.get("title") or "" for element in page.elements}
    assert {re.sub("-[0-9a-f]{12}", "", title) for title in titles} >= {f"shard in__h: {HACK}", "shard in__h"}


# --- In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Page]:
    with browser.page() as page:
        page.look()
        page.goto(pages[request.param].as_uri())
        yield page
        assert page.complaints == [] and page.js("window.hacked") is None


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_a_page_fits_phone_and_desk_in_light_and_dark(page: Page) -> None:
    page.js("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    seen = set()
    for width in (320, 390, 1200):
        for scheme in ("light", "dark"):
            page.look(width, 844, scheme)
            assert page.js("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
            seen.add((scheme, page.js("getComputedStyle(document.body).backgroundColor")))
    assert len(seen) == 2 and len(dict(seen)) == 2
    shown = page.js("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.js("getComputedStyle(document.body).backgroundColor") != shown and page.text("#theme") == "Dark"
    # A heading that was linked to is not under the header.
    page.js("document.querySelector('header nav a:last-child').click()")
    heading = "[...document.querySelectorAll('h2')].at(-1).getBoundingClientRect()"
    page.wait(f"{heading}.top >= document.querySelector('header').offsetHeight")


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES, indirect=True)
@pytest.mark.parametrize("width", [390, 1200])
def test_a_click_or_a_key_shows_an_image_larger(page: Page, width: int) -> None:
    page.look(width, 844)
    opened, area = "document.querySelector('#view').open", "(({width, height}) => width * height)"
    small = page.js(f"{area}(document.querySelector('.zoom img').getBoundingClientRect())")
    page.click(".zoom")
    page.wait(f"{opened} && {area}(document.querySelector('#view img').getBoundingClientRect()) > 1.3 * {small}")
    assert page.text("#view p").startswith(page.text(".zoom + figcaption"))
    images = page.js("document.querySelectorAll('#view img').length")
    assert images == page.js("document.querySelector('.zoom').querySelectorAll('img').length")
    # In the window, whatever the size of the image.
    box = "document.querySelector('#view').getBoundingClientRect()"
    assert page.js(f"{box}.left >= 0 && {box}.right <= innerWidth && {box}.bottom <= innerHeight")
    page.press("ArrowRight")
    caption = (
        "[...document.querySelectorAll('.zoom + figcaption')].filter((one) => one.checkVisibility())[1].textContent"
    )
    page.wait(f"document.querySelector('#view p').textContent.startsWith({caption})")
    page.press("Escape")
    page.wait(f"!{opened} && document.activeElement === document.querySelector('.zoom')")
    page.press("Enter")
    # An image that has just loaded moves the button.
    page.wait(f"{opened} && [...document.querySelectorAll('#view img')].every((one) => one.style.cssText)")
    page.click("#view form button")
    page.wait(f"!{opened}")


# --- Goals


def test_a_goal_is_told_in_words_beside_its_result(pages: dict[str, Path]) -> None:
    limits = next(
        row.text for row in parsed(pages["curation"]).all("tr") if "quarantined" in row.text and "≤" in row.text
    )
    assert "≤ 20 %" in limits and "✓ met" in limits
    best = next(row.text for row in parsed(pages["validation"]).all("tr") if "best" in row.text)
    assert "2,000 best" in best and "24.5" in best and "23.5 to 25.5" in best


def test_the_demos_goals_are_those_of_its_default_settings() -> None:
    found = goals(DemoConfig(folder="other", seed=3), stage_results())
    assert [goal.met for goal in found] == [True, False, True, False, True]
    assert [goal.target for goal in found] == [26, 0.9, 0.75, 0.85, 0.6]
    assert goals(DemoConfig(scenes=240), stage_results()) == []
