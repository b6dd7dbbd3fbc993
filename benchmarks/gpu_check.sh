#!/usr/bin/env bash
# What one GPU does with this code, in at most 12 minutes: one JSON.
#
#   bash benchmarks/gpu_check.sh OUT [DATA]
#
# OUT   folder of the parts' files; the same command goes on where it stopped
# DATA  data.source of CIFAR-10: tfds:cifar10 (the default), or folder:DIR with
#       a folder of images for each class
#
# PYTHON chooses the interpreter. TINY=1 takes tiny sizes, to try it on a CPU.
# The parts: the step of the latent ablation, 4 labels, as published, with
# bfloat16 attention by cuDNN, and by XLA; samples a second; an encoder of
# CIFAR-10 and a generator in its features, with a picture. One that fails or
# takes too long is named in the JSON.
set -uo pipefail
source "$(dirname "$0")/../launch/common.sh"
case "${1:-} ${2:-}" in
  *-h\ * | *' -h' | *--help*)
    usage
    exit 0
    ;;
  -* | *' -'*) die "there are no options but --help: want OUT [DATA], not '$*'" ;;
esac
[ $# -ge 1 ] && [ $# -le 2 ] ||
  die "want OUT [DATA]; see bash $0 --help"
cd "$root" || exit 1
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
data=${2:-tfds:cifar10}
python=${PYTHON:-python}
tiny=${TINY:+--tiny}

# part NAME SECONDS COMMAND...: runs it, unless it ended well before.
part() {
  local name=$1 seconds=$2 begin=$SECONDS code=0
  shift 2
  [ -e "$out/$name.done" ] && return
  timeout --signal=TERM --kill-after=30 "$seconds" "$@" >"$out/$name.log" 2>&1 ||
    code=$?
  echo "$code $((SECONDS - begin))" >"$out/$name.code"
  [ $code = 0 ] && mv "$out/$name.code" "$out/$name.done"
}

# step NAME KEY=VALUE...: the ablation's step with 4 labels on one device.
step() {
  local name=$1
  shift
  part "$name" 110 "$python" benchmarks/gpu_step.py $tiny \
    --json="$out/$name.json" "$@"
}

step step_published
step step_cudnn model.attention_dtype=bfloat16
step step_xla model.attention_dtype=bfloat16 train.kernels=xla
part sampling 60 "$python" benchmarks/sample.py $tiny --models=b2 --seconds=3 \
  --json="$out/sampling.json"
# As many steps as two and four minutes of a large card will hold.
short=(--config.train.num_steps=2000 --config.mae.classification_steps=500)
long=(--config.eval.every=500 --config.checkpoint.every=500)
[ -z "$tiny" ] || short=() long=()
part encoder 120 "$python" -m drift_jax.main \
  --config=configs/cifar10.py:encoder${TINY:+,smoke} --workdir="$out/encoder" \
  --config.data.source="$data" ${short[@]+"${short[@]}"}
part generator 240 "$python" -m drift_jax.main \
  --config=configs/cifar10.py${TINY:+:smoke} --workdir="$out/generator" \
  --config.data.source="$data" ${long[@]+"${long[@]}"} \
  --config.encoders.mae.path="$out/encoder/encoder"
part picture 60 "$python" -m drift_jax.sample --from="$out/generator" --count=10 \
  --out="$out/cifar10.png"
exec "$python" benchmarks/gpu_step.py --report="$out"
