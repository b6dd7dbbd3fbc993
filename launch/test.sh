#!/usr/bin/env bash
# Installs what the tests need, then: format, lint, types, tests.
# Arguments go to pytest: bash launch/test.sh tests/drift
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt -r requirements-dev.txt \
  -r requirements-robots.txt
# Its own requirements want an older Orbax, and more that it doesn't import.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  "jax2onnx>=0.17,<0.18" 2> >(grep -v -e conflict -e jax2onnx >&2 || true)
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/basedpyright
.venv/bin/python -m pytest "$@"
