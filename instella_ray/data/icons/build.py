"""Icons job: sets of drawings as captioned WebDataset tars, one folder for each split."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from ... import logs, storage
from ...config import Config, InputPath, OutputPath
from ...errors import UserError
from ...packages import extra_import
from ...runs import Provenance, recorded
from ..curation.dedup import Fingerprints, fingerprint
from ..curation.filters.duplicates import DuplicateConfig
from ..formats.images import UndecodableError, decode_rgb, fit_square
from ..formats.parts import DROPPED, KEPT, LEDGER, QUARANTINED, Ledger, Mode, open_output, verdict_of
from ..formats.png import write_png
from ..formats.shards import Sample, write_webdataset
from ..formats.sources import find_images, read_rows
from ..provenance import output_provenance, shard_provenance
from .captions import long_caption, short_caption
from .drawings import Drawing, Found, Vocabulary, read_clip_art, read_iconify
from .render import RefusedDrawingError, render
from .sets import IconSet, SetList, require_available, set_list, unpacked
from .splits import SPLITS, HoldOutConfig, split_all

SET_TABLE = "sets.json"
"""File of the sets: licence, attribution and source, ledger, and number of samples in each split."""


class ImageFolder(Config):
    """Captioned images of one style that are rendered already, such as a folder of img2dataset."""

    path: InputPath
    """Tars or folder of images."""
    style: str
    """Words for the style in captions."""
    licence: str
    """SPDX identifier; one that allows training and passing on."""
    attribution: str
    """Author to name."""
    source: str
    """Package and version, or URL."""
    concept: str = "(?P<concept>.+)"
    """Regular expression with a group ``concept`` that finds what an image shows in its caption; others are left out."""


class IconsConfig(Config):
    """Configuration of the icons job."""

    output: OutputPath
    """Output folder: ``train/``, ``held-out-concepts/``, ``held-out-pairs/`` and ``held-out/`` with tars, ``ledger.json``,
    ``sets.json`` and ``run.json``."""
    mode: Mode = "new"
    """If the output exists: ``new`` fails, ``resume`` builds it anew unless it is finished, ``fresh`` deletes it and starts
    over."""
    sets: tuple[str, ...] = ("noto", "fluent-emoji-flat", "fxemoji", "openmoji", "twemoji", "emojione")
    """Sets by name; ``openclipart`` is another, from Debian."""
    sources: InputPath | None = None
    """Local folder of unpacked packages by their names, such as ``node_modules``; null: fetched by npm, and by apt those of
    Debian."""
    images: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], ImageFolder] = Field(default_factory=dict)
    """Folders of images, as further sets by name."""
    size: int = Field(96, ge=16, le=1024)
    """Side of the images (px)."""
    samples_per_shard: int = Field(1000, ge=1)
    hold_out: HoldOutConfig = HoldOutConfig()
    duplicates: DuplicateConfig = DuplicateConfig(max_distance=2, max_color_difference=8)
    """Near duplicates of held-out images, which are left out of training."""
    workers: int | None = Field(None, ge=1)
    """Threads that render; null: one a core."""


class IconImage(NamedTuple):
    """Rendered drawing."""

    set: str
    key: str
    style: str
    concept: str
    png: bytes
    meta: dict[str, Any]
    print: dict[str, Any]
    """Fingerprint (:func:`..curation.dedup.fingerprint`)."""


def run_icons(cfg: IconsConfig) -> Ledger:
    """Build the captioned images of ``cfg.sets`` into ``cfg.output``; returns the ledger, which is also written there.

    The same packages give the same files. Raises UserError for an unknown set, a licence that does not allow training and
    passing on, a package that cannot be found or has other files than expected, and if the output exists and ``cfg.mode``
    does not allow it.
    """
    cfg = cfg.model_copy(update={"output": storage.absolute(cfg.output)})
    listed = set_list()
    sets = _sets(cfg, listed)
    settings = cfg.model_dump(mode="json", exclude={"output", "mode", "sources", "workers"})
    known: dict[str, IconSet | ImageFolder] = {**sets, **cfg.images}
    about = {
        name: {
            "licence": entry.licence,
            "attribution": entry.attribution,
            "source": entry.source,
            "style": entry.style,
        }
        for name, entry in known.items()
    }
    packages = {name: {"package": each.label, "digest": each.digest} for name, each in sets.items()}
    settings["packages"] = {"vocabulary": listed.vocabulary.digest} | {n: p["digest"] for n, p in packages.items()}
    folder_inputs = [
        each for name, folder in cfg.images.items() for each in shard_provenance(f"images {name}", folder.path)
    ]
    settings["inputs"] = [each.identity for each in folder_inputs]
    if open_output(cfg.output, cfg.mode, settings):
        if storage.exists(storage.join(cfg.output, LEDGER)):
            return Ledger.of([storage.read_json(storage.join(cfg.output, LEDGER))])
        for split in SPLITS:
            storage.remove_tree(storage.join(cfg.output, split))
    inputs = [
        Provenance(role="drawings", kind="files", path=each.label, identity=each.digest)
        for each in (listed.vocabulary, *sets.values())
    ]
    inputs += folder_inputs
    with recorded(cfg.output, "icons", cfg, inputs) as outputs:
        verdicts, images = _icon_images(cfg, listed, sets)
        splits = split_all(images, _fingerprints(images), cfg.hold_out, cfg.duplicates) if images else []
        for image, verdict in zip(images, splits, strict=True):
            verdicts[image.set][KEPT if verdict in SPLITS else verdict] += 1
        ledgers = {name: Ledger().count(counts.elements()) for name, counts in verdicts.items()}
        table = {
            name: about[name] | packages.get(name, {}) | ledger.to_json() | {"splits": _counts(name, images, splits)}
            for name, ledger in ledgers.items()
        }
        for split in SPLITS:
            chosen = [image for image, of in zip(images, splits, strict=True) if of == split]
            _write(cfg, split, chosen)
        ledger = Ledger.of(each.to_json() for each in ledgers.values())
        if not ledger.kept:
            raise UserError(f"{cfg.output}: no drawing was kept ({ledger.summary()})")
        storage.write_json(storage.join(cfg.output, SET_TABLE), table)
        # Last: a build without it is not finished.
        storage.write_json(storage.join(cfg.output, LEDGER), ledger.to_json())
        outputs.append(output_provenance("shards", cfg.output, ledger))
        return ledger


def check_icons(cfg: IconsConfig) -> None:
    """Raise UserError for what can be known to fail in :func:`run_icons` before anything is fetched, read or written."""
    listed = set_list()
    require_available(listed.packages(_sets(cfg, listed)), cfg.sources)


def _sets(cfg: IconsConfig, listed: SetList) -> dict[str, IconSet]:
    """Return the sets of ``cfg`` by name.

    Raises UserError if the renderer is missing, for an unknown set, and for image folders whose licence does not allow
    their use, or whose names or patterns are wrong.
    """
    extra_import("resvg_py", "icons", "icons")
    sets = listed.choose(cfg.sets)
    for name, folder in cfg.images.items():
        listed.check_licence(f"images.{name}", folder.licence)
        if name in cfg.sets:
            raise UserError(f"images.{name}: there is a set of this name; choose another")
        try:
            groups = re.compile(folder.concept).groupindex
        except re.error as error:
            raise UserError(f"images.{name}.concept: not a regular expression ({error})") from None
        if "concept" not in groups:
            raise UserError(f"images.{name}.concept: no group named concept; expected (?P<concept>...)")
    return sets


def _icon_images(
    cfg: IconsConfig, listed: SetList, sets: Mapping[str, IconSet]
) -> tuple[dict[str, Counter[str]], list[IconImage]]:
    """Return the images of all sets, and by set the verdicts on what did not become one."""
    verdicts: dict[str, Counter[str]] = {name: Counter() for name in (*sets, *cfg.images)}
    drawings, images = list[Drawing](), list[IconImage]()
    with unpacked(listed.packages(sets), cfg.sources) as folders:
        vocabulary = Vocabulary(folders[0]) if len(folders) > len(sets) else None
        for (name, entry), folder in zip(sets.items(), folders[len(folders) - len(sets) :], strict=True):
            found: Iterable[Found]
            if vocabulary is None or entry.registry == "debian":
                found = read_clip_art(name, entry, folder)
            else:
                found = read_iconify(name, entry, folder, vocabulary)
            for verdict, drawing in found:
                if drawing is None:
                    verdicts[name][verdict] += 1
                else:
                    drawings.append(drawing)
    jobs: list[tuple[str, Any]] = [(drawing.set, partial(_rendered, drawing, cfg.size)) for drawing in drawings]
    jobs += [(name, each) for name, folder in cfg.images.items() for each in _images(name, folder, cfg.size)]
    with ThreadPoolExecutor(cfg.workers or len(os.sched_getaffinity(0))) as pool:
        made = pool.map(lambda job: job[1](), jobs)
        for (name, _), image in zip(
            jobs, logs.progress_bar(made, desc="icons", total=len(jobs), unit="image"), strict=True
        ):
            if isinstance(image, str):
                verdicts[name][image] += 1
            else:
                images.append(image)
    return verdicts, images


def _rendered(drawing: Drawing, size: int) -> IconImage | str:
    """Render and caption a drawing; returns its verdict if it is refused."""
    try:
        pixels, opacity = render(drawing.svg, size)
    except RefusedDrawingError as error:
        return f"{DROPPED}:{error}"
    captions = {
        "caption_short": short_caption(drawing.concept, drawing.style),
        "caption_long": long_caption(drawing.concept, drawing.style, pixels, opacity),
    }
    about = {name: getattr(drawing, name) for name in ("set", "style", "concept", "licence", "source")}
    meta = about | captions | {"keywords": list(drawing.keywords)}
    return _icon_image(drawing.key, pixels, meta)


def _images(name: str, folder: ImageFolder, size: int) -> Iterator[Any]:
    """Yield a function for each image of a folder that returns its image or verdict."""
    for url, label in find_images(folder.path).items():
        for row in read_rows(url, label):
            yield partial(_image, name, folder, size, row)


def _image(name: str, folder: ImageFolder, size: int, row: Mapping[str, Any]) -> IconImage | str:
    if row.get("problem"):
        return verdict_of(row["problem"])
    found = re.match(folder.concept, row["caption"])
    concept = " ".join((found["concept"] or "").split()) if found else ""
    if not concept:
        return f"{DROPPED}:no_concept"
    try:
        pixels = fit_square(decode_rgb(row["image"]), size)
    except UndecodableError as error:
        return f"{QUARANTINED}:{error}"
    caption = short_caption(concept, folder.style)
    captions = {"caption_short": caption, "caption_long": row["caption"]}
    about = {"set": name, "style": folder.style, "concept": concept, "licence": folder.licence}
    meta = about | captions | {"source": f"{folder.source}#{row['key']}", "keywords": []}
    return _icon_image(f"{name}-{row['shard']}-{row['key']}", pixels, meta)


def _icon_image(key: str, pixels: np.ndarray, meta: dict[str, Any]) -> IconImage:
    png = write_png(pixels, {})
    height, width, _ = pixels.shape
    names = (meta["set"], key, meta["style"], meta["concept"])
    return IconImage(*names, png, meta | {"width": width, "height": height}, fingerprint(png))


def _fingerprints(images: Sequence[IconImage]) -> Fingerprints:
    prints = [image.print for image in images]
    return Fingerprints(
        exact=np.array([each["exact"] for each in prints], "S16"),
        near=np.array([each["near"] for each in prints], np.uint64),
        colors=np.array([list(each["colors"]) for each in prints], np.uint8),
        pixels=np.array([each["pixels"] for each in prints], np.int64),
    )


def _counts(name: str, images: Sequence[IconImage], splits: Sequence[str]) -> dict[str, int]:
    found = Counter(split for image, split in zip(images, splits, strict=True) if image.set == name)
    return {split: found[split] for split in SPLITS}


def _write(cfg: IconsConfig, split: str, images: Sequence[IconImage]) -> None:
    """Write the tars of a split, in an order that mixes sets and concepts."""
    ordered = sorted(images, key=lambda image: hashlib.sha256(image.key.encode()).digest())
    samples: Iterator[Sample] = (
        (each.key, each.png, each.meta["caption_short"], each.meta | {"key": each.key, "split": split})
        for each in ordered
    )
    folder = storage.join(cfg.output, split)
    for _ in write_webdataset(samples, folder, cfg.samples_per_shard):
        continue
