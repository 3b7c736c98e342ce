"""One configuration style: pydantic models that forbid unknown keys, small YAML files, ``--set a.b=c``."""

from __future__ import annotations

import argparse
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from .errors import UserError

C = TypeVar("C", bound="Config")


class Config(pydantic.BaseModel):
    """Base of every typed configuration: immutable, no unknown keys, a docstring under each field."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


def load_config(cls: type[C], path: str | None, overrides: Sequence[str] = (), *, section: str | None = None) -> C:
    """A ``cls`` from the YAML file ``path`` (None: all defaults), then ``a.b=c`` overrides with YAML values.

    ``section`` reads one top-level key of the file. UserError names the file or the override, the dotted key, and
    what was expected there.
    """
    data = read_yaml(path, section) if path else {}
    overridden = {}
    for item in overrides:
        key, value = parse_override(item)
        overridden[key] = item
        _set(data, key, value, item)
    return validate(cls, data, path, overridden)


def validate(
    cls: type[C], data: Mapping[str, Any], source: str | None = None, overridden: Mapping[str, str] | None = None
) -> C:
    """A ``cls`` of ``data``; UserError names ``source``, or the override that set the key, and what was expected."""
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(_explain(cls, error, source, overridden or {})) from None


def parse_override(item: str) -> tuple[str, Any]:
    """``"a.b=c"`` as its dotted key and its value read as YAML."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {item}: expected key=value, for example --set model.width=256")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {item}: the value is not valid YAML") from None


def dump_yaml(config: Config) -> str:
    """The configuration as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The two flags that every job has."""
    parser.add_argument("--config", metavar="FILE", help="YAML file; every key has a default")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the configuration (dotted, repeatable)",
    )


def parse_job(cls: type[C], argv: Sequence[str] | None, *, prog: str, description: str) -> C:
    """Parse a job's command line into its configuration, and print that."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="configuration keys:\n" + "\n".join(describe(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    config = load_config(cls, args.config, args.overrides)
    print(dump_yaml(config), end="", flush=True)
    return config


def describe(cls: type[Config], prefix: str = "") -> Iterator[str]:
    """One line a key: dotted name, default, and the first line of its docstring."""
    for name, field in cls.model_fields.items():
        inner = _config_class(field.annotation)
        if inner is not None:
            yield from describe(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        summary = (field.description or "").split("\n")[0]
        yield f"  {prefix}{name} ({default})  {summary}".rstrip()


def read_yaml(path: str, section: str | None = None) -> dict[str, Any]:
    """The keys and values of a YAML file, or of one section of it; UserError names the file where it holds none."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror or error})") from None
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if section is not None and isinstance(data, dict):
        if section not in data:
            raise UserError(f"{path}: no section '{section}', found {', '.join(map(str, data)) or 'none'}")
        data = data[section]
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values at the top, got {type(data).__name__}")
    return data


def _set(data: dict[str, Any], dotted: str, value: Any, item: str) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise UserError(f"--set {item}: '{name}' is a single value, it has no key '{last}'")
    data[last] = value


def _explain(
    cls: type[Config], error: pydantic.ValidationError, path: str | None, overridden: Mapping[str, str]
) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    source = next((f"--set {item}" for key, item in overridden.items() if dotted.startswith(key)), path)
    where = f"{source}: " if source else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        names = _keys_at(cls, location[:-1])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(names)}"
        return f"{where}unknown key '{dotted}', {hint}{more}"
    if first["type"] == "missing":
        return f"{where}key '{dotted}' is required{more}"
    message = first["msg"].removeprefix("Value error, ")
    at = f"'{dotted}' = {first['input']!r}: " if dotted else ""
    return f"{where}{at}{message}{more}"


def _keys_at(cls: type[Config], location: Sequence[str]) -> list[str]:
    for name in location:
        field = cls.model_fields.get(name)
        inner = _config_class(field.annotation) if field else None
        if inner is None:
            return []
        cls = inner
    return list(cls.model_fields)


def _config_class(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        found = [c for c in map(_config_class, typing.get_args(annotation)) if c]
        return found[0] if len(found) == 1 else None
    return None
