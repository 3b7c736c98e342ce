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

constraints=constraints.txt
overrides=()
"$uv" venv --quiet --allow-existing --python "$python" .venv

# Python may bring its own CUDA or ROCm torch (an image's system Python, or its virtual environment). Then that one is
# kept: .venv sees the packages beside it through a .pth file, and torch is switched off in what gets installed.
kept=.venv/$("$python" -c 'import sys; print(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}")')/site-packages/kept_torch.pth
if "$python" -c 'import torch, torchvision' >/dev/null 2>&1; then
    "$python" -c 'import torch; print(f"keeping torch {torch.__version__} of {torch.__path__[0]}")'
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__path__[0]).parent)' > "$kept"
    printf '%s ; python_version < "0"\n' torch torchvision triton > .uv/keep-torch.txt
    overrides=(--override .uv/keep-torch.txt)
    grep -viE '^(torch|torchvision|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==' constraints.txt > .uv/constraints.txt
    constraints=.uv/constraints.txt
else
    rm -f "$kept"
fi

VIRTUAL_ENV=.venv "$uv" pip install --constraint "$constraints" "${overrides[@]}" --editable '.[demo,gcs,gguf,dev]'
