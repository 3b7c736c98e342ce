"""As much of ``kustomize build`` as ``cluster/`` uses, in its order; what it does not know is an error."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KEYS = {
    "Kustomization": {"resources", "components", "patches", "namespace", "labels", "images", "replacements"},
    "Component": {"resources", "patches", "replacements"},
}
GENERATED = {"configMapGenerator", "generatorOptions"}


class KustomizeError(Exception):
    """Something that the real program would refuse, or that this one does not know."""


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, those of its bases and components first."""
    return _accumulate(folder, "Kustomization", [])


def load_documents(text: str) -> list[Any]:
    """YAML documents without the sharing that anchors make: what is patched in one place stays as it is in the other."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(text) if document is not None]


def _accumulate(folder: Path, kind: str, objects: list[Object]) -> list[Object]:
    (settings,) = load_documents((folder / "kustomization.yaml").read_text())
    version = {"Kustomization": "v1beta1", "Component": "v1alpha1"}[kind]
    if settings.pop("kind") != kind or settings.pop("apiVersion") != f"kustomize.config.k8s.io/{version}":
        raise KustomizeError(f"{folder}: expected a {kind} of kustomize.config.k8s.io/{version}")
    _only(settings, KEYS[kind] | GENERATED, str(folder))
    for name in settings.get("resources", []):
        path = folder / name
        new = build(path) if path.is_dir() else load_documents(_inside(folder, name).read_text())
        objects = objects + new
    _refuse_twins(objects)
    for name in settings.get("components", []):
        objects = _accumulate(folder / name, "Component", objects)
    objects = objects + _generated(folder, settings)
    for patch in settings.get("patches", []):
        objects = _patched(objects, patch, folder)
    for target in objects if (namespace := settings.get("namespace")) else []:
        target["metadata"]["name" if target["kind"] == "Namespace" else "namespace"] = namespace
    for entry in settings.get("labels", []):
        _only(entry, {"pairs"}, f"{folder}: labels")
        for target in objects:
            target["metadata"].setdefault("labels", {}).update(entry["pairs"])
    for entry in settings.get("images", []):
        _only(entry, {"name", "newName", "newTag"}, f"{folder}: images")
        if not sum([_set_image(target, entry) for target in objects]):
            raise KustomizeError(f"{folder}: no container has the image {entry['name']}")
    for entry in settings.get("replacements", []):
        _replace(objects, entry, folder)
    return objects


def _generated(folder: Path, settings: Object) -> list[Object]:
    options = settings.get("generatorOptions", {})
    _only(options, {"disableNameSuffixHash"}, f"{folder}: generatorOptions")
    found = []
    for entry in settings.get("configMapGenerator", []):
        _only(entry, {"name", "files", "options"}, f"{folder}: configMapGenerator")
        if not options.get("disableNameSuffixHash"):
            raise KustomizeError(f"{folder}: names with a hash are not known here")
        data = {Path(name).name: _inside(folder, name).read_text() for name in entry["files"]}
        metadata = {"name": entry["name"], "labels": entry.get("options", {}).get("labels", {})}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return found


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise KustomizeError(f"{folder}: {name} is a file outside, which kustomize refuses")
    return path


def _only(given: Object, known: set[str], where: str) -> None:
    if unknown := set(given) - known:
        raise KustomizeError(f"{where}: {sorted(unknown)} not known")


def _name(target: Object) -> tuple[str, str]:
    return target["kind"], target["metadata"]["name"]


def _refuse_twins(objects: list[Object]) -> None:
    names = [_name(target) for target in objects]
    if twins := {name for name in names if names.count(name) > 1}:
        raise KustomizeError(f"{sorted(twins)}: more than once")


# --- patches


def _patched(objects: list[Object], entry: Object, folder: Path) -> list[Object]:
    _only(entry, {"path", "patch", "target"}, f"{folder}: patches")
    text = _inside(folder, entry["path"]).read_text() if "path" in entry else entry["patch"]
    (patch,) = load_documents(text)
    if "target" in entry:
        _only(entry["target"], {"kind", "name"}, f"{folder}: target")
        chosen = [target for target in objects if _selected(target, entry["target"])]
    else:
        chosen = [target for target in objects if _name(target) == _name(patch)]
    if not chosen:
        raise KustomizeError(f"{folder}: a patch finds nothing ({entry.get('target') or _name(patch)})")
    if isinstance(patch, dict) and patch.get("$patch") == "delete":
        return [target for target in objects if all(target is not one for one in chosen)]
    for target in chosen:
        if isinstance(patch, list):
            for operation in patch:
                _operate(target, operation)
        else:
            body = {key: value for key, value in patch.items() if key not in ("apiVersion", "kind", "metadata")}
            metadata = {k: v for k, v in patch["metadata"].items() if k not in ("name", "namespace")}
            _merge(target, body | ({"metadata": metadata} if metadata else {}))
    return objects


def _selected(target: Object, selector: Object) -> bool:
    """Names in the target of a patch are regular expressions, as the real program takes them."""
    kind, name = _name(target)
    return kind == selector["kind"] and re.fullmatch(selector.get("name", ".*"), name) is not None


def _merge(target: Object, patch: Object) -> None:
    for key, value in patch.items():
        if key.startswith("$"):
            raise KustomizeError(f"{key}: not known")
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)


def _operate(target: Object, operation: Object) -> None:
    """One step of RFC 6902: add, replace or remove."""
    _only(operation, {"op", "path", "value"}, operation["path"])
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = target
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            key: Any = len(place) if last == "-" else int(last)
        else:
            key = last
        if operation["op"] == "add":
            place.insert(key, operation["value"]) if isinstance(place, list) else place.update(
                {key: operation["value"]}
            )
        elif operation["op"] == "replace":
            place[key]  # what is not there cannot be replaced
            place[key] = copy.deepcopy(operation["value"])
        elif operation["op"] == "remove":
            del place[key]
        else:
            raise KustomizeError(f"{operation['op']}: not known")
    except (KeyError, IndexError):
        raise KustomizeError(f"{_name(target)}: nothing at {operation['path']}") from None


def _set_image(node: Any, entry: Object) -> int:
    """Name and tag of every container's image that is ``entry['name']``; the number of them."""
    if isinstance(node, list):
        return sum(_set_image(item, entry) for item in node)
    if not isinstance(node, dict):
        return 0
    found = 0
    for key, value in node.items():
        if key in ("containers", "initContainers"):
            for container in value:
                if container.get("image") == entry["name"]:
                    container["image"] = f"{entry['newName']}:{entry['newTag']}"
                    found += 1
        else:
            found += _set_image(value, entry)
    return found


