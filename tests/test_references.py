"""References in docstrings, such as ``:func:`.rng.uniforms```, name something that exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from .kit.project import PACKAGE, ROOT

MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
REFERENCE = re.compile(r":(?:mod|class|func|data|meth|attr):`~?(\.*)([\w.]+)`")
Names = Mapping[str, set[str]]
"""What a module defines or imports at its top; of classes also their members."""


@cache
def names_of(module: str) -> Names:
    names: dict[str, set[str]] = {}
    for node in ast.parse(MODULES[module].read_text()).body:
        for name in defined(node):
            names[name] = set().union(*map(defined, ast.walk(node))) if isinstance(node, ast.ClassDef) else set()
    return names


def defined(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {alias.asname or alias.name for alias in aliases}
    return set()


def exists(module: str, dots: str, target: str) -> bool:
    """Whether a reference in ``module`` names a module, a name at the top of one, or a member of a class there."""
    if dots or target.startswith(f"{PACKAGE.name}."):
        base = module.split(".")[: -len(dots)] if dots else []
        path = ".".join([*base, target])
        at = next((m for m in sorted(MODULES, key=len, reverse=True) if f"{path}.".startswith(f"{m}.")), None)
        if at is None:
            return (ROOT / Path(*path.split("."))).is_dir()
        names, parts = names_of(at), [part for part in path[len(at) :].split(".") if part]
        return not parts or (parts[0] in names and (len(parts) == 1 or parts[1] in names[parts[0]]))
    names, (first, *rest) = names_of(module), target.split(".")
    members = set().union(*names.values())
    return (first in names and (not rest or not names[first] or rest[0] in names[first])) or first in members


def references(module: str) -> Iterator[tuple[str, str]]:
    return ((dots, target) for dots, target in REFERENCE.findall(MODULES[module].read_text()))


def test_references_in_docstrings_name_what_exists() -> None:
    found = ((module, *reference) for module in sorted(MODULES) for reference in references(module))
    assert [f"{module}: {dots}{target}" for module, dots, target in found if not exists(module, dots, target)] == []
