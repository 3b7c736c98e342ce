#!/bin/sh
# Installs the package of this folder with the versions of constraints.txt and the extras given: install.sh gcs,gguf
# With KEEP_TORCH=1 the torch that is there stays, without those of CUDA's libraries that it does not ask for.
set -eu
extras=$1
constraints=constraints.txt
if [ "${KEEP_TORCH:-0}" = 1 ]; then
    constraints=$(mktemp)
    grep -viE '^(torch|torchvision|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==' constraints.txt >"$constraints"
fi
before=$(python3 -c 'import torch; print(torch.__version__)' 2>/dev/null || echo none)
python3 -m pip install --no-cache-dir --constraint "$constraints" ".[$extras]"
after=$(python3 -c 'import torch; print(torch.__version__)')
if [ "${KEEP_TORCH:-0}" = 1 ] && [ "$before" != "$after" ]; then
    echo "error: torch $before became $after" >&2
    exit 1
fi
# The jobs run from here and import what was installed, so that there is one copy of the code.
rm -rf instella_ray build ./*.egg-info
