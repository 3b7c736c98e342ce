#!/usr/bin/env bash
# Makes .venv with the pinned dependencies, through uv, which is fetched into .uv first.
# The programs of .ci/tools.sh come last. EXTRAS=docs installs further extras of pyproject.toml.
#   --plan  print what would be done and change nothing     --uv  fetch uv and stop
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mode=${1:-}
fail() {
    echo "error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "no $python here; install Python 3.11 or newer, or name one with PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, $python is $version; name another with PYTHON=..."
echo "python: $python ($version)"

# pip's --target works without the venv module and where the system's own pip is locked (PEP 668).
if [ -x .uv/bin/uv ]; then
    how="in .uv already"
elif "$python" -m pip --version >/dev/null 2>&1; then
    how="with pip"
elif "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    how="with pip of a temporary virtual environment"
elif command -v uv >/dev/null; then
    how="from the PATH"
else
    fail "$python has neither pip nor ensurepip; install one (Debian: apt-get install python3-pip) or name another with PYTHON=..."
fi
echo "uv: $how"

# Python may bring its own CUDA or ROCm torch (an image's system Python, or its virtual environment). It is kept if it
# is a pair new enough for pyproject.toml, and not what an earlier run of this script put into .venv.
found=$("$python" - 2>/dev/null <<'PY' | tail -n 1
import pathlib, re
try:
    import torch
except Exception:
    raise SystemExit
folder = pathlib.Path(torch.__path__[0]).resolve().parent
if pathlib.Path(".venv").resolve() in folder.parents:
    raise SystemExit
try:
    import torchvision
except Exception:
    print("own\ttorch %s in %s has no torchvision that imports" % (torch.__version__, folder))
    raise SystemExit
least = re.search('"torch>=([0-9.]+)"', pathlib.Path("pyproject.toml").read_text()).group(1)
numbers = [[int(part) for part in re.findall("[0-9]+", text)[:2]] for text in (torch.__version__, least)]
if numbers[0] < numbers[1]:
    print("own\ttorch %s in %s is older than %s" % (torch.__version__, folder, least))
else:
    print("keep\t%s\t%s" % (torch.__version__, folder))
PY
) || found=
IFS=$'\t' read -r decision detail folder <<<"$found" || true
if [ "$decision" = keep ]; then
    echo "torch: kept, $detail in $folder"
else
    echo "torch: the pair of constraints.txt${detail:+ ($detail)}"
fi
if [ "$mode" = --plan ]; then exit 0; fi

case $how in
"with pip") "$python" -m pip install --quiet --disable-pip-version-check --target .uv uv ;;
"with pip of"*)
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    "$python" -m venv "$temporary" >/dev/null
    "$temporary/bin/python" -m pip install --quiet --disable-pip-version-check --target .uv uv
    ;;
"from the PATH") mkdir -p .uv/bin && ln -sf "$(command -v uv)" .uv/bin/uv ;;
esac
if [ "$mode" = --uv ]; then exit 0; fi
uv=.uv/bin/uv
export VIRTUAL_ENV=.venv

# A kept torch: .venv sees the packages beside it through a .pth file, and torch with all that hangs on it is switched
# off in what gets installed.
constraints=constraints.txt
overrides=()
"$uv" venv --quiet --allow-existing --python "$python" .venv
kept=.venv/lib/python$version/site-packages/kept_torch.pth
if [ "$decision" = keep ]; then
    "$uv" pip uninstall --quiet torch torchvision triton
    echo "$folder" >"$kept"
    printf '%s ; python_version < "0"\n' torch torchvision triton >.uv/keep-torch.txt
    overrides=(--override .uv/keep-torch.txt)
    grep -viE '^(torch|torchvision|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==' constraints.txt >.uv/constraints.txt
    constraints=.uv/constraints.txt
else
    rm -f "$kept"
fi

# Compiled here once: where Python is told to write no bytecode, every worker of Ray would compile torch and Ray anew.
"$uv" pip install --compile-bytecode --constraint "$constraints" "${overrides[@]}" --editable '.[demo,eval,gcs,gguf,safety,jxl,icons,curate,synthesize,deepspeed,simulate,dev'"${EXTRAS:+,$EXTRAS}]"

# The programs that the tests of cluster/ run; without them those tests skip.
bash .ci/tools.sh
