#!/usr/bin/env bash
# Installs what the tests need into .venv, then: format, lint, types, tests.
#
#   bash launch/test.sh [--all] [--newest] [PYTEST ARGUMENT ...]
#
#   --all      all tests; without it those that take long are left out:
#              trainings, meshes, several processes, other compilers
#   --newest   with the newest versions of all packages, not those in
#              launch/locks
#
# Arguments go to pytest, which then chooses by them alone, as in
# bash launch/test.sh tests/drift. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
tests=(-m "not slow and not system")
newest=
while [ $# -gt 0 ]; do
  case $1 in
    --all) tests=() ;;
    --newest) newest=yes ;;
    *) break ;;
  esac
  shift
done
[ $# -eq 0 ] || tests=("$@")
make_environment requirements.txt -r requirements-dev.txt \
  -r requirements-robots.txt
# Without their own requirements: jax2onnx wants an older Orbax, trackio an older
# Pillow, and both more that they don't import.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  jax2onnx==0.17.1 trackio==0.43.0 \
  2> >(grep -v -e conflict -e jax2onnx -e trackio >&2 || true)
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/basedpyright
.venv/bin/python -m pytest ${tests[@]+"${tests[@]}"}
