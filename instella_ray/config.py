"""Configuration: frozen pydantic models that forbid unknown keys, YAML files, ``--set a.b=c`` overrides, ``--help``."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import itertools
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from . import storage
from .errors import UserError
from .urls import absolute, is_local

C = TypeVar("C", bound="Config")

RENAMED = {"picture": "image", "rival": "baseline"}
"""Words of keys and flags before 0.1, and their replacements, for error messages."""
DATA = "share/instella_ray/configs"
"""Folder of the recipes in an installation, as pyproject.toml says it."""
REMOVED = {"repa_layer", "repa_width"}
"""Keys before 0.1 that had no effect."""
MIN_WIDTH = 40
"""Least width in columns to which the help is wrapped."""
PROBLEMS_SHOWN = 3
"""Problems of a configuration that an error message describes; further ones are only counted."""


class Config(pydantic.BaseModel):
    """Base class of all configurations: immutable, no unknown keys, each field described by the docstring under it."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class PathKind:
    """Annotation of a key that holds a path or URL; ``submit`` checks such keys before it sends a job to a cluster."""

    written: bool = False
    """Whether the job writes there; otherwise it reads what is there."""
    names: tuple[str, ...] = ()
    """Values that are no paths but names with a meaning of their own."""


OutputPath = Annotated[str, PathKind(written=True)]
"""Path or URL that a job writes."""
InputPath = Annotated[str, PathKind()]
"""Path or URL that a job reads."""


def check_output_file(url: str) -> None:
    """Raise UserError unless ``url`` may become a file; for commands that write one after long work."""
    if url.endswith("/") or storage.kind(url) == "directory":
        raise UserError(f"{url}: a folder, expected the name of a file")
    if is_local(url):
        folder = next(parent for parent in Path(absolute(url)).parents if os.path.lexists(parent))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{url}: {folder} is not a folder that can be written to")


class PathValue(NamedTuple):
    """Path or URL in a configuration, or text that :mod:`instella_ray.data.formats.patterns` takes for several."""

    key: str
    """Dotted key, with the number of a list's item."""
    value: str
    kind: PathKind


def load_config(
    cls: type[C],
    path: str | None,
    overrides: Sequence[str] = (),
    *,
    section: str | None = None,
    flags: Mapping[str, Any] | None = None,
) -> C:
    """Load a ``cls`` from ``path`` (None: all defaults), then apply ``flags``, then ``a.b=c`` overrides.

    ``path`` is a YAML file, or else the name of one of the :func:`recipes`.

    ``flags`` maps dotted keys to the values of a command's flags, which are used unparsed; the value of an override is
    parsed as YAML. ``section`` selects one top-level key of the file. Raises UserError naming the file, flag or
    override, the dotted key, and the expected value.
    """
    data = read_yaml(path, section) if path else {}
    given = [(key, value, f"--{key} {value}") for key, value in (flags or {}).items()]
    given += [(*parse_override(item), f"--set {item}") for item in overrides]
    for key, value, source in given:
        _set(data, key, value, source)
    return validate(cls, data, path, {key: source for key, _, source in given})


def validate(
    cls: type[C], data: Mapping[str, Any], source: str | None = None, given: Mapping[str, str] | None = None
) -> C:
    """Validate ``data`` as a ``cls``.

    ``given`` maps dotted keys to the flag or override that set them. Raises UserError naming that flag or override, or
    else ``source``, the dotted key, and the expected value.
    """
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(_explain(cls, error, source, given or {})) from None


def parse_override(item: str) -> tuple[str, Any]:
    """Split ``"a.b=c"`` into its dotted key and its value, parsed as YAML; UserError if either is invalid.

    A pattern of paths that YAML would take for its own syntax, such as ``*.tar`` or ``{0..4}.tar``, is text.
    """
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {item}: expected key=value, for example --set model.width=256")
    try:
        return key.strip(), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        if re.match(r"\*|\[.*[^]]$|{.*[^}]$", text):
            return key.strip(), text
        raise UserError(f"--set {item}: the value is not valid YAML; text may need quotes within quotes") from None


