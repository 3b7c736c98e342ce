"""Prompt files: text, JSON (ImageReward, COCO), JSONL (GenEval), tables (PartiPrompts, DiffusionDB), and ``scenes``."""

from __future__ import annotations

import csv
import hashlib
import heapq
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, cast

import pyarrow as pa

from .. import storage
from ..config import PathKind
from ..errors import UserError
from .formats.metadata import json_text, json_value
from .formats.parquet_source import read_records
from .formats.patterns import file_name
from .formats.texts import PROMPT_NAMES, TextError, caption_text, text_encoding, text_of, trimmed
from .scenes import CATEGORIES, scene_prompts

log = logging.getLogger(__name__)

SCENES = "scenes"
PromptFile = Annotated[str, PathKind(names=(SCENES,))]
"""Path or URL of a prompt file, or ``scenes``."""
SCENES_PER_CATEGORY = 40
ID_KEYS = ("id", "key", "prompt_id")
PROMPT_FIELDS = frozenset({*PROMPT_NAMES, *ID_KEYS, "tag", "category", "settings"})
"""Names, in any case, of values that a row's prompt, identifier, category and sampling are read from."""
START = 4096
"""First bytes of a text file that tell its encoding."""
LONGEST_FIELD = 16 << 20
"""Longest value of a CSV or TSV (characters)."""


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


def read_prompts(source: str, *, count: int | None = None, seed: int = 0, distinct: bool = False) -> list[Prompt]:
    """Read the prompts of a file, whose format its extension tells, or generate those of ``scenes``.

    ``.txt`` has one prompt per line; ``.jsonl`` one object per line with ``prompt`` (or ``caption``, ``text``),
    optionally ``id``, and for GenEval ``tag`` and ``include``; ``.parquet``, ``.csv`` and ``.tsv`` the same as columns, as
    DiffusionDB and PartiPrompts have; ``.json`` is a list of such objects, or a COCO captions file. Blank prompts are
    skipped, in rows with a warning; prompts without an id get their line or row number.
    ``distinct`` keeps the first prompt of each text.
    ``count`` draws that many by a hash of ``seed`` and the id, so that the draw does not depend on the order of the
    file. Raises UserError for a source without prompts, and for duplicate ids.
    """
    if source == SCENES:
        prompts = _scenes(count, seed)
    else:
        prompts = _draw(_first(_read(source)) if distinct else _read(source), count, seed, source)
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
    kind = file_name(source).lower().rpartition(".")[2]
    try:
        if kind == "txt":
            prompts = filter(None, map(trimmed, _lines(source)))
            yield from (Prompt(f"{i:05d}", prompt) for i, prompt in enumerate(prompts))
        elif kind in RECORDS:
            yield from _from_records(RECORDS[kind](source), source)
        else:
            raise UserError(
                f"prompts {source}: expected a .txt, {', '.join(f'.{k}' for k in RECORDS)} file, or '{SCENES}'"
            )
    except IsADirectoryError:
        raise UserError(f"prompts {source}: a folder, expected a file") from None


def _lines(source: str) -> Iterator[str]:
    """Yield the lines with their ends; UserError for a line that is not text in the encoding of the file."""
    number = 0
    with storage.open_file(source) as stream:
        buffered = io.BufferedReader(cast(io.RawIOBase, stream))
        encoding = text_encoding(buffered.peek(START)[:START])
        try:
            for number, line in enumerate(io.TextIOWrapper(buffered, encoding, newline=""), 1):
                if "\0" in line:
                    raise UserError(f"{source}, line {number}: a NUL character, expected text")
                # Files with marks of their own may have been joined.
                yield line.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            passed = error.object[: error.start].decode(error.encoding, "ignore").count("\n")
            raise UserError(f"{source}, line {number + 1 + passed}: not {encoding.upper()} text") from None


def _jsonl(source: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(source)):
        if not line.strip():
            continue
        where = f"{source}, line {number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with a prompt, got {type(record).__name__}")
        yield number, where, record


