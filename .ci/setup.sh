#!/usr/bin/env bash
# Makes .venv with the pinned dependencies, through uv, which is fetched into .uv first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name another with PYTHON=...")
PY

uv=.uv/bin/uv
if [ ! -x "$uv" ]; then
    # --target works without the venv module and where the system's own pip is locked (PEP 668).
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        echo "error: $python has no pip; install it (Debian: apt-get install python3-pip) or name another with PYTHON=..." >&2
        exit 2
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --target .uv uv
fi

constraints=(--constraint constraints.txt)
overrides=()
venv_flags=()
# An image that brings its own CUDA or ROCm torch keeps it: the venv sees the system's packages, and torch and
# torchvision are left out of what is installed ("; false" switches a requirement off).
if "$python" -c 'import torch, torchvision' >/dev/null 2>&1; then
    echo "using the torch that $python has already"
    venv_flags=(--system-site-packages)
    printf 'torch; python_version < "0"\ntorchvision; python_version < "0"\n' > .uv/keep-torch.txt
    overrides=(--override .uv/keep-torch.txt)
    grep -viE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+)(==| )' constraints.txt > .uv/constraints.txt
    constraints=(--constraint .uv/constraints.txt)
fi

"$uv" venv --quiet --allow-existing --python "$python" "${venv_flags[@]}" .venv
VIRTUAL_ENV=.venv "$uv" pip install "${constraints[@]}" "${overrides[@]}" --editable '.[demo,gcs,gguf,dev]'
