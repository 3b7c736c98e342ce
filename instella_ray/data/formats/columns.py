"""Tables of samples: which column holds images, captions, keys and metadata, and the row of one record.

Columns are found by name, ignoring case.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ...errors import UserError
from .images import IMAGE_ENDINGS, MAX_IMAGE_BYTES
from .keys import ORIGINAL_KEY, Keys, readable, safe_key
from .metadata import LAION_NAMES, column_name, json_value
from .texts import CAPTION_NAMES, TextError, caption_of

IMAGE_COLUMNS = ("image", *IMAGE_ENDINGS, "image_bytes", "bytes")
LINK_COLUMNS = ("url", "image_url")
PATH_COLUMNS = ("file_name", "image", "path", "filepath")
"""Names of columns with paths of image files, of tables that are beside their images."""
KEY_COLUMNS = ("key", "__key__", "id", "uid")


class Columns(NamedTuple):
    """Names of the columns of a file, by their use; None for a column that the file lacks."""

    image: str | None
    """Encoded images: binary, or a struct with a binary ``bytes``."""
    link: str | None
    """URLs of the images, in a file without an image column."""
    key: str | None
    captions: tuple[str, ...]
    """Columns of captions, in order of preference."""
    meta: tuple[str, ...]
    """Columns of text, numbers or booleans, except the image, the key and the first of ``captions``."""
    path: str | None = None
    """Paths of the images, in a table beside them."""

    def names(self) -> list[str]:
        """Return the names of all columns to read."""
        return [name for name in dict.fromkeys((self.image, self.link, self.key, *self.captions, *self.meta)) if name]


def find_columns(
    schema: pa.Schema,
    url: str,
    *,
    captions: bool = True,
    paths: bool = False,
    caption_keys: Sequence[str] = CAPTION_NAMES,
) -> Columns:
    """Find the columns of a file by name and type; those of captions by ``caption_keys``.

    With ``paths``, one of paths takes the place of one of encoded images. Raises UserError naming ``url`` if there is no
    column of images, paths or links, or, with ``captions``, none of captions.
    """
    # Ignores duplicate names, which are ambiguous.
    names = [name for name, count in Counter(schema.names).items() if count == 1]
    types = {name: plain(schema.field(name).type) for name in names}
    text = [name for name in names if is_text(types[name])]
    image = None if paths else _first(IMAGE_COLUMNS, [name for name in names if _is_image(types[name])])
    path = _first(PATH_COLUMNS, text) if paths else None
    links = [name for name in names if _holds_text(types[name], lists=False)]
    link = None if image or path else _first(LINK_COLUMNS, links)
    candidates = [name for name in names if name != image and _may_be_caption(types[name])]
    texts = tuple(dict.fromkeys(name for wanted in caption_keys if (name := _first([wanted], candidates))))
    found = f"found {', '.join(schema.names) or 'none'}"
    if image is None and path is None and link is None:
        images = f"{', '.join(PATH_COLUMNS)} with paths of" if paths else f"{', '.join(IMAGE_COLUMNS)} with encoded"
        expected = f"expected {images} images, or {' or '.join(LINK_COLUMNS)}"
        raise UserError(f"{url}: no column with images or links to them; {expected}; {found}")
    if not texts and captions:
        other = _first(caption_keys, names)
        found += f", where {other} is {types[other]}" if other else ""
        raise UserError(f"{url}: no column with captions; expected {', '.join(caption_keys)}; {found}")
    keys = [name for name in names if name in text or pa.types.is_integer(types[name]) or _is_bytes(types[name])]
    key = _first(KEY_COLUMNS, keys)
    taken = {image, key, path, *texts[:1]}
    scalars = [name for name in names if name in {*text, link} or _is_number(types[name]) or _is_score(name, types)]
    return Columns(image, link, key, texts, tuple(name for name in scalars if name not in taken), path)


def table_row(
    values: Mapping[str, Any],
    columns: Columns,
    shard: str,
    number: int,
    keys: Keys,
    image: bytes | None,
    *,
    name: str | None = None,
    problem: str | None = None,
) -> dict[str, Any]:
    """Return the row of one record of a table, given as its values by column, and its image.

    ``name`` is its key unless a column has one; ``problem`` takes precedence over those that are found here.
    """
    name = (_text(values[columns.key]) if columns.key else "") or name or ""
    meta = _meta(values, columns)
    key, new = keys.assign(name) if name else (safe_key(f"{shard}-{number:07d}"), True)
    if name and key != name:
        meta.setdefault(ORIGINAL_KEY, readable(name))
    problem = problem or (None if new else "duplicate_key")
    try:
        caption = caption_of({column: values[column] for column in columns.captions}, columns.captions)
    except TextError:
        caption, problem = "", problem or "bad_caption"
    if image is not None and len(image) > MAX_IMAGE_BYTES:
        image, problem = None, problem or "oversized_member"
    linked = columns.link is not None and "url" in meta
    missing = "no_image" if image is None and not linked else "no_caption" if not caption else None
    row = {"key": key, "shard": shard, "row": number, "problem": problem or missing}
    return {**row, "image": image, "caption": caption or None, "meta": json.dumps(meta)}


def _text(value: str | bytes | int | None) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)


def _meta(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the metadata of a row, without nulls and NaN; of several spellings of a name, that in lower case counts."""
    meta: dict[str, Any] = {}
    for column in columns.meta:
        value, name = json_value(values[column]), "url" if column == columns.link else column_name(column)
        if value is not None and (column in (name, columns.link) or name not in meta):
            meta[name] = value
    return meta


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of ``wanted`` in ``names``, ignoring case; None if there is none."""
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in wanted if name in lowered), None)


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, encoded as a dictionary or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_text(kind: pa.DataType, *, lists: bool = True) -> bool:
    """Return whether values may be text: Hive, Impala and old Presto write text as bytes, COCO has lists of captions."""
    if lists and is_list(kind):
        return _holds_text(kind.value_type, lists=False)
    return is_text(kind) or _is_bytes(kind)


def _may_be_caption(kind: pa.DataType) -> bool:
    """Return whether values may be captions: also of an empty column, which writers give the type null or float."""
    return _holds_text(kind) or bool(pa.types.is_null(kind) or pa.types.is_floating(kind))


def _is_score(name: str, types: Mapping[str, pa.DataType]) -> bool:
    """Return whether a column has one of LAION's names and text as bytes, which may be numeric."""
    return column_name(name) in LAION_NAMES and _is_bytes(types[name])


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in kinds)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type) and not pa.types.is_struct(kind.field(index).type)
    return _is_bytes(kind)
