#!/usr/bin/env bash
# The quickstart, on any machine with two cores: installs into .venv, then
# trains the digits encoder and the digits generator, and judges the samples.
#
#   bash launch/local.sh [--smoke] [--newest] [FOLDER]   FOLDER: runs/quickstart
#
#   --smoke    a few small steps of everything
#   --newest   with the newest versions of all packages, not those in
#              launch/locks
#
# A run found in the folder is continued. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
smoke=
newest=
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=,smoke ;;
    --newest) newest=yes ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    -*)
      echo "Error: unknown option '$1': valid options are --smoke --newest" >&2
      exit 2
      ;;
    *) break ;;
  esac
  shift
done
folder=${1:-runs/quickstart${smoke/,/-}}

source launch/environment.sh
make_environment requirements.txt
start=$SECONDS

echo "1/3 The encoder: a masked autoencoder of 8x8 digits."
.venv/bin/python -m drift_jax.main --config="configs/digits.py:encoder$smoke" \
  --workdir="$folder/encoder"
echo "2/3 The generator: drifts in pixel space, judged by that encoder too."
.venv/bin/python -m drift_jax.main --config="configs/digits.py:judge$smoke" \
  --workdir="$folder/generator" \
  --config.encoders.mae.path="$folder/encoder/encoder"
echo "3/3 The figures of its best checkpoint, with fresh noise."
.venv/bin/python -m drift_jax.evaluate --from="$folder/generator" \
  --neighbours=10
.venv/bin/python -m drift_jax.sample --from="$folder/generator" \
  --out="$folder/samples.png"

cat <<END

Done in $((SECONDS - start)) s after installation. Look at:
  samples      $folder/samples.png
  neighbours   $folder/generator/evaluation_neighbours.png: samples, each beside
               its 10 nearest training images
  curves       $folder/generator/plots/drift_rms.png
               $folder/generator/plots/frechet.png
               $folder/encoder/plots/mae.png
  figures      $folder/generator/evaluation.json
  checkpoints  $folder/generator/checkpoints
END
