"""Prompts to sample: a text file, JSONL, parquet, COCO captions, GenEval's metadata, or the scenes' own."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import storage
from ..data.scenes import CATEGORIES, scene_prompts
from ..errors import UserError

SCENES = "scenes"
SCENES_PER_CATEGORY = 40
TEXT_KEYS = ("prompt", "caption", "caption_long", "text")
ID_KEYS = ("id", "key", "prompt_id")


@dataclass(frozen=True)
class Prompt:
    """What to make pictures of."""

    id: str
    """Unique in its set."""
    text: str
    category: str | None = None
    """A benchmark's task."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the source says of it beside these: GenEval's ``include``, say."""


def read_prompts(source: str, *, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of a file, by its ending, or of ``scenes``.

    ``.txt`` has a prompt a line; ``.jsonl`` an object a line with ``prompt`` (or ``caption``, ``text``), perhaps ``id``,
    and for GenEval ``tag`` and ``include``; ``.parquet`` the same as columns; ``.json`` is COCO's captions file.
    With ``count``, so many of them, drawn by a hash of ``seed`` and the id: the draw does not depend on the order of the
    file. UserError for a source that holds no prompts, and for an id that comes twice.
    """
    prompts = _scenes(count, seed) if source == SCENES else _draw(list(_read(source)), count, seed, source)
    if not prompts:
        raise UserError(f"prompts {source}: none found, expected at least one")
    twice = next((name for name, times in Counter(p.id for p in prompts).items() if times > 1), None)
    if twice is not None:
        raise UserError(f"prompts {source}: id '{twice}' comes twice")
    return prompts


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Sha256 over all of it, in order."""
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(json.dumps([p.id, p.text, p.category, dict(p.meta)], sort_keys=True).encode())
    return digest.hexdigest()


def _scenes(count: int | None, seed: int) -> list[Prompt]:
    per_category = SCENES_PER_CATEGORY if count is None else -(-count // len(CATEGORIES))
    made = scene_prompts(per_category, seed)
    if count is not None:
        # In turns, so that a count that six does not divide takes from all categories alike.
        made = [made[i % len(CATEGORIES) * per_category + i // len(CATEGORIES)] for i in range(count)]
    return [Prompt(f"{i:05d}", claim.caption, claim.category) for i, claim in enumerate(made)]


def _read(source: str) -> Iterator[Prompt]:
    if source.endswith(".txt"):
        lines = [line.strip() for line in storage.read_text(source).splitlines()]
        yield from (Prompt(f"{i:05d}", line) for i, line in enumerate(filter(None, lines)))
    elif source.endswith(".jsonl"):
        for number, line in enumerate(storage.read_text(source).splitlines(), 1):
            if line.strip():
                yield _from_record(_object(line, f"{source}, line {number}"), number - 1, f"{source}, line {number}")
    elif source.endswith(".parquet"):
        for number, record in enumerate(_parquet(source)):
            yield _from_record(record, number, f"{source}, row {number}")
    elif source.endswith(".json"):
        yield from _coco(storage.read_json(source), source)
    else:
        raise UserError(f"prompts {source}: expected a .txt, .jsonl, .parquet or (COCO) .json file, or '{SCENES}'")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with a prompt, got {type(record).__name__}")
    return record


def _parquet(source: str) -> list[dict[str, Any]]:
    with storage.open_file(source) as stream:
        try:
            rows: list[dict[str, Any]] = pq.read_table(stream).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source}: not a parquet file ({str(error).splitlines()[0]})") from None
    return rows


def _from_record(record: Mapping[str, Any], number: int, where: str) -> Prompt:
    key = next((k for k in TEXT_KEYS if isinstance(record.get(k), str) and record[k].strip()), None)
    if key is None:
        raise UserError(f"{where}: no prompt, expected one of {', '.join(TEXT_KEYS)}")
    named = next((k for k in ID_KEYS if record.get(k) is not None), None)
    category = record.get("tag", record.get("category"))
    meta = {k: v for k, v in record.items() if k not in (key, named, "category")}
    try:
        json.dumps(meta)
    except (TypeError, ValueError):
        raise UserError(f"{where}: holds what JSON cannot ({', '.join(meta)})") from None
    name = f"{number:05d}" if named is None else str(record[named])
    return Prompt(name, record[key].strip(), None if category is None else str(category), meta)


def _coco(data: Any, source: str) -> Iterator[Prompt]:
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise UserError(f"{source}: expected COCO's captions file, with 'annotations'")
    for entry in annotations:
        try:
            yield Prompt(str(entry["id"]), str(entry["caption"]).strip(), meta={"image_id": entry["image_id"]})
        except (KeyError, TypeError):
            raise UserError(f"{source}: an annotation without id, image_id and caption") from None


def _draw(prompts: list[Prompt], count: int | None, seed: int, source: str) -> list[Prompt]:
    if count is None or count == len(prompts):
        return prompts
    if count > len(prompts):
        raise UserError(f"prompts {source}: {len(prompts)} there, count asks for {count}")

    def place(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest()

    chosen = {p.id for p in sorted(prompts, key=place)[:count]}
    return [p for p in prompts if p.id in chosen]
