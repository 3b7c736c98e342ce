"""Every object that the overlays build is valid, and would not be with any of its keys misspelt."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.errors import UserError

from ..kit.kubernetes import Object
from ..kit.manifests import check_object, crd_validator
from ..kit.overlays import OVERLAYS, objects, of_kind

pytestmark = pytest.mark.process  # kubectl builds what they look at

REFUSED = (
    pydantic.ValidationError,
    kubernetes_validate.ValidationError,
    kubernetes_validate.InvalidSchemaError,
    UserError,
    AssertionError,
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_without_a_key_that_nobody_reads(overlay: str) -> None:
    for target in objects(overlay):
        check_object(target)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_takes_its_objects_as_they_are(overlay: str, shared_dir: Path) -> None:
    for target in objects(overlay):
        if target["apiVersion"] == "ray.io/v1":
            crd_validator(shared_dir / "kuberay_crds", target["kind"]).validate(target)


def misspelt(target: Object, seed: int) -> tuple[str, Object]:
    """A copy of ``target`` with one key of those that a schema knows spelt in another way, and that key."""
    target, places = copy.deepcopy(target), list[Object]()
    free = (
        "models",
        "labels",
        "matchLabels",
        "annotations",
        "data",
        "rayStartParams",
        "requests",
        "limits",
        "hard",
        "metadata",
    )

    def visit(node: Any, key: str = "") -> None:
        if isinstance(node, dict) and node and key not in free:
            places.append(node)
        for name, item in node.items() if isinstance(node, dict) else ((key, item) for item in node):
            if isinstance(item, dict | list):
                visit(item, name)

    visit(target)
    draw = random.Random(seed)
    place = draw.choice(places)
    key = draw.choice(sorted(place))
    at = draw.randrange(len(key))
    place[key[:at] + "q" + key[at:]] = place.pop(key)
    return key, target


@settings(max_examples=60)
@given(st.sampled_from(OVERLAYS), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_misspelt_key_at_any_depth_is_refused(overlay: str, which: int, seed: int) -> None:
    built = objects(overlay)
    key, target = misspelt(built[which % len(built)], seed)
    with pytest.raises(REFUSED):
        check_object(target)
        pytest.fail(f"{key} of {target.get('kind')} may be misspelt")


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_a_misspelt_key_of_the_serve_configuration_is_refused(seed: int) -> None:
    service = copy.deepcopy(of_kind("mi300x", "RayService")["endpoint"])
    key, changed = misspelt(yaml.safe_load(service["spec"]["serveConfigV2"]), seed)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(changed)
    with pytest.raises((*REFUSED, KeyError)):
        check_object(service)
        pytest.fail(f"{key} may be misspelt")


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_kuberays_schema_refuses_misspelt_keys_too(shared_dir: Path, which: int, seed: int) -> None:
    built = [target for target in objects("mi300x") if target["apiVersion"] == "ray.io/v1"]
    original = built[which % len(built)]
    _, target = misspelt({"spec": original["spec"]}, seed)
    with pytest.raises(jsonschema.ValidationError):
        if "spec" not in target:
            raise jsonschema.ValidationError("spec")
        crd_validator(shared_dir / "kuberay_crds", original["kind"]).validate({**original, **target})
