"""Write the Helm chart from what kustomize builds: one file an object, with the values of ``site.env`` as the chart's own.

``python cluster/helm/generate.py [FOLDER]`` (``make chart``) writes cluster/helm/instella-ray, or FOLDER. Needs kubectl on
the PATH or in .tools.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KUBERAY = HERE.parent / "kuberay"
OVERLAY = (
    "mi300x"  # the NVIDIA one differs in the name of the resource and in one block (tests/cluster/test_kuberay.py)
)
SETTING = re.compile(r"^([a-z_]+)=(.*)$", re.M)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "instella-ray"
    kubectl = shutil.which("kubectl") or shutil.which(ROOT / ".tools" / "kubectl")
    if kubectl is None:
        print("error: no kubectl here: bash .ci/tools.sh fetches it", file=sys.stderr)
        return 2
    site = (KUBERAY / "components" / "site" / "site.env").read_text()
    files = {}
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch, "kuberay")
        shutil.copytree(KUBERAY, copied)
        (copied / "components" / "site" / "site.env").write_text(SETTING.sub(r"\1=value-of-\1", site))
        for name in ("", "jobs"):
            built = subprocess.run(
                [kubectl, "kustomize", str(copied / "overlays" / OVERLAY / name)], check=True, stdout=subprocess.PIPE
            )
            for text in built.stdout.decode().split("\n---\n"):
                found = yaml.safe_load(text)
                if found["kind"] != "Namespace":  # Helm's own affair; its labels are kuberay/base/namespace.yaml's
                    place = Path("jobs") if name else Path()
                    files[place / f"{found['kind'].lower()}-{found['metadata']['name']}.yaml"] = template(text, found)
    names = sorted(set(re.findall(r"\.Values\.(\w+)", "".join(files.values()))))
    jobs = sorted(path.stem.removeprefix("rayjob-") for path in files if path.parent.name == "jobs")
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "Chart.yaml", chart())
    write(folder / "values.yaml", values(site, names))
    write(folder / "values.schema.json", json.dumps(schema(names, jobs), indent=1) + "\n")
    for path, text in files.items():
        write(folder / "templates" / path, text)
    return 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def template(text: str, found: dict[str, Any]) -> str:
    """The template of an object: values in the places of the site's, and the condition that it depends on."""
    if "{{" in text:
        raise ValueError(f"{found['metadata']['name']}: braces that Helm would read")
    text = re.sub(r"\bvalue-of-(\w+)", r"{{ .Values.\1 | quote }}", text.strip() + "\n")
    text = re.sub(r"^(\s+)namespace: instella-ray$", r"\1namespace: {{ .Release.Namespace }}", text, flags=re.M)
    if found["kind"] != "ResourceQuota":  # bounds GPUs of both makes
        text = text.replace("amd.com/gpu", "{{ .Values.accelerator }}.com/gpu")
    text = re.sub(
        r"^ +supplementalGroups:\n(?: +- \d+\n)+",
        lambda block: '{{- if eq .Values.accelerator "amd" }}\n' + block[0] + "{{- end }}\n",
        text,
        flags=re.M,
    )
    if found["kind"] == "RayJob":
        condition = f'eq .Values.job "{found["metadata"]["name"]}"'
    elif found["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "endpoint":
        condition = ".Values.endpoint"
    else:
        return text
    return f"{{{{- if {condition} }}}}\n{text}{{{{- end }}}}\n"


def chart() -> str:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return (
        "# Written by ../generate.py from ../../kuberay; change those.\n"
        "apiVersion: v2\nname: instella-ray\ntype: application\n"
        "description: Instella-T2I on Ray, a cluster to develop on, jobs and an endpoint, for KubeRay\n"
        f'version: {version}\nappVersion: "{version}"\n'
    )


def values(site: str, names: list[str]) -> str:
    """``site.env`` as YAML, with its remarks and without what no template reads, and the chart's own switches."""
    kept, remarks = ["# Written by ../generate.py from site.env. Fill in what is in capitals."], list[str]()
    for line in site.splitlines()[1:]:
        setting = SETTING.match(line)
        if setting is None:
            remarks.append(line)
        else:
            if setting[1] in names:
                kept += [*remarks, f"{setting[1]}: {setting[2]}"]
            remarks = []
    return (
        "\n".join(kept) + "\n# The make of the GPUs: amd or nvidia.\naccelerator: amd\n"
        "# Whether the endpoint is there; it needs models.\nendpoint: true\n"
        "# The one stage to render, for kubectl create: a release has none, so that an upgrade touches no job.\njob: none\n"
    )


def schema(names: list[str], jobs: list[str]) -> dict[str, Any]:
    properties: dict[str, Any] = {name: {"type": "string", "minLength": 1} for name in names}
    properties |= {"gpus": {"type": "integer", "minimum": 1}, "endpoint": {"type": "boolean"}}
    properties |= {"accelerator": {"enum": ["amd", "nvidia"]}, "job": {"enum": ["none", *jobs]}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "required": sorted(properties),
        "properties": properties,
    }


if __name__ == "__main__":
    sys.exit(main())
