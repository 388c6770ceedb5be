#!/usr/bin/env bash
# PEFT's own tests, unchanged, run for CondFT by the plugin in tests/peft_suite. About three minutes on two cores.
#   bash scripts/peft_suite.sh [pytest arguments]                  CondFT
#   bash scripts/peft_suite.sh --method lora [pytest arguments]    one of condft, lora, lntuning
#   bash scripts/peft_suite.sh --all                               all three; counts into docs/results/peft_suite.json
# The tests come with PEFT's source distribution, fetched once from the package index into .cache/peft_suite.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

methods=(condft)
results=()
if [ "${1:-}" = --method ]; then
  methods=("${2:?--method needs one of condft, lora, lntuning}")
  shift 2
elif [ "${1:-}" = --all ]; then
  methods=(condft lora lntuning)
  results=(--peft-results "$PWD/results/peft_suite.json")
  rm -f docs/results/peft_suite.json
  shift
fi
install_condft suite

repository=$PWD
version=$(python -c 'from importlib.metadata import version; print(version("peft"))')
folder=.cache/peft_suite
archive=$folder/peft-$version.tar.gz
mkdir -p "$folder"
if [ ! -f "$archive" ] &&
  ! python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest "$folder" "peft==$version"; then
  echo "Cannot fetch the source distribution of peft $version, which carries the tests." >&2
  echo "Put peft-$version.tar.gz into $folder yourself, or leave these tests out: CONDFT_PEFT_SUITE=no bash scripts/test.sh" >&2
  exit 1
fi
rm -rf "${folder:?}/peft-$version"
tar -xzf "$archive" -C "$folder"
cd "$folder/peft-$version"
touch tests/__init__.py  # not in the archive, but the tests import one another relatively

workers=$(env -u OMP_NUM_THREADS nproc)
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export PYTHONPATH=$repository/tests${PYTHONPATH:+:$PYTHONPATH}
python -m peft_suite.stand_ins .
status=0  # a method that fails must not keep the next one from its turn
for method in "${methods[@]}"; do
  echo "== PEFT $version: its tests for $method =="
  python -m pytest -c "$repository/tests/peft_suite/pytest.ini" --rootdir . -p peft_suite.plugin -n "$workers" \
    --peft-method "$method" ${results[@]+"${results[@]}"} "$@" \
    tests/test_custom_models.py tests/test_config.py tests/test_decoder_models.py tests/test_encoder_decoder_models.py \
    tests/test_seq_classifier.py tests/test_feature_extraction_models.py || status=$?
done
exit "$status"
