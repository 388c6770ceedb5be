#!/usr/bin/env bash
# Every check: lint, format, types, import contract, tests. CI runs exactly this.
#   bash scripts/test.sh [pytest arguments]
# Without arguments PEFT's own tests follow (scripts/peft_suite.sh); CONDFT_PEFT_SUITE=no leaves them out.
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
if [ $# -eq 0 ] && [ "${CONDFT_PEFT_SUITE:-yes}" != no ]; then
  echo "== PEFT's own tests =="
  bash scripts/peft_suite.sh
fi
