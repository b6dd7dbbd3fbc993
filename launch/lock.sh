#!/usr/bin/env bash
# Writes launch/locks: for each Python, the newest version of every package that
# the requirements and the accelerators need. Run the tests with each of them
# before you commit it:
#
#   bash launch/lock.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment requirements-dev.txt
for version in 3.11 3.12 3.13; do
  # Each Python tests another JAX: the newest that there is for Python 3.11, the
  # release before the newest, and the newest.
  jax=jax
  [ $version != 3.12 ] || jax='jax<0.12'
  # manylinux: the oldest that has libtpu.
  .venv/bin/uv pip compile --quiet --upgrade --no-annotate --custom-compile-command="bash launch/lock.sh" \
    --python-version=$version --python-platform=x86_64-manylinux_2_31 \
    --constraint=<(echo "$jax") \
    --output-file=launch/locks/python$version.txt \
    requirements.txt requirements-dev.txt requirements-robots.txt \
    - <<<'jax[cuda12,cuda13,tpu]'
done
