#!/usr/bin/env bash
# Installs what the tests need, then: format, lint, types, tests.
# Arguments go to pytest: bash launch/test.sh tests/drift
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements.txt -r requirements-dev.txt
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/basedpyright
.venv/bin/python -m pytest "$@"
