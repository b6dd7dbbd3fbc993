# Sourced by the other scripts: a virtual environment in .venv with the given
# requirements file, and packages after it, installed. PYTHON chooses the
# interpreter. The versions are those that the tests ran with (launch/locks), or
# with newest=yes the newest ones.
# shellcheck shell=bash

make_environment() {
  local requirements=$1 python=${PYTHON:-python3} version lock pip
  shift
  if ! new_enough "$python"; then
    echo "drift_jax needs Python 3.11 or newer; $python is" \
      "$("$python" --version 2>&1). Set PYTHON to a newer one." >&2
    return 1
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  version=$(.venv/bin/python -c \
    'import sys; print("%d.%d" % sys.version_info[:2])')
  lock=launch/locks/python$version.txt
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  if [ "${newest:-}" = yes ]; then
    pip+=(--upgrade --upgrade-strategy=eager)
  elif [ -f "$lock" ]; then
    pip+=(--constraint "$lock")
  else
    echo "There is no $lock: taking the newest versions, which may not have" \
      "been tested with Python $version." >&2
  fi
  echo "Installing $requirements${*:+ $*} into .venv ..."
  "${pip[@]}" -r "$requirements" "$@"
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}