# --- replacements: a part of one object, copied to others


def _replace(objects: list[Object], entry: Object, folder: Path) -> None:
    _only(entry, {"source", "targets"}, f"{folder}: replacements")
    source = dict(entry["source"])
    path = source.pop("fieldPath")
    (origin,) = [target for target in objects if _name(target) == (source["kind"], source["name"])]
    ((holder, key),) = _places(origin, path)
    value = holder[key]
    for choice in entry["targets"]:
        _only(choice, {"select", "fieldPaths", "options"}, f"{folder}: targets")
        _only(choice["select"], {"kind", "labelSelector"}, f"{folder}: select")
        _only(choice.get("options", {}), {"create"}, f"{folder}: options")
        for target in objects:
            if target["kind"] == choice["select"]["kind"] and _labelled(target, choice["select"].get("labelSelector")):
                for field in choice["fieldPaths"]:
                    for holder, key in _places(target, field):
                        if key not in holder and not choice.get("options", {}).get("create"):
                            raise KustomizeError(f"{_name(target)}: no field {field}")
                        holder[key] = copy.deepcopy(value)


def _labelled(target: Object, selector: str | None) -> bool:
    if selector is None:
        return True
    key, value = selector.split("=")
    return bool(target["metadata"].get("labels", {}).get(key) == value)


def _places(target: Object, path: str) -> Iterator[tuple[Object, str]]:
    """The mapping and key that ``a.b.[name=x].c`` leads to."""
    *parents, last = re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)
    place: Any = target
    for part in parents:
        if part.startswith("["):
            name, wanted = part[1:-1].split("=")
            found = [item for item in place if item.get(name) == wanted]
            if len(found) != 1:
                raise KustomizeError(f"{_name(target)}: {len(found)} items at {path}, expected one")
            place = found[0]
        elif part in place:
            place = place[part]
        else:
            raise KustomizeError(f"{_name(target)}: no {part} on the way to {path}")
    yield place, last


def walk(node: Any, visit: Callable[[Object], None]) -> None:
    """Call ``visit`` for every mapping within ``node``, itself included."""
    if isinstance(node, dict):
        visit(node)
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        walk(item, visit)
