#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes on one H100, without a network.
#   bash scripts/gpu_check.sh                        all parts on CUDA; writes docs/results/gpu.json
#   bash scripts/gpu_check.sh --only routes          arguments go to python -m scripts.bench.gpu
#   bash scripts/gpu_check.sh --device cpu --small   the same code without a GPU: its test, not a result
#   bash scripts/gpu_check.sh --collect              with a network, beforehand: the wheels into .cache/gpu_wheels
# The GPU machine needs Python 3.11 or newer with torch, transformers, peft and accelerate. What else condft and its
# tests import comes from the wheels. --collect fetches them for the Python and the platform that it runs on: use the
# same ones. The models are built from configs; the quickstart is the real one if models/ and data/digits are there.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=.cache/gpu_wheels
site=.cache/gpu_site

if [ "${1:-}" = --collect ]; then
  mkdir -p "$wheels"
  # shellcheck disable=SC2046
  python -m pip download --disable-pip-version-check --only-binary :all: --dest "$wheels" -c scripts/constraints.txt \
    $(grep -v '^#' scripts/bench/gpu/wheels.txt)
  du -sh "$wheels"
  exit 0
fi

# Into a folder of its own, which Python looks into first: the machine's environment stays as it is.
if compgen -G "$wheels/*.whl" > /dev/null && [ ! -d "$site" ]; then
  echo "== Unpacking $wheels into $site =="
  python -m pip install --disable-pip-version-check --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$PWD:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
python -m scripts.bench.gpu "$@"
