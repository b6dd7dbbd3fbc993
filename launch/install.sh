#!/usr/bin/env bash
# An environment in .venv with what drift_jax needs on this machine:
#
#   bash launch/install.sh [--newest] [cpu|cuda12|cuda13|tpu]    cpu, if not given
#
# The versions of all packages are those that the tests ran with (launch/locks);
# with --newest they are the newest. PYTHON chooses the interpreter. Where python3
# is older than 3.11 (as on the images of most TPU VMs), uv fetches Python 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
source launch/environment.sh

newest=
if [ "${1:-}" = --newest ]; then
  newest=yes
  shift
fi
accelerator=${1:-cpu}
case $accelerator in
  -h | --help)
    usage
    exit 0
    ;;
  # gcsfs: for workdirs in gs:// buckets.
  cpu) packages=(gcsfs) ;;
  cuda12 | cuda13 | tpu) packages=("jax[$accelerator]" gcsfs) ;;
  *) die "accelerator '$accelerator': valid options are cpu cuda12 cuda13 tpu" ;;
esac
if [ -x .venv/bin/python ]; then
  PYTHON=.venv/bin/python
elif [ -z "${PYTHON:-}" ] && ! new_enough python3; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 .venv
  PYTHON=.venv/bin/python
fi
make_environment requirements.txt "${packages[@]}"
