"""A server that tells kubectl which kinds there are, and holds no object: enough for ``--dry-run=client``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from .kubernetes import Object


@contextmanager
def discovery(objects: Iterable[Object], kubeconfig: Path) -> Iterator[None]:
    """Serve the kinds of ``objects`` on loopback, and write where into ``kubeconfig``."""
    answers = _answers(objects)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0].strip("/"))
            body = json.dumps(
                found or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            ).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        settings = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "users": [{"name": "a", "user": {}}],
            "current-context": "a",
        }
        kubeconfig.write_text(yaml.safe_dump(settings))
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def _answers(objects: Iterable[Object]) -> dict[str, Any]:
    """The documents that kubectl reads first, by path."""
    kinds = defaultdict[str, set[tuple[str, bool]]](set)
    for target in objects:
        kinds[target["apiVersion"]].add((target["kind"], "namespace" in target["metadata"]))
    groups = []
    found: dict[str, Any] = {"api": {"kind": "APIVersions", "versions": ["v1"]}}
    for version, members in kinds.items():
        verbs = ["create", "get", "list", "patch", "update"]
        resources = [
            {
                "name": f"{kind.lower()}s",
                "singularName": kind.lower(),
                "namespaced": inside,
                "kind": kind,
                "verbs": verbs,
            }
            for kind, inside in sorted(members)
        ]
        path = f"apis/{version}" if "/" in version else f"api/{version}"
        found[path] = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
        if "/" in version:
            name, _, number = version.partition("/")
            preferred = {"groupVersion": version, "version": number}
            groups.append({"name": name, "versions": [preferred], "preferredVersion": preferred})
    found["apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return found
