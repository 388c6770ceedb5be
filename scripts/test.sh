#!/usr/bin/env bash
# Every check: lint, format, types, import contract, docs, packages, core install, tests. CI runs exactly this.
#   bash scripts/test.sh [pytest arguments]
# With arguments: the quick checks and these tests only. Without: everything, and PEFT's own tests at the end
# (scripts/peft_suite.sh; CONDFT_PEFT_SUITE=no leaves them out).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_condft dev

echo "== ruff check =="
ruff check .
echo "== ruff format =="
ruff format --check .
echo "== mypy =="
mypy
echo "== import contract =="
lint-imports
if [ $# -gt 0 ]; then
  HF_HUB_OFFLINE=1 exec python -m pytest "$@"
fi

echo "== docs =="
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict -f .mkdocs.yml
echo "== wheel and sdist =="
rm -rf dist
python -m build --outdir dist . > /dev/null
twine check --strict dist/*
echo "== core install =="
rm -rf .cache/core
make_environment .cache/core
.cache/core/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt dist/condft-*.whl
HF_HUB_OFFLINE=1 .cache/core/bin/python tests/workers/first_snippet.py
rm -rf .cache/core
echo "== pytest =="
HF_HUB_OFFLINE=1 python -m pytest
if [ "${CONDFT_PEFT_SUITE:-yes}" != no ]; then
  echo "== PEFT's own tests =="
  bash scripts/peft_suite.sh
fi
