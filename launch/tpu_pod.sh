#!/usr/bin/env bash
# A TPU slice of any size, through gcloud:
#
#   bash launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [FLAG ...]
#
#   create    the slice: --type=v6e-128
#             --runtime=VERSION  of its image; derived from the type
#             --spot             cheaper, and may be taken away
#             --queued           waits for capacity (a queued resource)
#   setup     the commit that is checked out here, and its environment, on all
#             workers; or from elsewhere: --repository=URL [--ref=BRANCH]
#   run       trains, detached, and starts again after a crash:
#             --config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]
#             --max-restarts=100
#   exec      -- COMMAND [ARGUMENT ...], on all workers at once, in the
#             repository; attached, and not started again
#   status    of the slice and of the run on each worker
#   logs      follows worker 0, or --worker=N, or --worker=all
#   stop      the run; it saves a checkpoint first
#   teardown  deletes the slice; --queued if it was created so
#
# For all: --project=PROJECT, --dry-run (prints the commands, runs nothing).
# The workdir is gs://BUCKET/PATH or an absolute path on a
# file system that all workers share. A spot slice that was taken away: create,
# setup and run again, with the same workdir; the run continues.
set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' zone='' project='' type='' runtime='' spot='' queued=''
repository='' ref=HEAD config='' workdir='' max_restarts='' worker=0
command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  create) flags='--type --runtime' switches='--spot --queued' ;;
  setup) flags='--repository --ref' switches='' ;;
  run) flags='--config --workdir --max-restarts' switches='' ;;
  logs) flags='--worker' switches='' ;;
  exec) flags='' switches='' ;;
  teardown) flags='' switches='--queued' ;;
  status | stop) flags='' switches='' ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) die "command '$command': valid options are create setup run exec status" \
    "logs stop teardown" ;;
esac
parse_flags "--name --zone --project $flags" "$switches" "$@"
require name zone
check name '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' \
  "lower-case letters, digits and -, at most 63"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, e.g. us-east5-b"
[ "$command" = run ] || [ "$command" = exec ] || [ ${#overrides[@]} -eq 0 ] ||
  die "unexpected argument '${overrides[0]}': only run takes it"
where=("--zone=$zone" ${project:+"--project=$project"})

# The image for a type, whose size is checked on the way: chips (v5litepod, v6e)
# or TensorCores, two a chip (v4, v5p).
find_runtime() {
  local size=${type#*-} sizes
  [ -z "$runtime" ] || return 0
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e sizes='1 4 8 16 32 64 128 256' ;;
    v5litepod-*)
      runtime=v2-alpha-tpuv5-lite sizes='1 4 8 16 32 64 128 256'
      ;;
    v5p-*) runtime=v2-alpha-tpuv5 sizes='multiples of 8' ;;
    v4-*) runtime=tpu-ubuntu2204-base sizes='multiples of 8' ;;
    *) die "--type='$type': valid options are v6e-N v5litepod-N v5p-N v4-N," \
      "or any type with its --runtime" ;;
  esac
  if [[ $size =~ ^[1-9][0-9]{0,4}$ ]]; then
    [[ $sizes != multiples* ]] || [ $((size % 8)) -ne 0 ] || return 0
    [[ " $sizes " != *" $size "* ]] || return 0
  fi
  die "--type='$type': valid sizes of ${type%%-*} are $sizes"
}

# on WORKER LINE...: command lines on a worker, or on 'all', until one fails.
on() {
  local worker=$1 lines
  shift
  printf -v lines ' && %s' "$@"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
    "--worker=$worker" "--command=${lines# && }"
}

# Checks of flags come before the one of gcloud.
tool() {
  need gcloud https://cloud.google.com/sdk/docs/install
}

case $command in
  create)
    require type
    find_runtime
    tool
    if [ -n "$queued" ]; then
      run gcloud compute tpus queued-resources create "$name" "${where[@]}" \
        "--node-id=$name" "--accelerator-type=$type" \
        "--runtime-version=$runtime" ${spot:+--spot}
    else
      run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
        "--accelerator-type=$type" "--version=$runtime" ${spot:+--spot}
    fi
    ;;
  setup)
    [ -n "$repository" ] || [ "$ref" = HEAD ] ||
      die "--ref='$ref' needs --repository=URL"
    tool
    steps=('cd drift_jax' 'bash launch/install.sh tpu')
    if [ -n "$repository" ]; then
      steps=(
        'git init --quiet drift_jax'
        "git -C drift_jax fetch --quiet --depth=1 $(quote "$repository" "$ref")"
        'git -C drift_jax checkout --quiet --force FETCH_HEAD'
        "${steps[@]}"
      )
    else
      if [ -n "$(git -C "$root" status --porcelain 2>/dev/null)" ]; then
        echo "Changes that are not committed stay here." >&2
      fi
      archive=${TMPDIR:-/tmp}/drift_jax-$name.tar.gz
      run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
      run gcloud compute tpus tpu-vm scp "$archive" "$name:drift_jax.tar.gz" \
        "${where[@]}" --worker=all
      steps=(
        'mkdir -p drift_jax'
        'rm -rf drift_jax/drift_jax drift_jax/configs drift_jax/launch'
        'tar -xzf drift_jax.tar.gz -C drift_jax'
        "${steps[@]}"
      )
    fi
    on all "${steps[@]}"
    ;;
  run)
    require config workdir
    check_config
    check_workdir "on a file system that all workers share"
    [ -z "$max_restarts" ] || check max-restarts '[0-9]+' "a number from 0"
    tool
    training=(.venv/bin/python -m drift_jax.main "--config=$config"
      "--workdir=$workdir" --coordinator=auto
      ${overrides[@]+"${overrides[@]}"})
    start='bash launch/daemon.sh start'
    [ -z "$max_restarts" ] || start="MAX_RESTARTS=$max_restarts $start"
    on all 'cd drift_jax' "$start $(quote "${training[@]}")"
    ;;
  exec)
    [[ ${overrides[0]:-} == [!-]* ]] ||
      die "exec wants -- COMMAND [ARGUMENT ...] after its flags"
    tool
    on all 'cd drift_jax' "$(quote "${overrides[@]}")"
    ;;
  status)
    tool
    run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
      '--format=value(acceleratorType,state,health)'
    on all 'bash drift_jax/launch/daemon.sh status'
    ;;
  logs)
    check worker '[0-9]+|all' "a worker's number from 0, or all"
    tool
    on "$worker" 'bash drift_jax/launch/daemon.sh logs'
    ;;
  stop)
    tool
    on all 'bash drift_jax/launch/daemon.sh stop'
    ;;
  teardown)
    tool
    if [ -n "$queued" ]; then
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" \
        --force --quiet
    else
      run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
    fi
    ;;
esac