def _table(source: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(_lines(source), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(LONGEST_FIELD)  # of the whole process
    try:
        header = next(reader, [])
        for number, fields in enumerate(filter(None, reader)):
            where = f"{source}, line {reader.line_num}"
            if len(fields) > len(header):
                raise UserError(f"{where}: {len(fields)} values, expected at most {len(header)}, as there are columns")
            yield number, where, dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not a row of a table ({error})") from None
    finally:
        csv.field_size_limit(before)


def _parquet(source: str) -> Iterator[Record]:
    """Yield rows as :data:`Record`; read in batches, because millions of dicts would fill the memory."""
    with storage.open_file(source) as stream:
        try:
            for number, record in enumerate(read_records(stream)):
                yield number, f"{source}, row {number}", record
        except IsADirectoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source}: not a parquet file ({str(error).splitlines()[0]})") from None


def _json(source: str) -> Iterator[Record]:
    """Yield the objects of a list, or the annotations of COCO's captions."""
    try:
        data = storage.read_json(source)
    except RecursionError as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None
    if isinstance(data, list):
        for number, entry in enumerate(data):
            if not isinstance(entry, dict):
                raise UserError(
                    f"{source}, entry {number}: expected an object with a prompt, got {type(entry).__name__}"
                )
            yield number, f"{source}, entry {number}", entry
        return
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise UserError(f"{source}: expected COCO's captions file, with 'annotations', or a list of prompts")
    for number, entry in enumerate(annotations):
        where = f"{source}, annotation {number}"
        if not isinstance(entry, dict) or not entry.keys() >= {"id", "image_id", "caption"}:
            raise UserError(f"{where}: an annotation without id, image_id and caption")
        yield number, where, {name: entry[name] for name in ("id", "image_id", "caption")}


Record = tuple[int, str, Mapping[str, Any]]
"""Number of a row, its place for messages, and its values by name."""
RECORDS: dict[str, Callable[[str], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "csv": partial(_table, delimiter=","),
    "tsv": partial(_table, delimiter="\t"),
    "parquet": _parquet,
    "json": _json,
}
"""Readers of files of rows by extension."""


def _from_records(records: Iterable[Record], source: str) -> Iterator[Prompt]:
    rows, blank, first_blank = 0, 0, ""
    for number, where, record in records:
        rows += 1
        # Names in any case; of several spellings of one, that in lower case counts.
        names = {trimmed(name).lower(): name for name in sorted(record, key=str.islower)}
        texts, problems = {}, {}
        for name in (names[wanted] for wanted in PROMPT_NAMES if wanted in names):
            try:
                texts[name] = caption_text(record[name], trimmed)
            except TextError as error:
                problems[name] = f"'{name}' is a {error}"
        key = next((name for name, text in texts.items() if text), None)
        if key is None and (problems or not texts):
            found = f" ({next(iter(problems.values()))})" if problems else ""
            columns = "" if problems else f"; found {', '.join(list(record)[:8]) or 'nothing'}"
            raise UserError(f"{where}: no prompt{found}, expected one of {', '.join(PROMPT_NAMES)}{columns}")
        if key is None:
            blank, first_blank = blank + 1, first_blank or where
            continue
        named, prompt_id = _identifier(record, names, where) or (None, f"{number:05d}")
        category, labels = None, [name for name in ("tag", "category") if name in names]
        for name in labels:
            with suppress(TextError):
                category = category or _label(record[names[name]])
        kept_apart = {key, named, names.get("category") if category else None}
        yield Prompt(prompt_id, texts[key], category or None, _meta(record, kept_apart, where))
    if blank:
        log.warning(
            "prompts %s: %d of %d rows have none and are passed over, first: %s", source, blank, rows, first_blank
        )


def _identifier(record: Mapping[str, Any], names: Mapping[str, str], where: str) -> tuple[str, str] | None:
    """Return the name and value of the first key with an id; None if there is none."""
    for name in (names[wanted] for wanted in ID_KEYS if wanted in names):
        try:
            if text := _label(record[name]):
                return name, text
        except TextError as error:
            raise UserError(f"{where}: '{name}' is a {error} or a number") from None
    return None


def _label(value: Any) -> str:
    """Return the text of an id or a category, which may be numbers; ``""`` for null, NaN and blank text."""
    scalar = isinstance(value, bool | int | float) and value == value
    return str(value) if scalar else text_of(value, trimmed)


def _meta(record: Mapping[str, Any], without: Collection[str | None], where: str) -> dict[str, Any]:
    """Return the other values of a row as JSON can represent them; UserError if it cannot."""
    # Bytes stay what they are, and are refused: an image beside its prompt is no text.
    rest = {name: value for name, value in record.items() if name not in without}
    meta = {name: value if isinstance(value, bytes) else json_value(value) for name, value in rest.items()}
    try:
        text = json_text(meta, ensure_ascii=False)
    except (TypeError, ValueError):
        raise UserError(f"{where}: value that JSON cannot represent in one of {', '.join(meta)}") from None
    # Unpaired surrogates, which no page or file of results could hold.
    return meta if text.isascii() or trimmed(text) == text else json.loads(trimmed(text))


def _first(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Yield the first prompt of each text, of which only hashes are held: a file may have millions."""
    seen = set[bytes]()
    for prompt in prompts:
        digest = hashlib.sha256(prompt.text.encode()).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield prompt


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
