#!/usr/bin/env bash
# The image of drift_jax (launch/Dockerfile), and runs in it on one machine:
#
#   bash launch/docker.sh COMMAND [--image=drift_jax:cpu] [FLAG ...]
#
#   build  --accelerator=cpu|cuda12|cuda13|tpu    cpu, if not given
#          --push    sends it to the image's registry, for launch/gke.sh
#   run    trains, and starts again after a crash; Ctrl-C ends it:
#          --config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]
#          --gpus            with all GPUs
#          --data=DIR        a folder that the run may read
#          --max-restarts=100
#
# For both: --dry-run (prints the commands, runs nothing). Folders have the same
# path inside. The workdir is gs://BUCKET/PATH or a folder.
set -euo pipefail
source "$(dirname "$0")/common.sh"

image='' accelerator=cpu push='' config='' workdir='' gpus='' data=''
max_restarts=100
command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  build) flags='--accelerator' switches='--push' ;;
  run) flags='--config --workdir --data --max-restarts' switches='--gpus' ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) die "command '$command': valid options are build run" ;;
esac
parse_flags "--image $flags" "$switches" "$@"
image=${image:-drift_jax:$accelerator}
check image '[A-Za-z0-9][A-Za-z0-9._:/@-]*' "a tag, e.g. REGISTRY/drift_jax:tpu"

tool() {
  need docker https://docs.docker.com/engine/install
}

# absolute PATH
absolute() {
  case $1 in
    /*) printf %s "$1" ;;
    *) printf %s "$PWD/$1" ;;
  esac
}

# mount PATH [OPTION]: a folder, at its own path inside.
mount() {
  [[ $1 != *[,\"]* ]] || die "'$1': docker can't mount a path with , or \""
  options+=("--mount=type=bind,source=$1,target=$1${2:-}")
}

case $command in
  build)
    one_of accelerator cpu cuda12 cuda13 tpu
    [ ${#overrides[@]} -eq 0 ] ||
      die "unexpected argument '${overrides[0]}': only run takes it"
    tool
    run docker build "--file=$root/launch/Dockerfile" "--tag=$image" \
      "--build-arg=ACCELERATOR=$accelerator" "$root"
    [ -z "$push" ] || run docker push "$image"
    ;;
  run)
    require config workdir
    check_config
    check_workdir ''
    check max-restarts '[0-9]+' "a number from 0"
    options=(--rm "--user=$(id -u):$(id -g)" --shm-size=8g --stop-timeout=300
      "--env=MAX_RESTARTS=$max_restarts" ${gpus:+--gpus=all})
    home data
    if [ -n "$data" ]; then
      [ -n "$dry_run" ] || [ -d "$data" ] ||
        die "--data='$data': there is no such folder"
      data=$(absolute "$data")
      mount "$data" ,readonly
    fi
    case $workdir in
      *://*) tool ;;
      *)
        workdir=$(absolute "$workdir")
        mount "$workdir"
        tool
        # Docker would make it, but as root.
        run mkdir -p "$workdir"
        ;;
    esac
    run docker run "${options[@]}" "$image" bash launch/restart.sh \
      python -m drift_jax.main "--config=$config" "--workdir=$workdir" \
      ${overrides[@]+"${overrides[@]}"}
    ;;
esac
