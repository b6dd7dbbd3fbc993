# Sourced by the other scripts: a virtual environment in .venv with the given
# requirements file, and packages after it, installed. PYTHON chooses the
# interpreter.
# shellcheck shell=bash

make_environment() {
  local requirements=$1 python=${PYTHON:-python3}
  shift
  if ! new_enough "$python"; then
    echo "drift_jax needs Python 3.11 or newer; $python is" \
      "$("$python" --version 2>&1). Set PYTHON to a newer one." >&2
    return 1
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "Installing $requirements${*:+ $*} into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r "$requirements" "$@"
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}
