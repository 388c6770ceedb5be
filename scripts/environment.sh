# Sourced by quickstart.sh, test.sh and peft_suite.sh: a virtual environment with condft and the tested versions in it.
#   install_condft EXTRA       where EXTRA is one of pyproject's optional dependencies
#   make_environment FOLDER    an empty virtual environment

make_environment() {  # FOLDER
  python3 - <<'PYTHON' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"condft needs Python 3.11 or newer (transformers 5.23 does); this is {sys.version.split()[0]}")
PYTHON
  # Debian keeps ensurepip in a package of its own (python3-venv). Without it, the system's pip fills the environment.
  if python3 -c 'import ensurepip' 2>/dev/null; then
    python3 -m venv "$1"
  else
    python3 -m venv --without-pip "$1"
    python3 -m pip --python "$1/bin/python" install --quiet pip
  fi
}

install_condft() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || make_environment .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  echo "== Installing condft and the versions in scripts/constraints.txt into ${VIRTUAL_ENV} =="
  python -m pip install --disable-pip-version-check -c scripts/constraints.txt -e ".[$1]" |
    grep --line-buffered -v -e '^Requirement already satisfied' -e '^Looking in'
}
