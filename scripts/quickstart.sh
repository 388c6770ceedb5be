#!/usr/bin/env bash
# From a fresh clone to a text LLM that hears: real checkpoints, real speech, one adaptation, one table.
#   bash scripts/quickstart.sh [--resume | --overwrite] [training.steps=60 ...]
# Needs python3 (3.11 or newer), pip and git. No GPU, no hub, no root.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_condft quickstart

echo "== Checkpoints: a text LLM and a speech encoder =="
python -m scripts.data.get_models
echo "== Speech: spoken digits, English and German =="
python -m scripts.data.make_speech
echo "== Adaptation =="
accelerate launch --config_file configs/accelerate/one_process.yaml --num_cpu_threads_per_process "$(nproc)" \
  scripts/train.py --config configs/quickstart.yaml "$@"
echo "== Left in runs/quickstart: summary.json, condition_numbers.png, training.png, adapter/ =="
