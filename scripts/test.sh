#!/usr/bin/env bash
# Every check: lint, format, types, import contract, tests. CI runs exactly this.
#   bash scripts/test.sh [pytest arguments]
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
echo "== pytest =="
HF_HUB_OFFLINE=1 python -m pytest "$@"
