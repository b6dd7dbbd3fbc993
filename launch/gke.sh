#!/usr/bin/env bash
# A TPU slice on GKE, as a JobSet (launch/jobset.yaml), through kubectl:
#
#   bash launch/gke.sh COMMAND --name=NAME [FLAG ...]
#
#   run       --accelerator=v6e --topology=8x16 --image=IMAGE
#             --config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...]
#             --chips-per-host=4      where a 2x4 is of two machines, not one
#             --spot                  on spot nodes
#             --service-account=NAME  one that may read and write the workdir
#             --claim=NAME            a persistent volume claim, mounted at /data
#             --max-restarts=100
#             --grace-seconds=300     from SIGTERM to SIGKILL
#   status    of the JobSet and its pods
#   logs      follows worker 0, or --worker=N
#   stop      deletes the JobSet; its processes save a checkpoint first
#
# For all: --namespace=NAMESPACE, --context=CONTEXT, --dry-run (prints the
# commands, runs nothing). The cluster has the JobSet controller and a node pool
# of that topology. Build the image with launch/docker.sh. The workdir is
# gs://BUCKET/PATH or a path on a volume that all pods share,
# such as /data/runs. A JobSet of that name that has ended: stop it first.
set -euo pipefail
source "$(dirname "$0")/common.sh"

name='' namespace='' context='' accelerator='' topology='' image='' config=''
workdir='' chips_per_host='' spot='' service_account='' claim=''
max_restarts=100 grace_seconds=300 worker=0
command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  run)
    flags='--accelerator --topology --image --config --workdir'
    flags+=' --chips-per-host --service-account --claim --max-restarts'
    flags+=' --grace-seconds'
    switches='--spot'
    ;;
  logs) flags='--worker' switches='' ;;
  status | stop) flags='' switches='' ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) die "command '$command': valid options are run status logs stop" ;;
esac
parse_flags "--name --namespace --context $flags" "$switches" "$@"
require name
label='[a-z0-9]([-a-z0-9]*[a-z0-9])?'
named='a Kubernetes name: lower-case letters, digits and -'
# The names of its pods are longer, and may have 63 characters.
check name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
  "lower-case letters, digits and -, at most 40"
[ "$command" = run ] || [ ${#overrides[@]} -eq 0 ] ||
  die "unexpected argument '${overrides[0]}': only run takes it"

kube=(kubectl)
[ -z "$context" ] || kube+=("--context=$context")
if [ -n "$namespace" ]; then
  check namespace "$label" "$named"
  kube+=("--namespace=$namespace")
fi
pods=jobset.sigs.k8s.io/jobset-name=$name

tool() {
  need kubectl https://kubernetes.io/docs/tasks/tools
}

# Sets hosts, after checks of accelerator, topology and chips per host.
find_hosts() {
  local planes='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16' chips a b c
  local boxes='2x2x1 2x2x2 2x2x4 2x4x4' cubes='' options=4
  case $accelerator in
    v6e) accelerator=tpu-v6e-slice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice cubes=yes ;;
    v4) accelerator=tpu-v4-podslice cubes=yes ;;
    tpu7x) cubes=yes ;;
    *) one_of accelerator v4 v5e v5p v6e tpu7x ;;
  esac
  IFS=x read -r a b c <<<"$topology"
  if [ -z "$cubes" ]; then
    # shellcheck disable=SC2086  # words
    one_of topology $planes
    case $topology in
      1x1) options=1 ;;
      2x4) options='8 4' ;;
    esac
  elif [[ " $boxes " != *" $topology "* ]]; then
    cubes='(4|8|12|16)'
    check topology "${cubes}x${cubes}x${cubes}" \
      "one of $boxes, or AxBxC of multiples of 4 up to 16, A <= B <= C"
    ((a <= b && b <= c)) || die "--topology='$topology': want A <= B <= C"
  fi
  chips=$((a * b * ${c:-1}))
  chips_per_host=${chips_per_host:-${options%% *}}
  # shellcheck disable=SC2086  # words
  one_of chips-per-host $options
  hosts=$((chips / chips_per_host))
}

# json WORD...: a list, which is YAML too.
json() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] ||
      die "$(quote "$word"): an argument can't hold control characters"
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    # Kubernetes reads $(NAME) as a variable, and $$ as $.
    word=${word//\$/\$\$}
    list+="${list:+, }\"$word\""
  done
  printf '[%s]' "$list"
}

# The JobSet: ${NAME} filled in, and the lines left out that are for others.
manifest() {
  local line key
  # shellcheck disable=SC2016  # ${ is meant literally
  while IFS= read -r line; do
    case $line in
      '#'*) continue ;;
      *' # if '*)
        key=${line##* # if }
        [ -n "${!key}" ] || continue
        line=${line% # if *}
        ;;
    esac
    while [[ $line == *'${'*'}'* ]]; do
      printf %s "${line%%'${'*}"
      line=${line#*'${'}
      key=${line%%'}'*}
      printf %s "${!key}"
      line=${line#*'}'}
    done
    printf '%s\n' "$line"
  done <"$root/launch/jobset.yaml"
}

case $command in
  run)
    require accelerator topology image config workdir
    find_hosts
    check image '[A-Za-z0-9][A-Za-z0-9._:/@-]*' \
      "an image, e.g. REGISTRY/drift_jax:tpu"
    check_config
    check_workdir "on a volume that all pods share"
    check max-restarts '[0-9]+' "a number from 0"
    check grace-seconds '[0-9]+' "a number from 0"
    [ -z "$service_account" ] ||
      check service-account "$label" "$named"
    [ -z "$claim" ] || check claim "$label" "$named"
    tool
    # Read by manifest, by name.
    # shellcheck disable=SC2034
    {
      NAME=$name MAX_RESTARTS=$max_restarts GRACE_SECONDS=$grace_seconds
      ACCELERATOR=$accelerator TOPOLOGY=$topology IMAGE=$image SPOT=$spot
      SERVICE_ACCOUNT=$service_account CLAIM=$claim
      HOSTS=$hosts CHIPS_PER_HOST=$chips_per_host
      ARGUMENTS=$(json "--config=$config" "--workdir=$workdir" \
        --coordinator=auto ${overrides[@]+"${overrides[@]}"}) || exit
    }
    # Not apply, which finds a JobSet that has failed 'unchanged' and starts
    # nothing.
    create=("${kube[@]}" create --filename=-)
    if [ -n "$dry_run" ]; then
      printf "%s <<'END'\n%s\nEND\n" "$(quote "${create[@]}")" "$(manifest)"
    else
      manifest | "${create[@]}"
    fi
    ;;
  status)
    tool
    run "${kube[@]}" get jobset "$name"
    run "${kube[@]}" get pods "--selector=$pods" --output=wide
    ;;
  logs)
    check worker '[0-9]+' "a worker's number from 0"
    tool
    pods+=,batch.kubernetes.io/job-completion-index=$worker
    run "${kube[@]}" logs --follow --tail=100 "--selector=$pods"
    ;;
  stop)
    tool
    # Foreground: it returns once the pods are gone.
    run "${kube[@]}" delete jobset "$name" --cascade=foreground
    ;;
esac