def dump_yaml(config: Config) -> str:
    """Return the configuration as YAML that :func:`load_config` can read."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and ``--set``, the flags common to all jobs."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file, or a recipe such as data/curate; every key has a default"
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, the flag that overrides single keys."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the configuration (dotted, repeatable)",
    )


def describe(cls: type[Config], prefix: str = "", default: Config | None = None) -> Iterator[str]:
    """Yield one line per key: dotted name, value in ``default`` (None: its default), and its whole docstring.

    On a terminal, the lines are wrapped to its width; elsewhere each stays one line, which tools such as grep find whole.
    """
    for name, field in cls.model_fields.items():
        inner = _config_class(field.annotation)
        required = default is None and field.is_required()
        value = getattr(default, name) if default else field.get_default(call_default_factory=True)
        if inner is not None and inner.model_fields:
            yield from describe(inner, f"{prefix}{name}.", value if isinstance(value, inner) else None)
            continue
        line = f"  {prefix}{name} ({'required' if required else repr(value)})  {plain_text(field.description or '')}".rstrip()
        if sys.stdout.isatty():
            width = max(MIN_WIDTH, shutil.get_terminal_size().columns - 1)
            line = textwrap.fill(line, width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)
        yield line


def plain_text(docstring: str) -> str:
    """Return a docstring in one line, without the markup of code and cross-references."""
    text = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(docstring.split()))
    return text.replace("``", "")


def path_kind(field: FieldInfo) -> PathKind | None:
    """Return the :class:`PathKind` that a key is annotated with; None if it holds no path."""
    annotations = [*field.metadata, *_metadata(field.annotation)]
    return next((each for each in annotations if isinstance(each, PathKind)), None)


def path_values(config: Config, prefix: str = "") -> Iterator[PathValue]:
    """Yield the paths and URLs that ``config`` holds, also in nested configurations and dicts or lists of them."""
    for name, field in type(config).model_fields.items():
        value, kind = getattr(config, name), path_kind(field)
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
        for key, part in [(name, value), *((f"{name}.{inner}", part) for inner, part in parts)]:
            if isinstance(part, Config):
                yield from path_values(part, f"{prefix}{key}.")
            elif kind is not None and isinstance(part, str) and part not in kind.names:
                yield PathValue(f"{prefix}{key}", part, kind)


def recipes() -> dict[str, Path]:
    """Return the configurations that come with this package by name, such as ``data/curate``.

    They are the files of ``configs/`` in a source checkout; an installed wheel has them among its data files.
    """
    checkout = Path(__file__).parents[1]
    folder = checkout / "configs"
    if not (checkout / "pyproject.toml").is_file():
        try:
            files = importlib.metadata.files("instella-ray") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        folders = (Path(str(file.locate())).resolve().parents for file in files if file.match(f"{DATA}/*/*.yaml"))
        folder = next((parents[1] for parents in folders), folder)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def config_file(path: str) -> Path:
    """Return ``path`` if there is such a file, else that of the recipe named so; UserError if there is neither.

    A recipe's folder may be left out where no other one has a recipe of that name.
    """
    file = Path(path)
    if file.suffix or file.is_file():
        return file
    known = recipes()
    named = [path] if path in known else [name for name in known if name.endswith(f"/{path}")]
    if len(named) != 1:
        raise UserError(f"{path}: no such file, and no recipe of that name{did_you_mean(path, list(known))}")
    return known[named[0]]


def read_yaml(path: str, section: str | None = None) -> dict[str, Any]:
    """Read the keys and values of a YAML file, a URL or a recipe, or of one of its sections.

    Raises UserError naming the file if it is unreadable, invalid or no mapping, or lacks the section.
    """
    try:
        text = config_file(path).read_text(encoding="utf-8") if is_local(path) else storage.read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot read the configuration (not UTF-8 text)") from None
    try:
        data = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # PyYAML raises a plain ValueError for an impossible date
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML ({reason})") from None
    if section is not None and isinstance(data, dict):
        if section not in data:
            raise UserError(f"{path}: no section '{section}', found {', '.join(map(str, data)) or 'none'}")
        data = data[section]
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values at the top, got {type(data).__name__}")
    return data


def _set(data: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise UserError(f"{source}: '{name}' is a single value, it has no key '{last}'")
    data[last] = value


def _explain(cls: type[Config], error: pydantic.ValidationError, path: str | None, given: Mapping[str, str]) -> str:
    """Describe the first problems in one line, each after the flag, override or file that it is in."""
    problems = [_problem(cls, details, path, given) for details in error.errors()]
    by_source = [
        (f"{source}: " if source else "") + "; ".join(text for _, text in found)
        for source, found in itertools.groupby(problems[:PROBLEMS_SHOWN], key=lambda problem: problem[0])
    ]
    hidden = len(problems) - PROBLEMS_SHOWN
    return "; ".join([*by_source, f"and {hidden} more"] if hidden > 0 else by_source)


def _problem(
    cls: type[Config], details: ErrorDetails, path: str | None, given: Mapping[str, str]
) -> tuple[str | None, str]:
    """Return what one of pydantic's errors is to blame on (None: nothing is known), and its description."""
    location = [str(part) for part in details["loc"]]
    dotted = ".".join(location)
    to_blame = [key for key in given if f"{dotted}.".startswith(f"{key}.")]
    source = given[max(to_blame, key=len)] if to_blame else path
    if details["type"] == "extra_forbidden":
        source = next((given[key] for key in given if key.startswith(f"{dotted}.")), source)
        names = _keys_at(cls, location[:-1])
        hint = ", removed: it had no effect" if location[-1] in REMOVED else did_you_mean(location[-1], names)
        return source, f"unknown key '{dotted}'{hint}"
    if details["type"] == "missing":
        return source, f"key '{dotted}' is required"
    value = "" if isinstance(details["input"], dict) else f" = {details['input']!r}"
    at = f"'{dotted}'{value}: " if dotted else ""
    return source, at + details["msg"].removeprefix("Value error, ")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown ``name``: the one of ``known`` that was meant, or all of them."""
    renamed = name
    for old, new in RENAMED.items():
        renamed = renamed.replace(old, new)
    close = [renamed] if renamed in known else difflib.get_close_matches(name, known, n=1)
    return f", did you mean '{close[0]}'?" if close else f", expected one of {', '.join(known)}" if known else ""


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose message about an unknown flag names the flag that was meant."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument '{flag}'{did_you_mean(flag, _flags(self)) if flag.startswith('-') else ''}")
        return found


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long flags of a parser."""
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _keys_at(cls: type[Config], location: Sequence[str]) -> list[str]:
    """Return the keys of the configuration at ``location``, following nested configurations and dicts or lists of them."""
    here: Any = cls
    for name in location:
        if inner := _config_class(here):
            here = inner.model_fields[name].annotation
        elif arguments := typing.get_args(here):
            here = arguments[1] if typing.get_origin(here) is dict else arguments[0]
    found = _config_class(here)
    return list(found.model_fields) if found else []


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield what the types within ``annotation`` are annotated with."""
    if typing.get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for inner in typing.get_args(annotation):
        yield from _metadata(inner)


def _config_class(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        found = [c for c in map(_config_class, typing.get_args(annotation)) if c]
        return found[0] if len(found) == 1 else None
    return None
