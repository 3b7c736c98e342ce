"""Prompt files: text, JSONL (GenEval too), parquet (DiffusionDB) and COCO captions, and the prompts of ``scenes``."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa

from .. import storage
from ..config import PathKind
from ..errors import UserError
from .formats.metadata import json_value
from .formats.parquet_source import read_records
from .formats.texts import PROMPT_NAMES, TextError, decode_line, text_of, trimmed
from .scenes import CATEGORIES, scene_prompts

SCENES = "scenes"
PromptFile = Annotated[str, PathKind(names=(SCENES,))]
"""Path or URL of a prompt file, or ``scenes``."""
SCENES_PER_CATEGORY = 40
ID_KEYS = ("id", "key", "prompt_id")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a prompt set."""

    id: str
    """Identifier, unique in the set."""
    text: str
    category: str | None = None
    """Task of the benchmark that the prompt belongs to."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the source, such as GenEval's ``include``."""


def read_prompts(source: str, *, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read the prompts of a file, whose format its extension tells, or generate those of ``scenes``.

    ``.txt`` has one prompt per line; ``.jsonl`` one object per line with ``prompt`` (or ``caption``, ``text``),
    optionally ``id``, and for GenEval ``tag`` and ``include``; ``.parquet`` the same as columns, as DiffusionDB has;
    ``.json`` is a COCO captions file. Blank prompts are skipped; prompts without an id get their line or row number.
    ``count`` draws that many by a hash of ``seed`` and the id, so that the draw does not depend on the order of the
    file. Raises UserError for a source without prompts, and for duplicate ids.
    """
    prompts = _scenes(count, seed) if source == SCENES else _draw(_read(source), count, seed, source)
    if not prompts:
        raise UserError(f"prompts {source}: none found, expected at least one")
    twice = next((name for name, times in Counter(p.id for p in prompts).items() if times > 1), None)
    if twice is not None:
        raise UserError(f"prompts {source}: duplicate id '{twice}'; expected unique ids")
    return prompts


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of all fields of ``prompts``, in order."""
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(json.dumps([p.id, p.text, p.category, dict(p.meta)], sort_keys=True).encode())
    return digest.hexdigest()


def _scenes(count: int | None, seed: int) -> list[Prompt]:
    per_category = SCENES_PER_CATEGORY if count is None else -(-count // len(CATEGORIES))
    made = scene_prompts(per_category, seed)
    if count is not None:
        # Interleaved, so that a count that is no multiple of six still covers the categories evenly.
        made = [made[i % len(CATEGORIES) * per_category + i // len(CATEGORIES)] for i in range(count)]
    return [Prompt(f"{i:05d}", claim.caption, claim.category) for i, claim in enumerate(made)]


def _read(source: str) -> Iterator[Prompt]:
    if source.endswith(".txt"):
        prompts = filter(None, map(trimmed, _lines(source)))
        yield from (Prompt(f"{i:05d}", prompt) for i, prompt in enumerate(prompts))
    elif source.endswith(".jsonl"):
        yield from _from_records(_jsonl(source))
    elif source.endswith(".parquet"):
        yield from _from_records(_parquet(source))
    elif source.endswith(".json"):
        yield from _coco(storage.read_json(source), source)
    else:
        raise UserError(f"prompts {source}: expected a .txt, .jsonl, .parquet or (COCO) .json file, or '{SCENES}'")


def _lines(source: str) -> Iterator[str]:
    with storage.open_file(source) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield decode_line(line)
            except UnicodeDecodeError:
                raise UserError(f"{source}, line {number}: not UTF-8 text") from None


def _jsonl(source: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number, the location for messages, and the object of each line that is not blank."""
    for number, line in enumerate(_lines(source)):
        if not line.strip():
            continue
        where = f"{source}, line {number + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with a prompt, got {type(record).__name__}")
        yield number, where, record


def _parquet(source: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield rows as :func:`_jsonl` yields lines; read in batches, because millions of dicts would fill the memory."""
    with storage.open_file(source) as stream:
        try:
            for number, record in enumerate(read_records(stream)):
                yield number, f"{source}, row {number}", record
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source}: not a parquet file ({str(error).splitlines()[0]})") from None


def _from_records(records: Iterable[tuple[int, str, Mapping[str, Any]]]) -> Iterator[Prompt]:
    for number, where, record in records:
        texts, problems = {}, {}
        for name in (name for name in PROMPT_NAMES if name in record):
            try:
                texts[name] = text_of(record[name], trimmed)
            except TextError as error:
                problems[name] = f"'{name}' is a {error}"
        key = next((name for name, text in texts.items() if text), None)
        if key is None and (problems or not texts):
            found = f" ({next(iter(problems.values()))})" if problems else ""
            raise UserError(f"{where}: no prompt{found}, expected one of {', '.join(PROMPT_NAMES)}")
        if key is None:
            continue
        named = next((k for k in ID_KEYS if record.get(k) is not None), None)
        category = record.get("tag", record.get("category"))
        # Bytes stay what they are, and are refused below: an image beside its prompt is no text.
        rest = {k: v for k, v in record.items() if k not in (key, named, "category")}
        meta = {k: v if isinstance(v, bytes) else json_value(v) for k, v in rest.items()}
        try:
            json.dumps(meta)
        except (TypeError, ValueError):
            raise UserError(f"{where}: value that JSON cannot represent in one of {', '.join(meta)}") from None
        prompt_id = f"{number:05d}" if named is None else trimmed(str(record[named]))
        yield Prompt(prompt_id, texts[key], None if category is None else str(category), meta)


def _coco(data: Any, source: str) -> Iterator[Prompt]:
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise UserError(f"{source}: expected COCO's captions file, with 'annotations'")
    for entry in annotations:
        try:
            if caption := text_of(entry["caption"], trimmed):
                yield Prompt(str(entry["id"]), caption, meta={"image_id": entry["image_id"]})
        except (KeyError, TypeError, TextError):
            raise UserError(f"{source}: an annotation without id, image_id and caption") from None


def _draw(prompts: Iterable[Prompt], count: int | None, seed: int, source: str) -> list[Prompt]:
    if count is None:
        return list(prompts)
    total = 0

    def placed() -> Iterator[tuple[bytes, int, Prompt]]:
        nonlocal total
        for prompt in prompts:
            yield hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest(), total, prompt
            total += 1

    # Keeps only the drawn prompts in memory: the file may have millions.
    chosen = heapq.nsmallest(count, placed())
    if count > total:
        raise UserError(f"prompts {source}: {total} found, expected at least count={count}")
    return [prompt for _, _, prompt in sorted(chosen, key=lambda item: item[1])]
