"""Prompts with labels from captioned images, equally many of each group, chosen by a hash so that none is picked by hand."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence

from ..errors import UserError
from .formats.metadata import json_object, required_text
from .formats.patterns import Pattern, pattern_text
from .formats.sources import find_images, read_rows
from .formats.texts import CAPTION_NAMES
from .prompts import PROMPT_FIELDS, Prompt


def grouped_prompts(
    pattern: Pattern,
    by: str,
    labels: Sequence[str],
    count: int,
    seed: int = 0,
    caption_keys: Sequence[str] = CAPTION_NAMES,
) -> list[Prompt]:
    """Choose ``count`` captions of each group: the texts whose hashes of ``seed``, group and text are the smallest.

    A group are the images with the same value of ``by`` in KEY.json, which becomes the prompts' category; ``by`` and
    ``labels`` of an image become their metadata. More prompts of a group begin with fewer ones; ids are ``GROUP-NUMBER``.
    Images without caption are passed over. Raises UserError for an image without one of the labels, for one caption with
    different labels within a group, for a group with fewer captions, and for labels that are a prompt's own fields.
    """
    if taken := next((name for name in (by, *labels) if name.lower() in PROMPT_FIELDS), None):
        raise UserError(f"label '{taken}': a field that prompts have themselves; expected another key of KEY.json")
    source, groups = pattern_text(pattern), dict[str, dict[str, dict[str, str]]]()
    for caption, meta in _captions(pattern, source, [by, *labels], caption_keys):
        before = groups.setdefault(meta[by], {}).setdefault(caption, meta)
        if before != meta:
            raise UserError(f"{source}: the caption '{caption}' is that of {before} and of {meta}, expected one")
    prompts = []
    for group, texts in sorted(groups.items()):
        if len(texts) < count:
            raise UserError(f"{source}: {len(texts)} captions of {by} '{group}', expected at least count={count}")
        chosen = heapq.nsmallest(
            count, texts, key=lambda text: hashlib.sha256(f"{seed}:{group}:{text}".encode()).digest()
        )
        prompts += [Prompt(f"{group}-{i:04d}", text, group, texts[text]) for i, text in enumerate(chosen)]
    if not prompts:
        raise UserError(f"{source}: no image with a caption")
    return prompts


def _captions(
    pattern: Pattern, source: str, names: Sequence[str], caption_keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    for url, label in find_images(pattern, caption_keys).items():
        for row in read_rows(url, label, caption_keys=caption_keys):
            if row["problem"]:
                continue
            meta = json_object(row["meta"]) or {}
            sample = f"{source}: sample {row['key']}"
            yield row["caption"], {name: required_text(meta, name, sample) for name in names}
